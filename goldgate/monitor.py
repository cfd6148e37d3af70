"""`goldgate monitor`: whether live requests are still what they were, shown test by test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from goldgate.config import beside, parse, place_training, read_with_training, set_key
from tasks.contracts.monitor import MonitorResult, MonitorSpec
from tasks.contracts.parse import read_mapping

EXIT_DRIFTED = 3
EXIT_NOT_ENOUGH = 4
TRAIN_DEPLOYMENT = "train/gpu"


def monitor(
    config: Annotated[Path, typer.Argument(help="The configuration, a YAML file (see examples/).", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key.path=value: wins over the file. May be given many times.")
    ] = None,
    report_only: Annotated[bool, typer.Option("--report-only", help="Start no retrain, whatever has drifted.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare the last requests with those of when the version went live; drift starts a retrain, by an event.

    Exits 0 without drift, 3 with drift (whether or not it has started a retrain), 4 if there is not enough to compare.
    """
    # The command line registers this command, so it is there before it is called.
    from goldgate.cli import _ending_soon, _prepare_flow, console

    spec = load_monitor(config, overrides or [])
    if report_only:
        spec = spec.model_copy(update={"report_only": True})
    _prepare_flow(spec.execution)
    from flows.monitor import monitor as flow
    from goldgate.terminal import showing

    with _ending_soon(), showing(console if not as_json else Console(quiet=True)):
        state = flow(spec, return_state=True)
        result = state.result()
    if not isinstance(result, MonitorResult):
        raise TypeError(f"the flow handed back a {type(result).__name__}, not a MonitorResult")
    if as_json:
        print(result.model_dump_json(indent=2))
    else:
        print_monitor(console, result)
    if result.report is None:
        raise typer.Exit(EXIT_NOT_ENOUGH)
    if result.report.drifted:
        raise typer.Exit(EXIT_DRIFTED)


def load_monitor(
    path: Path, overrides: Sequence[str] = (), train_deployment: str | None = TRAIN_DEPLOYMENT
) -> MonitorSpec:
    """Read a configuration. The training that drift starts is named by `training_from`, as in `read_with_training`.

    Where the file does not say them, name and execution are the training's. Relative paths count from the folder of
    the file.

    Args:
        path: the YAML file.
        overrides: `key.path=value` each; they win over the file.
        train_deployment: what the retrain hands its training to where its configuration names none: it is a run of a
            worker, whoever looked.

    Raises:
        SpecError: unreadable, no YAML, an unknown key, or a value out of bounds; names the file and the field.
    """
    record = read_mapping(path)
    for override in overrides:
        set_key(record, override)
    if "training_from" in record or "training" in record:
        record = read_with_training(path, overrides)
        training = record.pop("training")
        record = {
            "retrain": training,
            **{key: training[key] for key in ("name", "execution") if key in training},
            **record,
        }
    spec = parse(MonitorSpec, record, where=str(path))
    folder = path.absolute().parent
    retrain = spec.retrain and place_training(spec.retrain, path)
    if retrain is not None:
        named = retrain.execution.train_deployment or train_deployment
        retrain = retrain.model_copy(
            update={"execution": retrain.execution.model_copy(update={"train_deployment": named})}
        )
    return spec.model_copy(
        update={
            "retrain": retrain,
            "log": spec.log and beside(folder, spec.log),
            "reviews": spec.reviews and beside(folder, spec.reviews),
        }
    )


def load_preset(config: str) -> dict[str, Any]:
    """A build step for `deployments/prefect.yaml`: a configuration as parameters of the deployment, paths absolute.

    Args:
        config: the YAML file, relative to the working directory.

    Raises:
        SpecError: as `load_monitor`.
    """
    return {"spec": load_monitor(Path(config)).model_dump(mode="json")}


def print_monitor(console: Console, result: MonitorResult) -> None:
    """Each test with its effect and limit, what has changed, which requests were compared, and what came of it."""
    from tasks.serving.monitor.words import HEAD, detail_lines, headline, table_rows, window_lines

    console.print()
    if result.report is not None:
        table = Table(box=None, pad_edge=False)
        for column in HEAD:
            table.add_column(column, justify="left" if column in (HEAD[0], HEAD[-1]) else "right")
        for row in table_rows(result.report.tests):
            table.add_row(*map(escape, row))
        console.print(table)
        console.print()
        for line in (*detail_lines(result), *window_lines(result)):
            console.print(escape(line), highlight=False, soft_wrap=True)
        console.print()
    console.print(escape(headline(result)), highlight=False, soft_wrap=True)
