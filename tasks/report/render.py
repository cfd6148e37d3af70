"""The report of a run: one HTML file that holds all it shows, opens from disk and loads nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from tasks.contracts.confidence import LearntTrust
from tasks.contracts.numbers import items, level, metric_name, moment, p_words, percent, points
from tasks.contracts.references import (
    EvaluationSummary,
    ItemOutcome,
    MetricComparison,
    Outcome,
    RegisteredModelRef,
    Release,
    ReleaseKind,
    Requirement,
    Status,
    TrainedModelRef,
    Verdict,
)
from tasks.contracts.spec import RetrainSpec, TaskKind
from tasks.report import views, words
from tasks.report.confidence import confidence_view
from tasks.report.forest import Forest, Mark, alone, forest, primary_values
from tasks.report.summary import hangs_on, lost_most, next_steps, requirement_table, what_would_change
from tasks.report.views import CurvePoint, Funnel

_START = "Start with the items that were lost; they are below."
_CHECKLIST = 8  # requirements in the list on top; all of them are in the section below
_MOST_URGENT = (Status.FAILED, Status.OPEN, Status.SHOWN)


@dataclass(frozen=True)
class ReportData:
    """Everything that the report shows.

    Attributes:
        folder: where this report will be, with `verdict.json`.
        release: what followed from the verdict.
        champion_release: how the baseline came to be champion; None where it is no champion, or nobody knows.
        evidence: folder with the verdict and both models' outcomes.
        links: what a page is called to its address (MLflow run, Data Docs).
        trust: what dev has shown of the candidate's confidence; None where that was not asked.
    """

    spec: RetrainSpec
    created: datetime
    folder: str
    verdict: Verdict
    release: Release
    evidence: str
    baseline: EvaluationSummary
    candidate: EvaluationSummary
    baseline_outcomes: Sequence[ItemOutcome]
    candidate_outcomes: Sequence[ItemOutcome]
    trained: TrainedModelRef
    curves: Sequence[CurvePoint]
    funnel: Funnel
    registered: RegisteredModelRef | None
    links: Mapping[str, str]
    champion_release: words.Placed | None = None
    retrain_noise: str | None = None
    trust: LearntTrust | None = None


@dataclass(frozen=True)
class _Numbers:
    """What says something of single items, of slices, or of how far from its limit anything is.

    There is none of it where the verdict withholds numbers, so a template that forgets to ask fails instead of telling.
    """

    primary: Requirement
    values: MetricComparison | None
    primary_mark: Mark
    checklist: list[Requirement]
    forest: Forest
    levels: str
    table: list[tuple[Requirement, str, str]]
    hangs_on: str
    change: list[str]
    changes: views.Changes
    classes: list[views.ClassView]
    confusions: list[tuple[str, views.Confusion]]
    fields: list[MetricComparison]
    test: str


def render_report(data: ReportData) -> str:
    """The report as HTML. All text from data is escaped; nothing is loaded from anywhere."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=percent,
        points=points,
        level=level,
        moment=moment,
        metric_name=metric_name,
        in_text=_in_text,
        duration=_duration,
        gigabytes=_gigabytes,
        code=_code,
        to_copy=words.to_copy,
        spoken=views.spoken,
        about=words.about,
        asked=words.asked,
        found=words.found,
        interval=words.interval,
        limit=words.limit,
    )
    verdict, release = data.verdict, data.release
    numbers = None if verdict.withheld else _numbers(data)
    return environment.get_template("report.html.j2").render(
        data=data,
        verdict=verdict,
        word=words.state_word(verdict, release),
        state=_state(verdict, release),
        overruled=words.state_word(verdict, release) != words.outcome_word(verdict.outcome),
        release_sentence=words.release_sentence(release),
        champion_sentence=words.champion_sentence(data.champion_release),
        champion_forced=words.by_override(data.champion_release),
        next_steps=next_steps(verdict, release, data.registered, data.folder),
        numbers=numbers,
        counted=words.counted(verdict.requirements) if numbers else "",
        size=items(verdict.n, verdict.groups),
        rung=words.rung(verdict) if verdict.withheld else "",
        withheld=words.withheld_sentence(verdict) if verdict.withheld else "",
        looks=words.look_sentences(verdict),
        budget=None if verdict.withheld else words.budget(verdict),
        refresh_hint=words.refresh_hint(verdict),
        self_test=words.self_test_sentence(verdict.self_test) if verdict.self_test and numbers else "",
        curves=views.curves(data.curves),
        funnel=views.funnel_steps(data.funnel),
        confidence=confidence_view(data.trust) if data.trust is not None else None,
    )


def _numbers(data: ReportData) -> _Numbers:
    verdict = data.verdict
    primary = verdict.requirements[0]
    classify = data.spec.task.kind is TaskKind.CLASSIFY
    change = what_would_change(verdict)
    if verdict.outcome is not Outcome.PROMOTE:
        change.append(lost_most(data.baseline, data.candidate) or _START)
    return _Numbers(
        primary=primary,
        values=primary_values(verdict),
        primary_mark=alone(primary),
        checklist=sorted(verdict.requirements, key=lambda one: _MOST_URGENT.index(one.status))[:_CHECKLIST],
        forest=forest(verdict),
        levels=words.levels_note(verdict.requirements),
        table=[
            (one, row.p_value.removeprefix("p ").removeprefix("= "), row.items)
            for one, row in zip(verdict.requirements, requirement_table(verdict), strict=True)
        ],
        hangs_on=hangs_on(verdict),
        change=change,
        changes=views.changes(data.baseline_outcomes, data.candidate_outcomes, verdict.policy.metric),
        classes=views.class_rows(data.baseline, data.candidate) if classify else [],
        confusions=[
            (side, views.confusion(outcomes, data.spec.task.labels))
            for side, outcomes in (("Candidate", data.candidate_outcomes), ("Baseline", data.baseline_outcomes))
        ]
        if classify
        else [],
        fields=[
            row
            for row in verdict.metrics
            if row.metric.startswith("field:") and row.slice is None and row.suite is None
        ],
        test=(
            f"{primary.method}: {verdict.wins:,} wins against {verdict.losses:,} losses, {verdict.ties:,} ties; "
            f"one-sided {p_words(verdict.p_value)} at level {level(primary.level)}"
        ),
    )


def _state(verdict: Verdict, release: Release) -> str:
    """The class that colours the page: the verdict's, unless a person's word counts for more."""
    kinds = (ReleaseKind.FORCED, ReleaseKind.AWAITING, ReleaseKind.DECLINED)
    return release.kind.value if release.kind in kinds else verdict.outcome.value


def _code(text: str) -> Markup:
    """Escaped text with its `names` set as code."""
    parts = [str(escape(part)) for part in text.split("`")]
    return Markup("".join(f"<code>{part}</code>" if at % 2 else part for at, part in enumerate(parts)))  # noqa: S704 - each part was escaped


def _in_text(metric: str) -> str:
    """A metric's name inside of a sentence: "exact match", "macro-F1"."""
    name = metric_name(metric)
    return name[:1].lower() + name[1:]


def _duration(seconds: float) -> str:
    """Seconds as people say them: 43 s, 7 min 05 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
