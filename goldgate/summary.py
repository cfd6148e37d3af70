"""How results read in a terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tasks.contracts.numbers import items, metric_name, percent
from tasks.contracts.references import EvaluationRef, Outcome, Release, ReleaseKind, RunResult, Status, Verdict
from tasks.contracts.spec import ExecutionSpec, RetrainSpec
from tasks.report.summary import (
    WAITING,
    approve_command,
    hangs_on,
    requirement_table,
    verdict_table,
    what_would_change,
)
from tasks.report.words import (
    budget_sentences,
    look_sentences,
    one_line,
    release_sentence,
    rung,
    self_test_sentence,
    withheld_sentence,
)
from tasks.store import Store
from tasks.tracking import tracking_uri, without_password

_COLOURS = {Outcome.PROMOTE: "green", Outcome.REJECT: "red", Outcome.INCONCLUSIVE: "yellow"}
_STATUS_COLOURS = {Status.SHOWN: "green", Status.FAILED: "red", Status.OPEN: "yellow"}
_GIB = 2**30


def print_verdict(console: Console, verdict: Verdict, release: Release | None = None) -> None:
    """The verdict, what a person said of it, its reasons, and what it rests on, unless its numbers are withheld."""
    say = partial(console.print, highlight=False, soft_wrap=True)
    say(f"\n[bold {_COLOURS[verdict.outcome]}]{verdict.outcome.value.upper()}[/]  {escape(verdict.reasons[0])}")
    if release is not None and (person := release_sentence(release)):
        reason = f": {escape(one_line(release.reason))}" if release.reason else "."
        forced = release.kind is ReleaseKind.FORCED
        say(f"\n[bold{' red' if forced else ''}]{escape(person)}[/]{reason}")
    for reason in verdict.reasons[1:]:
        say(f"  {escape(reason)}")
    say(f"\n  baseline   {escape(verdict.baseline.label)}\n  candidate  {escape(verdict.candidate.label)}\n")
    if verdict.withheld:
        if value := rung(verdict):
            say(f"Rung: [bold]{value}[/]")
        say(escape(withheld_sentence(verdict)))
    else:
        _print_metrics(console, verdict)
        if len(verdict.requirements) > 1:
            console.print()
            _print_requirements(console, verdict)
        if verdict.outcome is not Outcome.PROMOTE:
            say(f"\n{hangs_on(verdict)}:")
            for sentence in what_would_change(verdict):
                say(f"  {escape(sentence)}")
    say(f"\n{escape(' '.join([*look_sentences(verdict), *budget_sentences(verdict)]))}")
    if verdict.self_test is not None and not verdict.withheld:
        say(f"Self-test: {escape(self_test_sentence(verdict.self_test))}")


def print_result(console: Console, spec: RetrainSpec, result: RunResult, *, reused: Sequence[str]) -> None:
    """How a run ended, where everything is, and what to do next; the run's folder is the last line."""
    say = partial(console.print, highlight=False, soft_wrap=True)
    if reused:
        say(f"\nReused from earlier runs: {', '.join(reused)}.")
    print_verdict(console, result.verdict, result.release)
    name, version = result.name, result.registered
    if result.release.kind is ReleaseKind.AWAITING:
        say("\nThe registry is untouched until a person answers:")
        say(f"  approve:   {escape(approve_command(result.folder))}")
        say(f"  decline:   {escape(approve_command(result.folder))} --decline")
    elif version is None:
        say("\nThe registry is untouched.")
    else:
        by = f", {result.release.kind.value} by {one_line(result.release.by)}" if result.release.by else ""
        say(f"\nRegistered: {name} version {version.version}, alias {version.alias}{escape(by)}")
        say(f"  use it:    export MLFLOW_TRACKING_URI={without_password(tracking_uri(spec.execution))}")
        say(f"             mlflow.pyfunc.load_model('models:/{name}@{version.alias}').predict(['...'])   (Python)")
        if version.alias == WAITING:
            say("  roll out:  goldgate serve, then goldgate rollout CONFIG   (a worker does it by itself: make up)")
        else:
            say("  serve it:  make vllm-env, then goldgate serve, and in another terminal")
            say(f"             goldgate rollout CONFIG --version {version.version}")
        if version.previous_version is not None:
            say(f"  roll back: goldgate rollback {name} --reason '...'   (to version {version.previous_version})")
    say("  see it:    make up   (Prefect and MLflow pages, schedule, API)")
    say(f"  report:    {result.folder}/report.html")
    say(f"\n{result.folder}")


def _print_metrics(console: Console, verdict: Verdict) -> None:
    """Baseline against candidate: the whole golden set, and under it slices and suites, indented."""
    shown = verdict_table(verdict)
    table = _table("metric")
    for heading in ("baseline", "candidate", "points", f"{shown.confidence} interval", "items"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in shown.rows:
        name = f"{row.metric} (decides)" if row.decides else row.metric
        if row.where:
            name = f"  {row.where}" if row.metric == shown.rows[0].metric else f"  {row.where}: {row.metric}"
        table.add_row(
            escape(name), row.baseline, row.candidate, row.difference, row.interval, row.items,
            style="bold" if row.decides else "",
        )  # fmt: skip
    console.print(table)
    if shown.left_out:
        console.print(f"{shown.left_out:,} more slices are in the report.", highlight=False)
    if verdict.groups < verdict.n:
        console.print(f"{items(verdict.n, verdict.groups)}; each group counts as one draw.", highlight=False)


def _print_requirements(console: Console, verdict: Verdict) -> None:
    """Everything that was asked, and what the outcomes say of it."""
    table = _table("requirement")
    table.add_column("asked", overflow="fold")
    for heading in ("found", "interval", "p"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for row in requirement_table(verdict):
        p_value = row.p_value.removeprefix("p ").removeprefix("= ")
        status = f"[{_STATUS_COLOURS[row.status]}]{row.status.value}[/]"
        table.add_row(escape(row.about), row.asked, row.found, row.interval, p_value, status)
    console.print(table)


def _table(first: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(first, overflow="fold")  # texts give way in a narrow terminal, numbers never
    return table


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
        named = (("champion", model.champion), ("previous", model.previous), (WAITING, model.promoted))
        for alias, version in named:
            if version is not None:
                when = f"{version.registered:%Y-%m-%d %H:%M}"
                say(f"  {alias}  version {version.version}, {when}: {escape(version.headline())}")
