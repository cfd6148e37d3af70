"""The verdict in short: a table for the terminal, Markdown for the page of the run, and the record `verdict.json`."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, NamedTuple
from urllib.parse import unquote

from tasks.contracts.numbers import metric_name, p_words, percent, points
from tasks.contracts.references import (
    EvaluationRef,
    EvaluationSummary,
    Outcome,
    RawDatasetRef,
    RegisteredModelRef,
    SystemUnderTest,
    Verdict,
    VerdictRef,
)

_WORDS = {Outcome.PROMOTE: "Promoted", Outcome.REJECT: "Rejected", Outcome.INCONCLUSIVE: "Inconclusive"}


class TableRow(NamedTuple):
    """One metric as people read it; `decides` marks the metric that the verdict rests on."""

    metric: str
    baseline: str
    candidate: str
    difference: str
    interval: str
    items: str
    decides: bool


def outcome_word(outcome: Outcome) -> str:
    """The verdict as a heading."""
    return _WORDS[outcome]


def verdict_table(verdict: Verdict) -> list[TableRow]:
    """Baseline against candidate, a row for each metric, the deciding one first."""
    return [
        TableRow(
            metric=metric_name(row.metric),
            baseline=percent(row.baseline),
            candidate=percent(row.candidate),
            difference=points(row.difference),
            interval=f"{points(row.low)} to {points(row.high)}",
            items=f"{row.n:,}",
            decides=row.metric == verdict.policy.metric,
        )
        for row in verdict.metrics
    ]


def next_steps(verdict: Verdict, registered: RegisteredModelRef | None) -> str:
    """What follows from the verdict, in one or two sentences."""
    baseline = verdict.baseline.label
    match verdict.outcome:
        case Outcome.PROMOTE if registered is not None:
            kept = (
                f" Version {registered.previous_version} is kept as `previous`, to go back to."
                if registered.previous_version
                else ""
            )
            return (
                f"Registered as {registered.name} version {registered.version}; the alias `{registered.alias}` now "
                f"names it.{kept}"
            )
        case Outcome.PROMOTE:
            return "The candidate may be registered. This run has not registered it."
        case Outcome.REJECT:
            return f"Nothing was changed: the baseline ({baseline}) stays. A new candidate is needed."
        case Outcome.INCONCLUSIVE:
            return (
                f"Nothing was changed: the baseline ({baseline}) stays. A larger golden set would settle it, or a "
                "candidate that is better by more."
            )


def what_would_change(verdict: Verdict, baseline: EvaluationSummary, candidate: EvaluationSummary) -> str:
    """What would turn the verdict, in one or two sentences."""
    primary, margin = verdict.metrics[0], verdict.policy.min_improvement
    bar = "0" if margin == 0 else points(margin)
    match outcome := verdict.outcome:
        case Outcome.PROMOTE:
            spare = verdict.wins - verdict.losses
            return (
                f"It would fall if the lower end of the interval, {points(primary.low)} points, were not above {bar}. "
                f"The candidate is ahead by {spare:,} of {verdict.n:,} items."
            )
        case Outcome.REJECT | Outcome.INCONCLUSIVE:
            before = {score.label: score.f1 for score in baseline.classes}
            fallen = sorted((score.f1 - before.get(score.label, 0.0), score.label) for score in candidate.classes)
            worst = [f"{label} (F1 {points(change)} points)" for change, label in fallen[:3] if change < -0.005]
            look = f" It lost most on {', '.join(worst)}." if worst else ""
            if outcome is Outcome.INCONCLUSIVE and verdict.items_to_settle is not None:
                return f"About {verdict.items_to_settle:,} items in all, where there are {verdict.n:,} now.{look}"
            return f"A candidate whose whole interval lies above {bar}; start with the items lost below.{look}"


def verdict_markdown(
    verdict: Verdict, registered: RegisteredModelRef | None = None, links: Mapping[str, str] | None = None
) -> str:
    """The verdict as Markdown, for the page of the run."""
    confidence = f"{100 * verdict.metrics[0].confidence:.0f} % interval"
    lines = [
        f"# {outcome_word(verdict.outcome)}",
        "",
        f"**{verdict.reasons[0]}**",
        "",
        *[f"- {reason}" for reason in verdict.reasons[1:]],
        "",
        f"| Metric | Baseline | Candidate | Difference (points) | {confidence} | Items |",
        "|---|--:|--:|--:|:-:|--:|",
    ]
    for row in verdict_table(verdict):
        name = f"**{row.metric}** (decides)" if row.decides else row.metric
        lines.append(
            f"| {_cell(name)} | {row.baseline} | {row.candidate} | {row.difference} | {row.interval} | {row.items} |"
        )
    lines += [
        "",
        f"**Next.** {next_steps(verdict, registered)}",
        "",
        f"Baseline: {verdict.baseline.label}. Candidate: {verdict.candidate.label}. "
        f"Exact one-sided test: {p_words(verdict.p_value)}. Look {verdict.looks} at this golden set.",
    ]
    if links:
        lines += ["", *[f"- {_link(name, address)}" for name, address in links.items()]]
    return "\n".join(lines) + "\n"


def evaluation_markdown(result: EvaluationRef) -> str:
    """One model's scores as Markdown, for the page of the run."""
    rows = [f"| {_cell(metric_name(name))} | {percent(value)} |" for name, value in result.metrics.items()]
    return "\n".join(
        [f"# {result.system.label}", "", f"{result.items:,} items, {result.conditions.engine}.", "",
         "| Metric | Value |", "|---|--:|", *rows]
    ) + "\n"  # fmt: skip


def verdict_record(
    name: str,
    created: datetime,
    kept: VerdictRef,
    raw: RawDatasetRef,
    registered: RegisteredModelRef | None,
    links: Mapping[str, str],
) -> dict[str, Any]:
    """What `verdict.json` of a run folder holds: plain JSON for other programs to read.

    `digests` adds to those of the verdict `raw_data` (the rows as read) and `artefact` (the candidate's model);
    `evidence` is where the outcomes of both models are kept.
    """
    verdict = kept.verdict

    def model(system: SystemUnderTest) -> dict[str, str]:
        return {"label": system.label, "role": system.role, "uri": system.uri, "digest": system.digest}

    return {
        "name": name,
        "created": created.isoformat(timespec="seconds"),
        "verdict": verdict.outcome.value,
        "reasons": list(verdict.reasons),
        "metrics": {
            row.metric: {
                "baseline": row.baseline,
                "baseline_interval": [row.baseline_low, row.baseline_high],
                "candidate": row.candidate,
                "candidate_interval": [row.candidate_low, row.candidate_high],
                "difference": row.difference,
                "interval": [row.low, row.high],
                "confidence": row.confidence,
                "method": row.method,
                "n": row.n,
            }
            for row in verdict.metrics
        },
        "policy": verdict.policy.model_dump(mode="json"),
        "p_value": verdict.p_value,
        "wins": verdict.wins,
        "losses": verdict.losses,
        "ties": verdict.ties,
        "n": verdict.n,
        "items_to_settle": verdict.items_to_settle,
        "looks": verdict.looks,
        "digests": {**verdict.digests, "raw_data": raw.digest, "artefact": verdict.candidate.digest},
        "candidate": model(verdict.candidate),
        "baseline": model(verdict.baseline),
        "registered": registered.model_dump(mode="json") if registered else None,
        "evidence": kept.uri,
        "links": dict(links),
    }


def _link(name: str, address: str) -> str:
    """A link, or a path to copy: no browser follows a link from a served page to a file."""
    if address.startswith(("http://", "https://")):
        return f"[{name}]({address})"
    return f"{name}: `{unquote(address.removeprefix('file://'))}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
