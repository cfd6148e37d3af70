"""`goldgate prefer`: tune further on what the model gets wrong on dev, and show what that did."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from goldgate.config import load_spec
from tasks.contracts.prefer import DevEffect, PreferResult

_COLOURS = {
    DevEffect.GAIN: "green",
    DevEffect.LOSS: "red",
    DevEffect.NONE_SHOWN: "yellow",
    DevEffect.NOT_TUNED: "yellow",
}


def prefer(
    config: Annotated[Path, typer.Argument(help="The configuration, a YAML file (see examples/).", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key.path=value: wins over the file. May be given many times.")
    ] = None,
) -> None:
    """Tune a trained model on the dev rows that it gets wrong (DPO), and compare both on dev rows kept aside.

    Finished training is reused. The golden set is not asked and nothing is registered; with `preference` in the
    configuration, `goldgate run` does the same and lets the gate decide.
    """
    # The command line registers this command, so it is there before it is called.
    from goldgate.cli import _ending_soon, _prepare_flow, console

    spec = load_spec(config, overrides or [])
    _prepare_flow(spec.execution)
    from flows.prefer import prefer as flow
    from goldgate.terminal import showing

    console.print(f"[bold]{spec.name}[/]: {escape(spec.task.instruction)}", highlight=False)
    with _ending_soon(), showing(console):
        result = flow(spec)
    print_preference(console, result)


def print_preference(console: Console, result: PreferResult) -> None:
    """What came of it, each metric before and after, and where the model lies; the path comes last."""
    from tasks.report.preference import preference_table

    word = result.effect.value.replace("_", " ").upper()
    console.print(
        f"\n[bold {_COLOURS[result.effect]}]{word}[/]  {escape(result.sentence)}", highlight=False, soft_wrap=True
    )
    if result.tuned is None:
        return
    table = Table(box=None, pad_edge=False)
    for column in ("held-out dev", "before", "after", "difference", "95 % interval"):
        table.add_column(column, justify="left" if column == "held-out dev" else "right")
    for row in preference_table(result):
        table.add_row(*map(escape, row))
    console.print()
    console.print(table)
    console.print("\nThe tuned model:", highlight=False)
    console.print(escape(result.tuned.uri), highlight=False, soft_wrap=True)
