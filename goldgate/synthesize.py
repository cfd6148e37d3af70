"""`goldgate synthesize`: have a teacher write rows, and show what survived."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from goldgate.config import beside, parse, place_data, read_with_task
from tasks.contracts.numbers import percent
from tasks.contracts.synthesis import SynthesisRef, SynthesizeSpec

_SHARED = ("name", "task", "data", "golden", "execution")  # what a training's configuration and this one have alike


def synthesize(
    config: Annotated[Path, typer.Argument(help="The configuration, a YAML file (see examples/).", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key.path=value: wins over the file. May be given many times.")
    ] = None,
) -> None:
    """Have a teacher write rows where real ones are few, and keep those that pass every filter.

    The key of its server is taken from GOLDGATE_TEACHER_KEY. An interrupted run goes on and pays for nothing twice.
    """
    # The command line registers this command, so it is there before it is called.
    from goldgate.cli import _ending_soon, _prepare_flow, console

    spec = load_synthesis(config, overrides or [])
    _prepare_flow(spec.execution)
    from flows.synthesize import synthesize as flow
    from goldgate.terminal import showing

    console.print(f"[bold]{spec.name}[/]: {escape(spec.teacher.model)} at {escape(spec.teacher.url)}", highlight=False)
    with _ending_soon(), showing(console):
        result = flow(spec)
    print_synthesis(console, result)


def load_synthesis(path: Path, overrides: Sequence[str] = ()) -> SynthesizeSpec:
    """Read a configuration. Paths of data, golden set and documents are relative to the file's folder.

    `task_from` names the configuration of a training, from which name, task, data, golden set and execution are taken
    where this one does not say otherwise.

    Raises:
        SpecError: unreadable, no YAML, an unknown key, or a value out of bounds; names the file and the field.
    """
    record = read_with_task(path, overrides, _SHARED)
    folder = path.absolute().parent
    spec = parse(SynthesizeSpec, record, where=str(path))
    changed: dict[str, Any] = {
        "data": place_data(spec.data, folder),
        "golden": spec.golden.model_copy(update={"path": beside(folder, spec.golden.path)}),
    }
    if spec.documents is not None:
        changed["documents"] = spec.documents.model_copy(update={"path": beside(folder, spec.documents.path)})
    return spec.model_copy(update=changed)


def load_preset(config: str) -> dict[str, Any]:
    """A build step for `deployments/prefect.yaml`: a configuration as parameters of the deployment, paths absolute.

    Raises:
        SpecError: as `load_synthesis`.
    """
    return {"spec": load_synthesis(Path(config)).model_dump(mode="json")}


def print_synthesis(console: Console, result: SynthesisRef) -> None:
    """The funnel, the costs, and where the rows lie; the path comes last."""
    from tasks.data.synthesis.report import cost_words

    report = result.report
    table = Table(box=None, pad_edge=False)
    for column in ("filter", "in", "out", "survival", "refused"):
        table.add_column(column, justify="left" if column in ("filter", "refused") else "right")
    for entry in report["funnel"]:
        refused = ", ".join(f"{count:,} {reason}" for reason, count in entry["rejected"].items())
        table.add_row(
            entry["step"].replace("_", "-"),
            f"{entry['in']:,}",
            f"{entry['out']:,}",
            "" if entry["survival"] is None else percent(entry["survival"]),
            escape(f"skipped: {entry['skipped']}" if "skipped" in entry else refused),
        )
    console.print()
    console.print(table)

    def say(text: str) -> None:
        console.print(escape(text), highlight=False, soft_wrap=True)

    again = report["refinement"]
    say(f"\nTold why and asked again: {again['asked']:,}, of which {again['kept']:,} kept.")
    say(f"Costs: {cost_words(report)}.")
    if result.stopped is not None:
        say(f"Stopped early: {result.stopped}, and one more request could have exceeded it. What was paid is kept.")
    say("Put the file beside the real rows, in a folder of parts that `data.source` names:")
    say(result.path)
