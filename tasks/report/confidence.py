"""What dev has shown of the candidate's confidence: figures for the report, and words for the page of the run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from tasks.contracts.confidence import CoveragePoint, LearntTrust, Reliability, ReviewThreshold
from tasks.contracts.numbers import level, p_words, percent
from tasks.report.views import Scale, Tick, scale

_FEW = 20  # answers above a threshold, below which its accuracy is luck, and is not drawn


class Whisker(NamedTuple):
    """A mark on a chart of 100 by 100, y downwards, with its interval from `top` down over `height`."""

    left: float
    at: float
    top: float
    height: float
    title: str


class Diagram(NamedTuple):
    """A reliability diagram: a mark for each bin, and the line on which confidence is accuracy."""

    name: str
    marks: list[Whisker]
    ideal: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    spoken: str


class Coverage(NamedTuple):
    """Accuracy over the share of answers that are trusted; `chosen` is where the threshold is."""

    line: str
    target: float
    chosen: Whisker | None
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    spoken: str


class Measure(NamedTuple):
    """One measure of how good confidences are, as the model gives them and calibrated."""

    name: str
    before: str
    after: str


class ConfidenceView(NamedTuple):
    """The section of the report; `facts` are numbers with what they are, `diagrams` and `coverage` may be missing."""

    headline: str
    facts: list[tuple[str, str]]
    sayings: list[str]
    diagrams: list[Diagram]
    measures: list[Measure]
    coverage: Coverage | None


def confidence_view(learnt: LearntTrust) -> ConfidenceView:
    """What the report shows of it."""
    calibration, threshold = learnt.calibration, learnt.threshold
    diagrams: list[Diagram] = []
    measures: list[Measure] = []
    if calibration is not None:
        before, after = calibration.before, calibration.after
        axis = _axis(before, after)
        diagrams = [_diagram("As the model gives it", before, axis), _diagram("Calibrated", after, axis)]
        measures = _measures(before, after)
    return ConfidenceView(
        headline=headline(threshold),
        facts=_facts(learnt),
        sayings=[*_sayings(learnt), *([_PROMISE] if threshold.at is not None else [])],
        diagrams=diagrams,
        measures=measures,
        coverage=_coverage(threshold),
    )


def confidence_lines(learnt: LearntTrust) -> list[str]:
    """The same in short, as Markdown for the page of the run."""
    return [f"**Confidence.** {' '.join([headline(learnt.threshold), *_sayings(learnt)])}", ""]


def headline(threshold: ReviewThreshold) -> str:
    """From where on answers are trusted, and what that costs people, in a sentence or two."""
    if threshold.at is None:
        return "Every answer goes to review."
    expected, fewest, most = threshold.reviews_per_thousand
    return (
        f"Answers that the model is at least {threshold.at:.6g} sure of need no review: that is "
        f"{percent(threshold.coverage)} of them. Of 1,000 requests about {expected:,.0f} go to review "
        f"(95 % interval {fewest:,.0f} to {most:,.0f})."
    )


_PROMISE = (
    "This holds for requests like the dev rows, drawn one by one. Training stopped where dev loss was lowest, so dev "
    "is a little kinder to the model than new requests are; and where requests change, all of it has to be learnt anew."
)


def _sayings(learnt: LearntTrust) -> list[str]:
    """What was and what was not learnt."""
    threshold = learnt.threshold
    said = list(learnt.why)
    if threshold.at is not None and threshold.accuracy is not None:
        trusted = next(point for point in threshold.curve if point.at == threshold.at)
        said[said.index(threshold.why)] = (
            f"Of {threshold.rows:,} dev rows {trusted.rows:,} are above the threshold, and {trusted.right:,} of these "
            f"are right ({percent(threshold.accuracy)}). That their accuracy is at least "
            f"{percent(threshold.target_accuracy)} is shown, with a chance of error of {level(threshold.alpha)}."
        )
    return said


def _facts(learnt: LearntTrust) -> list[tuple[str, str]]:
    calibration, threshold = learnt.calibration, learnt.threshold
    expected, fewest, most = threshold.reviews_per_thousand
    if threshold.at is None:
        facts = [("1,000", "of 1,000 requests go to review")]
        if threshold.more_rows is not None:
            facts.append((f"about {threshold.more_rows:,}", "more dev rows would show a threshold"))
    else:
        facts = [
            (f"{expected:,.0f}", f"of 1,000 requests go to review ({fewest:,.0f} to {most:,.0f})"),
            (f"{threshold.at:.6g}", "from this confidence on, as the model gives it, an answer is trusted"),
            (
                percent(threshold.accuracy or 0.0),
                f"of the trusted answers on dev are right; {percent(threshold.target_accuracy)} were asked for",
            ),
        ]
    if calibration is not None:
        low, high = calibration.temperature_low, calibration.temperature_high
        facts.append((f"{calibration.temperature:.2f}", f"temperature (95 % interval {low:.2f} to {high:.2f})"))
    return facts


# -- figures ------------------------------------------------------------------------------------------------------


def _axis(*both: Reliability) -> Scale:
    """One scale for confidence and accuracy, and the same one for both diagrams, so that they can be compared."""
    bins = [one for side in both for one in side.bins]
    return _up_to_one(value for one in bins for value in (one.confidence, one.accuracy_low))


def _up_to_one(values: Iterable[float]) -> Scale:
    found = scale([min([*values, 0.95]), 1.0], 5)
    return found._replace(low=max(found.low, 0.0))


def _diagram(name: str, side: Reliability, axis: Scale) -> Diagram:
    marks = [
        _whisker(
            axis.at(one.confidence), one.accuracy, one.accuracy_low, one.accuracy_high, axis,
            f"{one.rows:,} answers, {percent(one.confidence)} sure on average, {percent(one.accuracy)} right",
        )
        for one in side.bins
    ]  # fmt: skip
    return Diagram(
        name=name,
        marks=marks,
        ideal="0,100 100,0",
        x_ticks=_ticks(axis),
        y_ticks=[Tick(round(100 - tick.at, 3), tick.text) for tick in _ticks(axis)],
        spoken=f"{name}: {percent(side.confidence)} sure on average, {percent(side.accuracy)} right; "
        f"calibration error {percent(side.ece)}, {percent(side.ece_by_chance)} by chance",
    )


def _measures(before: Reliability, after: Reliability) -> list[Measure]:
    def row(name: str, value: str) -> Measure:
        sides = [getattr(side, value) for side in (before, after)]
        return Measure(name, *(f"{side:.3f}" if value in ("brier", "log_loss") else percent(side) for side in sides))

    return [
        row("Mean confidence", "confidence"),
        row("Accuracy", "accuracy"),
        row("Calibration error (ECE)", "ece"),
        row("of it by chance, if confidences were perfect", "ece_by_chance"),
        Measure("so large by chance alone", p_words(before.ece_p_value), p_words(after.ece_p_value)),
        row("Brier score", "brier"),
        row("Log loss", "log_loss"),
    ]


def _coverage(threshold: ReviewThreshold) -> Coverage | None:
    drawn = [point for point in threshold.curve if point.rows >= min(_FEW, threshold.rows) and point.rows]
    if not drawn:
        return None
    chosen = next((point for point in threshold.curve if point.at == threshold.at), None)
    seen = [point.right / point.rows for point in drawn]
    lowest = [chosen.accuracy_low] if chosen is not None else []
    y, x = _up_to_one([*seen, *lowest, threshold.target_accuracy]), Scale(0.0, 1.0, 0.2)
    places = sorted({(x.at(point.coverage), round(100 - y.at(point.right / point.rows), 2)) for point in drawn})
    return Coverage(
        line=" ".join(f"{left},{top}" for left, top in places),
        target=round(100 - y.at(threshold.target_accuracy), 3),
        chosen=_chosen(chosen, x, y),
        x_ticks=_ticks(x),
        y_ticks=[Tick(round(100 - tick.at, 3), tick.text) for tick in _ticks(y)],
        spoken="Accuracy of the trusted answers over their share; "
        + (headline(threshold) if chosen is not None else "no threshold reaches the target"),
    )


def _chosen(point: CoveragePoint | None, x: Scale, y: Scale) -> Whisker | None:
    if point is None or not point.rows:
        return None
    accuracy = point.right / point.rows
    title = (
        f"threshold {point.at:.6g}: {percent(point.coverage)} trusted, {percent(accuracy)} of them right, at least "
        f"{percent(point.accuracy_low)}"
    )
    return _whisker(x.at(point.coverage), accuracy, point.accuracy_low, accuracy, y, title)


def _whisker(left: float, value: float, low: float, high: float, axis: Scale, title: str) -> Whisker:
    def down(place: float) -> float:
        return round(min(max(100 - axis.at(place), 0.0), 100.0), 3)

    return Whisker(left, down(value), down(high), round(down(low) - down(high), 3), title)


def _ticks(axis: Scale) -> list[Tick]:
    digits = max(0, -math.floor(math.log10(100 * axis.step) + 1e-9))
    return [Tick(axis.at(value), f"{100 * value:.{digits}f} %") for value in axis.values() if value <= 1 + 1e-9]
