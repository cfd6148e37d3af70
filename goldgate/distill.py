"""`goldgate distill`: have a teacher rewrite training answers, and show what that did on dev."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from goldgate.config import parse, place_training, read_with_training
from tasks.contracts.distill import DistillResult, DistillSpec
from tasks.contracts.numbers import metric_name, percent, place, points
from tasks.contracts.parse import read_mapping

_TRAINING_FROM = "training_from"


def distill(
    config: Annotated[Path, typer.Argument(help="The configuration, a YAML file (see examples/).", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key.path=value: wins over the file. May be given many times.")
    ] = None,
) -> None:
    """Have a teacher rewrite the answers of the training rows, train on both versions, and compare them on dev.

    The key of its server is taken from GOLDGATE_TEACHER_KEY. An interrupted run goes on and pays for nothing twice.
    """
    # The command line registers this command, so it is there before it is called.
    from goldgate.cli import _ending_soon, _prepare_flow, console

    spec = load_distillation(config, overrides or [])
    _prepare_flow(spec.training.execution)
    from flows.distill import distill as flow
    from goldgate.terminal import showing

    asked = f"{escape(spec.teacher.model)} at {escape(spec.teacher.url)}"
    console.print(f"[bold]{spec.training.name}[/]: answers rewritten by {asked}", highlight=False)
    with _ending_soon(), showing(console):
        result = flow(spec)
    print_distillation(console, result, _training_of(config))


def load_distillation(path: Path, overrides: Sequence[str] = ()) -> DistillSpec:
    """Read a configuration; its training as `goldgate.config.read_with_training` reads it.

    Raises:
        SpecError: unreadable, no YAML, an unknown key, or a value out of bounds; names the file and the field.
    """
    spec = parse(DistillSpec, read_with_training(path, overrides), where=str(path))
    return spec.model_copy(update={"training": place_training(spec.training, path)})


def load_preset(config: str) -> dict[str, Any]:
    """A build step for `deployments/prefect.yaml`: a configuration as parameters of the deployment, paths absolute.

    Raises:
        SpecError: as `load_distillation`.
    """
    return {"spec": load_distillation(Path(config)).model_dump(mode="json")}


def print_distillation(console: Console, result: DistillResult, training: str) -> None:
    """Both trainings side by side, what was shown, and the command that sends the rewritten rows to the gate.

    Args:
        console: where to print.
        result: both on dev.
        training: the configuration of the training, as a person would name it.
    """
    from tasks.data.distill.report import better_sentence, command, effect_sentence

    table = Table(box=None, pad_edge=False)
    for column in ("on the same dev rows", "original", "rewritten", "difference", "95 % interval"):
        table.add_column(column, justify="left" if column.startswith("on") else "right")
    for one in result.comparisons:
        where = place(one.slice, one.suite)
        table.add_row(
            escape(metric_name(one.metric) + (f", {where}" if where else "")),
            percent(one.baseline),
            percent(one.candidate),
            points(one.difference),
            f"{points(one.low)} to {points(one.high)}",
        )
    losses = (result.original.dev_loss, result.rewritten.dev_loss)
    table.add_row(
        "dev loss", *(f"{loss:.4f}" for loss in losses), f"{losses[1] - losses[0]:+.4f}".replace("-", "−"), ""
    )
    console.print()
    console.print(table)

    def say(text: str) -> None:
        console.print(escape(text), highlight=False, soft_wrap=True)

    say(f"\n{effect_sentence(result.effect, result.comparisons[0])}")
    say(f"{result.changed:,} of {result.rows:,} training rows have a rewritten answer. Report: {result.report}")
    say(better_sentence(result))
    say(command(result, training))


def _training_of(config: Path) -> str:
    """The configuration of the training that the file names, as a path from here; else a word for it."""
    named = read_mapping(config).get(_TRAINING_FROM)
    return str(config.parent / named) if isinstance(named, str) else "CONFIG.yaml"
