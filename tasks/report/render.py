"""The report of a run: one HTML file that holds all it shows, opens from disk and loads nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from urllib.parse import urlsplit

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from tasks.contracts.numbers import metric_name, p_words, percent, points
from tasks.contracts.references import (
    EvaluationSummary,
    ItemOutcome,
    RegisteredModelRef,
    TrainedModelRef,
    Verdict,
)
from tasks.contracts.spec import RetrainSpec, TaskKind
from tasks.report import views
from tasks.report.summary import next_steps, outcome_word, what_would_change
from tasks.report.views import CurvePoint, Funnel


@dataclass(frozen=True)
class ReportData:
    """Everything that the report shows.

    Attributes:
        evidence: folder with the verdict and both models' outcomes.
        links: what a page is called to its address (MLflow run, Data Docs).
    """

    spec: RetrainSpec
    created: datetime
    verdict: Verdict
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
        metric_name=metric_name,
        duration=_duration,
        gigabytes=_gigabytes,
        code=_code,
        spoken=views.spoken,
    )
    environment.tests["address"] = _is_address
    verdict = data.verdict
    classify = data.spec.task.kind is TaskKind.CLASSIFY
    return environment.get_template("report.html.j2").render(
        data=data,
        verdict=verdict,
        word=outcome_word(verdict.outcome),
        p_value=p_words(verdict.p_value),
        next_steps=next_steps(verdict, data.registered),
        what_would_change=what_would_change(verdict, data.baseline, data.candidate),
        primary=verdict.metrics[0],
        forest=views.forest(verdict),
        changes=views.changes(data.baseline_outcomes, data.candidate_outcomes, verdict.policy.metric.value),
        classes=views.class_rows(data.baseline, data.candidate) if classify else [],
        confusions=[
            (side, views.confusion(outcomes, data.spec.task.labels))
            for side, outcomes in (("Candidate", data.candidate_outcomes), ("Baseline", data.baseline_outcomes))
        ]
        if classify
        else [],
        fields=[row for row in verdict.metrics if row.metric.startswith("field:")],
        curves=views.curves(data.curves),
        funnel=views.funnel_steps(data.funnel),
    )


def _code(text: str) -> Markup:
    """Escaped text with its `names` set as code."""
    parts = [str(escape(part)) for part in text.split("`")]
    return Markup("".join(f"<code>{part}</code>" if at % 2 else part for at, part in enumerate(parts)))  # noqa: S704 - each part was escaped


def _duration(seconds: float) -> str:
    """Seconds as people say them: 43 s, 7 min 05 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def _is_address(text: str) -> bool:
    """Whether a link may be followed: anything but a web or file address is shown as text."""
    return urlsplit(text).scheme in ("http", "https", "file")
