"""How results read in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from rich.console import Console
from rich.table import Table

from tasks.contracts.references import MetricComparison, Outcome, RunResult, Verdict

_COLOURS = {Outcome.PROMOTE: "green", Outcome.REJECT: "red", Outcome.INCONCLUSIVE: "yellow"}
_WORDS = {Outcome.PROMOTE: "PROMOTE", Outcome.REJECT: "REJECT", Outcome.INCONCLUSIVE: "INCONCLUSIVE"}


def verdict_table(verdict: Verdict) -> Table:
    """Baseline against candidate, one row a metric, with the interval of the difference."""
    table = Table(title=None, show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("metric")
    table.add_column("baseline", justify="right")
    table.add_column("candidate", justify="right")
    table.add_column("difference", justify="right")
    confidence = verdict.metrics[0].confidence
    table.add_column(f"{confidence:.0%} interval", justify="right")
    table.add_column("n", justify="right")
    for row in verdict.metrics:
        decides = row.metric == verdict.policy.metric.value
        table.add_row(
            f"{row.metric} (decides)" if decides else row.metric,
            f"{row.baseline:.3f}",
            f"{row.candidate:.3f}",
            f"{row.difference:+.3f}",
            _interval(row),
            str(row.n),
            style="bold" if decides else "",
        )
    return table


def _interval(row: MetricComparison) -> str:
    return f"{row.low:+.3f} to {row.high:+.3f}"


def print_verdict(console: Console, verdict: Verdict) -> None:
    """The verdict, its reasons and the table."""
    colour = _COLOURS[verdict.outcome]
    console.print(f"\n[bold {colour}]{_WORDS[verdict.outcome]}[/]  {verdict.reasons[0]}", highlight=False)
    for reason in verdict.reasons[1:]:
        console.print(f"  {reason}", highlight=False)
    console.print(f"\n  baseline:  {verdict.baseline.label}\n  candidate: {verdict.candidate.label}\n", highlight=False)
    console.print(verdict_table(verdict))


def print_result(console: Console, result: RunResult, *, reused: Sequence[str]) -> None:
    """How a run ended, where everything is, and what to do next; the run's folder is the last line."""
    say = partial(console.print, highlight=False, soft_wrap=True)
    if reused:
        say(f"\nReused from earlier runs: {', '.join(reused)}.")
    print_verdict(console, result.verdict)
    name, version = result.name, result.registered
    if version is None:
        say("\nThe registry is untouched.")
    else:
        say(f"\nRegistered: {name} version {version.version}, alias {version.alias}")
        say(f"  use it:    mlflow.pyfunc.load_model('models:/{name}@{version.alias}').predict(['...'])")
        if version.previous_version is not None:
            say(f"  roll back: goldgate rollback {name} --reason '...'   (to version {version.previous_version})")
        say("  serve it:  make vllm-env, then")
        say(f"             .vllm-env/bin/vllm serve {result.model_folder} --served-model-name {name} --host 127.0.0.1")
    say("  see it:    make up   (Prefect and MLflow pages, schedule, API)")
    say(f"  report:    {result.folder}/report.html")
    say(f"\n{result.folder}")
