"""`goldgate sweep`: try recipes on dev, and show which is best and how much chance moves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from goldgate.config import parse, place_training, read_with_training
from tasks.contracts.sweep import SweepRef, SweepSpec


def sweep(
    config: Annotated[Path, typer.Argument(help="The configuration, a YAML file (see examples/).", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key.path=value: wins over the file. May be given many times.")
    ] = None,
) -> None:
    """Search for a recipe: a few trainings that differ, compared on dev. The golden set is left alone.

    With `then_gate` the winner then goes through the gate. An interrupted search goes on from its finished trials.
    """
    # The command line registers this command, so it is there before it is called.
    from goldgate.cli import _ending_soon, _prepare_flow, console

    spec = load_sweep(config, overrides or [])
    training = spec.training
    _prepare_flow(training.execution)
    from flows.sweep import sweep as flow
    from goldgate.summary import print_result
    from goldgate.terminal import showing

    console.print(f"[bold]{training.name}[/]: a search over {spec.trials} recipes", highlight=False)
    with _ending_soon(), showing(console) as shown:
        result = flow(spec)
    print_sweep(console, spec, result)
    if result.gate is not None:
        winner = result.trials[result.winner - 1].recipe
        print_result(console, spec.with_recipe(winner), result.gate, reused=shown.reused)


def load_sweep(path: Path, overrides: Sequence[str] = ()) -> SweepSpec:
    """Read a configuration; its training as `goldgate.config.read_with_training` reads it.

    Raises:
        SpecError: unreadable, no YAML, an unknown key, or a value out of bounds; names the file and the field.
    """
    spec = parse(SweepSpec, read_with_training(path, overrides), where=str(path))
    return spec.model_copy(update={"training": place_training(spec.training, path)})


def load_preset(config: str, train_deployment: str | None = "train/gpu") -> dict[str, Any]:
    """A build step for `deployments/prefect.yaml`: a configuration as parameters of the deployment, paths absolute.

    Args:
        config: the YAML file, relative to the working directory.
        train_deployment: the deployment that each trial is handed to; None trains inside the run.

    Raises:
        SpecError: as `load_sweep`.
    """
    spec = load_sweep(Path(config))
    execution = spec.training.execution.model_copy(update={"train_deployment": train_deployment})
    training = spec.training.model_copy(update={"execution": execution})
    return {"spec": spec.model_copy(update={"training": training}).model_dump(mode="json")}


def print_sweep(console: Console, spec: SweepSpec, result: SweepRef) -> None:
    """The trials, the winner, the noise, and where all is kept; the path comes last."""
    from tasks.training.sweep_words import noise_sentences, trials_table, winner_sentences

    head, *rows = trials_table(spec, result.trials, result.winner)
    table = Table(box=None, pad_edge=False)
    for column in head:
        table.add_column(column, justify="left" if column == head[-1] else "right")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    console.print()
    console.print(table)
    console.print()
    for sentence in winner_sentences(spec, result):
        console.print(escape(sentence), highlight=False, soft_wrap=True)
    if result.noise is not None:
        console.print()
        for sentence in noise_sentences(result.noise):
            console.print(escape(sentence), highlight=False, soft_wrap=True)
    console.print()
    console.print(escape(result.folder), highlight=False, soft_wrap=True)
