"""How results read in a terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tasks.contracts.numbers import metric_name, percent
from tasks.contracts.references import EvaluationRef, Outcome, RunResult, Verdict
from tasks.contracts.spec import ExecutionSpec, RetrainSpec
from tasks.report.summary import verdict_table
from tasks.store import Store
from tasks.tracking import model_folder, tracking_uri, without_password

_COLOURS = {Outcome.PROMOTE: "green", Outcome.REJECT: "red", Outcome.INCONCLUSIVE: "yellow"}
_GIB = 2**30


def print_verdict(console: Console, verdict: Verdict) -> None:
    """The verdict, its reasons, and baseline against candidate, one row a metric."""
    say = partial(console.print, highlight=False, soft_wrap=True)
    say(f"\n[bold {_COLOURS[verdict.outcome]}]{verdict.outcome.value.upper()}[/]  {escape(verdict.reasons[0])}")
    for reason in verdict.reasons[1:]:
        say(f"  {escape(reason)}")
    say(f"\n  baseline   {escape(verdict.baseline.label)}\n  candidate  {escape(verdict.candidate.label)}\n")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("metric", no_wrap=True)
    for heading in ("baseline", "candidate", "points", f"{verdict.metrics[0].confidence:.0%} interval", "items"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in verdict_table(verdict):
        name = f"{row.metric} (decides)" if row.decides else row.metric
        table.add_row(
            name, row.baseline, row.candidate, row.difference, row.interval, row.items,
            style="bold" if row.decides else "",
        )  # fmt: skip
    console.print(table)


def print_result(console: Console, spec: RetrainSpec, result: RunResult, *, reused: Sequence[str]) -> None:
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
        say(f"  use it:    export MLFLOW_TRACKING_URI={without_password(tracking_uri(spec.execution))}")
        say(f"             mlflow.pyfunc.load_model('models:/{name}@{version.alias}').predict(['...'])   (Python)")
        if version.previous_version is not None:
            say(f"  roll back: goldgate rollback {name} --reason '...'   (to version {version.previous_version})")
        say("  serve it:  make vllm-env, then")
        merged = model_folder(result.verdict.candidate.uri, spec.execution)
        say(f"             .vllm-env/bin/vllm serve {merged} --served-model-name {name} --host 127.0.0.1")
    say("  see it:    make up   (Prefect and MLflow pages, schedule, API)")
    say(f"  report:    {result.folder}/report.html")
    say(f"\n{result.folder}")


def print_evaluation(console: Console, result: EvaluationRef, store: Store) -> None:
    """The scores of one model, and the folder of its outcomes (for `goldgate gate`) as the last line."""
    say = partial(console.print, highlight=False, soft_wrap=True)
    say(f"\n[bold]{escape(result.system.label)}[/] on {result.items:,} items\n")
    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("metric")
    table.add_column("score", justify="right")
    for metric, value in result.metrics.items():
        table.add_row(metric_name(metric), percent(value))
    console.print(table)
    say(f"\n{store.files(store.open(result.uri))}")


def print_status(console: Console, execution: ExecutionSpec, *, as_json: bool) -> None:
    """What `up` started and how it is, and the versions with an alias of every registered model."""
    from goldgate import services
    from tasks.registry.versions import registered_names, status

    running = None if "://" in execution.store else services.status(Path(execution.store))
    models = [status(name, execution) for name in registered_names(execution)]
    if as_json:
        record = {
            "services": None
            if running is None
            else {
                "prefect": running[0].prefect_url,
                "mlflow": running[0].mlflow_url,
                "processes": [one.model_dump(mode="json") for one in running[1]],
            },
            "models": [model.model_dump(mode="json") for model in models],
        }
        print(json.dumps(record, indent=2))
        return
    say = partial(console.print, highlight=False, soft_wrap=True)
    if running is None:
        say("Servers: none started here (goldgate up starts them).")
    else:
        say(f"Prefect  {running[0].prefect_url}\nMLflow   {running[0].mlflow_url}")
        for one in running[1]:
            state = f"up, {one.memory_bytes / _GIB:.2f} GiB" if one.alive else f"ended; log: {one.process.log}"
            say(f"  {one.process.name:<12} {state}")
    if not models:
        say("Models: none registered yet.")
    for model in models:
        say(f"\n[bold]{model.name}[/]  {model.versions} version{'' if model.versions == 1 else 's'}")
        for alias, version in (("champion", model.champion), ("previous", model.previous)):
            if version is not None:
                reason = version.reasons[0] if version.reasons else "not registered by Goldgate"
                say(f"  {alias}  version {version.version}, {version.registered:%Y-%m-%d %H:%M}: {escape(reason)}")
