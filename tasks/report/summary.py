"""The verdict in short: tables for terminal and run page, what follows from it, and Markdown for the run page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tasks.contracts.confidence import LearntTrust
from tasks.contracts.numbers import items, metric_name, p_words, percent, place, points
from tasks.contracts.references import (
    EvaluationRef,
    EvaluationSummary,
    MetricComparison,
    Outcome,
    RegisteredModelRef,
    Release,
    ReleaseKind,
    Requirement,
    Status,
    Verdict,
)
from tasks.report.confidence import confidence_lines
from tasks.report.words import (
    Placed,
    about,
    asked,
    budget_sentences,
    by_override,
    champion_sentence,
    found,
    interval,
    look_sentences,
    one_line,
    outcome_word,
    release_sentence,
    rung,
    self_test_sentence,
    slack,
    state_word,
    to_copy,
    why,
    withheld_sentence,
)

WAITING = "promoted"  # the alias of a version that waits for its rollout
_NAMED = 3  # requirements that are named in a text; the tables have them all
MAX_SLICES = 20  # rows of slices in a table for a terminal or a run's page; `verdict.json` has them all


class TableRow(NamedTuple):
    """One metric as people read it; `decides` marks the metric that the verdict rests on.

    `where` names a slice or a suite, and is "" for the whole golden set.
    """

    metric: str
    where: str
    baseline: str
    candidate: str
    difference: str
    interval: str
    items: str
    decides: bool


class Table(NamedTuple):
    """Rows, the deciding metric first; `confidence` is that of every row that does not name its own.

    `left_out` counts slices beyond `MAX_SLICES`, those with the largest differences.
    """

    confidence: str
    rows: list[TableRow]
    left_out: int


class RequirementRow(NamedTuple):
    """One requirement as people read it."""

    about: str
    asked: str
    found: str
    interval: str
    p_value: str
    items: str
    status: Status
    decides: bool


def verdict_table(verdict: Verdict) -> Table:
    """Baseline against candidate, a row for each metric: of the whole golden set, then of slices, then of suites.

    Without rows where the numbers are withheld.
    """
    if verdict.withheld or not verdict.metrics:
        return Table("", [], 0)
    whole = [row for row in verdict.metrics if row.slice is None and row.suite is None]
    slices = [row for row in verdict.metrics if row.slice is not None]
    suites = [row for row in verdict.metrics if row.suite is not None]
    shown = lowest(slices, MAX_SLICES)
    first = verdict.metrics[0].confidence
    return Table(
        _confidence(first),
        [_table_row(row, verdict, first) for row in (*whole, *shown, *suites)],
        len(slices) - len(shown),
    )


def lowest(rows: Sequence[MetricComparison], most: int) -> list[MetricComparison]:
    """The rows in their order; of too many, those with the lowest differences, since these are what to look at."""
    if len(rows) <= most:
        return list(rows)
    kept = {id(row) for row in sorted(rows, key=lambda row: row.difference)[:most]}
    return [row for row in rows if id(row) in kept]


def requirement_table(verdict: Verdict) -> list[RequirementRow]:
    """Everything that was asked, the deciding ones first; empty where the numbers are withheld."""
    if verdict.withheld:
        return []
    return [
        RequirementRow(
            about=about(one),
            asked=asked(one),
            found=found(one),
            interval=interval(one),
            p_value=p_words(one.p_value),
            items=items(one.n, one.groups),
            status=one.status,
            decides=one.decides,
        )
        for one in verdict.requirements
    ]


# -- what follows -------------------------------------------------------------------------------------------------


def next_steps(verdict: Verdict, release: Release, registered: RegisteredModelRef | None, folder: str) -> str:
    """What follows from the verdict and from what a person said of it, in one to three sentences."""
    baseline = verdict.baseline.label
    match release.kind:
        case ReleaseKind.AWAITING:
            return (
                f"Nothing was changed yet: the baseline ({baseline}) stays until a person answers. "
                f"`{approve_command(folder)}` promotes the candidate; with `--decline` the baseline stays."
            )
        case ReleaseKind.DECLINED:
            return f"Nothing was changed: the promotion was declined, and the baseline ({baseline}) stays."
        case ReleaseKind.NOT_PROMOTED if verdict.outcome is Outcome.INCONCLUSIVE:
            return (
                f"Nothing was changed: the baseline ({baseline}) stays. A larger golden set would settle it, or a "
                "candidate that is better by more."
            )
        case ReleaseKind.NOT_PROMOTED:
            return f"Nothing was changed: the baseline ({baseline}) stays. A new candidate is needed."
    if registered is None:
        return "The candidate may be registered. This run has not registered it."
    if registered.alias == WAITING:
        return (
            f"Registered as {registered.name} version {registered.version}, which waits under the alias "
            f"`{WAITING}` for its rollout; until then the baseline ({baseline}) stays in service."
        )
    kept = (
        f" Version {registered.previous_version} is kept as `previous`, to go back to."
        if registered.previous_version
        else ""
    )
    return (
        f"Registered as {registered.name} version {registered.version}; the alias `{registered.alias}` now names "
        f"it.{kept}"
    )


def approve_command(folder: str) -> str:
    """What a person types to agree."""
    return f"goldgate approve {folder} --by NAME --comment '…'"


def what_would_change(verdict: Verdict) -> list[str]:
    """What the verdict hangs on: sentences that name the requirement, and say what these items can show.

    Empty where the numbers are withheld.
    """
    if verdict.withheld:
        return []
    match verdict.outcome:
        case Outcome.PROMOTE:
            nearest = _told(min(verdict.requirements, key=slack))
            return [
                nearest if len(verdict.requirements) == 1 else f"Nearest to its limit: {nearest}",
                f"The candidate does better on {verdict.wins:,} items and worse on {verdict.losses:,}.",
            ]
        case Outcome.REJECT:
            return _named(verdict.requirements, Status.FAILED)
        case Outcome.INCONCLUSIVE:
            return [*_named(verdict.requirements, Status.OPEN), *_settle(verdict)]


def hangs_on(verdict: Verdict) -> str:
    """The heading over `what_would_change`."""
    promoted = verdict.outcome is Outcome.PROMOTE
    return "What the verdict hangs on" if promoted else "What would change the verdict"


def lost_most(baseline: EvaluationSummary, candidate: EvaluationSummary) -> str:
    """The classes that a candidate lost most on, as a sentence; "" if there are none."""
    before = {score.label: score.f1 for score in baseline.classes}
    fallen = sorted((score.f1 - before.get(score.label, 0.0), score.label) for score in candidate.classes)
    worst = [f"{label} (F1 {points(change)} points)" for change, label in fallen[:3] if change < -0.005]
    return f"It lost most on {', '.join(worst)}." if worst else ""


def _named(requirements: Sequence[Requirement], status: Status) -> list[str]:
    named = [one for one in requirements if one.status is status]
    told = [f"{status.value.capitalize()}: {_told(one)}" for one in named[:_NAMED]]
    return [*told, f"{len(named) - _NAMED:,} more are {status.value}."] if len(named) > _NAMED else told


def _told(one: Requirement) -> str:
    return f"{about(one)}, {asked(one)}: {why(one)}."


def _settle(verdict: Verdict) -> list[str]:
    said = []
    if verdict.items_to_settle is not None:
        said.append(
            f"About {verdict.items_to_settle:,} items in all would settle it, where there are {verdict.n:,} now."
        )
    if verdict.smallest_effect is not None:
        said.append(
            f"With 80 % power, these items show a true difference of {points(verdict.smallest_effect)} points or more."
        )
    return said


# -- the page of the run ------------------------------------------------------------------------------------------


def verdict_markdown(
    verdict: Verdict,
    release: Release,
    registered: RegisteredModelRef | None = None,
    links: Mapping[str, str] | None = None,
    *,
    folder: str = "",
    champion_release: Placed | None = None,
    trust: LearntTrust | None = None,
) -> str:
    """The verdict as Markdown, for the page of the run; with `trust`, also what the candidate's confidence is worth."""
    word = state_word(verdict, release)
    lines = [f"# {word}", "", f"**{verdict.reasons[0]}**", ""]
    if word != outcome_word(verdict.outcome):
        lines += [f"The gate's verdict: **{verdict.outcome.value.upper()}**.", ""]
    lines += _quoted(release_sentence(release), release)
    if champion_release is not None and by_override(champion_release):
        lines += _quoted(champion_sentence(champion_release), champion_release)
    if len(verdict.reasons) > 1:
        lines += [*[f"- {reason}" for reason in verdict.reasons[1:]], ""]
    if verdict.withheld:
        lines += [f"**Rung: {value}**", ""] if (value := rung(verdict)) else []
        lines += [withheld_sentence(verdict), ""]
    else:
        lines += [*_requirements_markdown(verdict), *_table_markdown(verdict)]
    lines += [f"**Next.** {next_steps(verdict, release, registered, folder)}", ""]
    if change := what_would_change(verdict):
        lines += [f"**{hangs_on(verdict)}.** {' '.join(change)}", ""]
    lines += [f"**Looks.** {' '.join([*look_sentences(verdict), *budget_sentences(verdict)])}", ""]
    if verdict.self_test is not None and not verdict.withheld:
        lines += [f"**Self-test.** {self_test_sentence(verdict.self_test)}", ""]
    if trust is not None:
        lines += confidence_lines(trust)
    lines.append(f"Baseline: {verdict.baseline.label}. Candidate: {verdict.candidate.label}.")
    if not verdict.withheld:
        lines[-1] += f" {items(verdict.n, verdict.groups)}, one-sided {p_words(verdict.p_value)}."
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


def _requirements_markdown(verdict: Verdict) -> list[str]:
    """A table of what was asked; none for the deciding requirement alone, which the other table shows."""
    if len(verdict.requirements) < 2:
        return []
    lines = ["| Requirement | Asked | Found | Interval | Items | Status |", "|---|---|--:|:-:|--:|---|"]
    for row in requirement_table(verdict):
        name = f"**{_cell(row.about)}** (decides)" if row.decides else _cell(row.about)
        status = row.status.value if row.status is Status.SHOWN else f"**{row.status.value}**"
        lines.append(f"| {name} | {row.asked} | {row.found} | {row.interval} | {row.items} | {status} |")
    return [*lines, ""]


def _table_markdown(verdict: Verdict) -> list[str]:
    table = verdict_table(verdict)
    lines = [
        f"| Metric | Baseline | Candidate | Difference (points) | {table.confidence} interval | Items |",
        "|---|--:|--:|--:|:-:|--:|",
    ]
    for row in table.rows:
        name = f"{row.metric}, {row.where}" if row.where else row.metric
        name = f"**{_cell(name)}** (decides)" if row.decides else _cell(name)
        lines.append(f"| {name} | {row.baseline} | {row.candidate} | {row.difference} | {row.interval} | {row.items} |")
    if table.left_out:
        lines += ["", f"{table.left_out:,} more slices are in the report and in verdict.json."]
    return [*lines, ""]


def _table_row(row: MetricComparison, verdict: Verdict, confidence: float) -> TableRow:
    where = place(row.slice, row.suite)
    bounds = f"{points(row.low)} to {points(row.high)}"
    return TableRow(
        metric=metric_name(row.metric),
        where=where,
        baseline=percent(row.baseline),
        candidate=percent(row.candidate),
        difference=points(row.difference),
        interval=bounds if row.confidence == confidence else f"{bounds} ({_confidence(row.confidence)})",
        items=f"{row.n:,}",
        decides=not where and row.metric == verdict.policy.metric,
    )


def _confidence(confidence: float) -> str:
    """A confidence in percent, with as many digits as it takes: 0.9 is "90 %", 0.9875 is "98.75 %"."""
    return f"{round(100 * confidence, 2):g} %"


def _quoted(sentence: str, release: Placed) -> list[str]:
    """What a person decided, and their words, as a quotation; nothing where there was none."""
    if not sentence:
        return []
    comment = f": {_plain(release.reason)}" if release.reason else "."
    return [f"> **{_plain(sentence)}**{comment}", ""]


def _plain(text: str) -> str:
    """What a person wrote, so that Markdown takes none of it as its own."""
    return "".join(f"\\{sign}" if sign in "\\`*_[]<>|#~" else sign for sign in one_line(text))


def _link(name: str, address: str) -> str:
    """A link, or a path to copy: no browser follows a link from a served page to a file."""
    if address.startswith(("http://", "https://")):
        return f"[{name}]({address})"
    return f"{name}: `{to_copy(address)}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
