"""What the report shows, worked out from outcomes and counts: scales, rows and positions. Pure, no markup.

Positions and widths are percentages of the width of the chart that they belong to.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tasks.contracts.numbers import metric_name, percent, points
from tasks.contracts.references import ClassScore, EvaluationSummary, ItemOutcome, MetricComparison, Verdict

MAX_MATRIX = 15  # classes; a larger matrix cannot be read, so its largest cells are listed instead
MAX_QUARANTINE = 50  # refused rows that are shown; all of them are in the quarantine file
LONG_TEXT = 700  # characters; a longer text is folded
NO_CLASS = "(no class)"


# -- scales -------------------------------------------------------------------------------------------------------


class Tick(NamedTuple):
    """A mark on an axis: where, and what stands at it."""

    at: float
    text: str


class Scale(NamedTuple):
    """A linear axis from `low` to `high` with ticks at round numbers."""

    low: float
    high: float
    step: float

    def at(self, value: float) -> float:
        """Where a value lies, in percent of the axis."""
        return round(100 * (value - self.low) / (self.high - self.low), 3)

    def values(self) -> list[float]:
        """The round numbers on the axis."""
        count = round((self.high - self.low) / self.step)
        return [self.low + index * self.step for index in range(count + 1)]


def scale(values: Sequence[float], ticks: int = 5) -> Scale:
    """A scale with round ends that holds all values, with about so many ticks."""
    low, high = min(values), max(values)
    span = high - low or abs(high) or 1.0
    raw = span / ticks
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw * 0.999)
    bottom, top = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    return Scale(bottom, top if top > bottom else bottom + step, step)


# -- metrics ------------------------------------------------------------------------------------------------------


class MetricView(NamedTuple):
    """A row of the table of metrics, and its interval as a mark on the common scale."""

    name: str
    decides: bool
    baseline: str
    baseline_range: str
    candidate: str
    candidate_range: str
    difference: str
    interval: str
    method: str
    n: int
    direction: str
    left: float
    width: float
    dot: float


class Forest(NamedTuple):
    """All metrics on one scale of percentage points."""

    rows: list[MetricView]
    ticks: list[Tick]
    zero: float
    margin: float | None


def forest(verdict: Verdict) -> Forest:
    """The metrics of a verdict against zero, and against the margin where the policy sets one."""
    margin = verdict.policy.min_improvement
    shown = [row for row in verdict.metrics if not row.metric.startswith("field:")]  # these have a table of their own
    ends = [end for row in shown for end in (row.low, row.high)]
    axis = scale([*ends, 0.0, margin])
    return Forest(
        rows=[_metric_view(row, axis, verdict) for row in shown],
        ticks=[Tick(axis.at(value), points(value).removesuffix(".0")) for value in axis.values()],
        zero=axis.at(0.0),
        margin=axis.at(margin) if margin else None,
    )


def _metric_view(row: MetricComparison, axis: Scale, verdict: Verdict) -> MetricView:
    decides = row.metric == verdict.policy.metric
    bar = verdict.policy.min_improvement if decides else 0.0
    direction = "better" if row.low > bar else "worse" if row.high < bar else "open"
    return MetricView(
        name=metric_name(row.metric),
        decides=decides,
        baseline=percent(row.baseline),
        baseline_range=_range(row.baseline_low, row.baseline_high),
        candidate=percent(row.candidate),
        candidate_range=_range(row.candidate_low, row.candidate_high),
        difference=points(row.difference),
        interval=f"{points(row.low)} to {points(row.high)}",
        method=row.method,
        n=row.n,
        direction=direction,
        left=axis.at(row.low),
        width=round(axis.at(row.high) - axis.at(row.low), 3),
        dot=axis.at(row.difference),
    )


def _range(low: float, high: float) -> str:
    return f"{100 * low:.1f} – {100 * high:.1f}"


# -- classes ------------------------------------------------------------------------------------------------------


class ClassView(NamedTuple):
    """One class in both models, as texts; `left` and `width` span the two F1 values on a scale from 0 to 100."""

    label: str
    support: int
    precision: tuple[str, str]
    recall: tuple[str, str]
    f1: tuple[str, str]
    change: str
    direction: str
    baseline_at: float
    candidate_at: float
    left: float
    width: float


def class_rows(baseline: EvaluationSummary, candidate: EvaluationSummary) -> list[ClassView]:
    """Both models' scores of each class, the most frequent class first."""
    before = {score.label: score for score in baseline.classes}
    rows = sorted(candidate.classes, key=lambda score: (-score.support, score.label))
    return [_class_view(before[score.label], score) for score in rows if score.label in before]


def _class_view(before: ClassScore, after: ClassScore) -> ClassView:
    low, high = sorted((100 * before.f1, 100 * after.f1))
    return ClassView(
        label=after.label,
        support=after.support,
        precision=(_plain(before.precision), _plain(after.precision)),
        recall=(_plain(before.recall), _plain(after.recall)),
        f1=(_plain(before.f1), _plain(after.f1)),
        change=points(after.f1 - before.f1),
        direction="better" if after.f1 > before.f1 else "worse" if after.f1 < before.f1 else "open",
        baseline_at=round(100 * before.f1, 2),
        candidate_at=round(100 * after.f1, 2),
        left=round(low, 2),
        width=round(high - low, 2),
    )


def _plain(share: float) -> str:
    return f"{100 * share:.0f}"


# -- confusion ----------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """How many items of a class got an answer; `shade` is the share of the class in percent."""

    items: int
    shade: float
    right: bool
    title: str


class Confusion(NamedTuple):
    """Wanted classes down, answers across; or, for many classes, the most frequent mistakes alone."""

    answers: list[str]
    rows: list[tuple[str, int, list[Cell]]]
    mistakes: list[tuple[str, str, int]]


def confusion(outcomes: Sequence[ItemOutcome], labels: Sequence[str]) -> Confusion:
    """What each class was taken for. An answer that is no class counts as one of its own."""
    known = set(labels)
    pairs = Counter(
        (outcome.target, outcome.prediction.strip() if outcome.prediction.strip() in known else NO_CLASS)
        for outcome in outcomes
    )
    mistakes = [(target, answer, count) for (target, answer), count in pairs.most_common() if target != answer]
    if len(labels) > MAX_MATRIX:
        return Confusion([], [], mistakes[:30])
    totals = Counter(outcome.target for outcome in outcomes)
    targets = sorted((label for label in labels), key=lambda label: (-totals[label], label))
    answers = [*targets, NO_CLASS] if any(answer == NO_CLASS for _, answer in pairs) else targets
    rows = []
    for target in targets:
        cells = []
        for answer in answers:
            count = pairs[(target, answer)]
            share = 100 * count / totals[target] if totals[target] else 0.0
            title = f"{count} of {totals[target]} {target} answered as {answer}"
            cells.append(Cell(count, round(share, 1), target == answer, title))
        rows.append((target, totals[target], cells))
    return Confusion(answers, rows, [])


# -- items --------------------------------------------------------------------------------------------------------


class ChangedItem(NamedTuple):
    """An item on which the two models differ; `start` is what a folded long text shows, "" for a short one."""

    id: str
    target: str
    before: str
    after: str
    text: str
    start: str


class Changes(NamedTuple):
    """How the two models' right and wrong items go together."""

    both_right: int
    both_wrong: int
    gained: list[ChangedItem]
    lost: list[ChangedItem]


def changes(baseline: Sequence[ItemOutcome], candidate: Sequence[ItemOutcome], metric: str) -> Changes:
    """The items that went from wrong to right (gained) and from right to wrong (lost)."""
    after = {outcome.id: outcome for outcome in candidate}
    counts: Counter[tuple[bool, bool]] = Counter()
    gained: list[ChangedItem] = []
    lost: list[ChangedItem] = []
    for before in baseline:
        pair = (before.scores[metric] == 1.0, after[before.id].scores[metric] == 1.0)
        counts[pair] += 1
        if pair[0] != pair[1]:
            item = ChangedItem(
                id=before.id,
                target=before.target,
                before=before.prediction,
                after=after[before.id].prediction,
                text=before.text,
                start=before.text[: LONG_TEXT // 2].rstrip() if len(before.text) > LONG_TEXT else "",
            )
            (gained if pair[1] else lost).append(item)

    def order(item: ChangedItem) -> tuple[str, str]:
        return item.target, item.id

    return Changes(counts[True, True], counts[False, False], sorted(gained, key=order), sorted(lost, key=order))


# -- curves -------------------------------------------------------------------------------------------------------


class CurvePoint(NamedTuple):
    """What was measured at an optimiser step; losses in nats per answer token."""

    step: int
    loss: float | None = None
    dev_loss: float | None = None
    learning_rate: float | None = None

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> CurvePoint:
        """The point that a line of `curves.jsonl` holds."""
        return cls(record["step"], record.get("loss"), record.get("dev_loss"), record.get("learning_rate"))


class Curves(NamedTuple):
    """Lines of a chart of 100 by 100, y downwards; `dev` holds the points of the dev loss for marks."""

    x_ticks: list[Tick]
    y_ticks: list[Tick]
    loss: str
    dev_line: str
    dev: list[tuple[float, float, str]]
    best: tuple[float, float, str] | None
    learning_rate: str
    peak_rate: str


def curves(recorded: Sequence[CurvePoint]) -> Curves | None:
    """The losses over the steps; None if none was recorded."""
    losses = [(point.step, point.loss) for point in recorded if point.loss is not None and math.isfinite(point.loss)]
    dev = [
        (point.step, point.dev_loss)
        for point in recorded
        if point.dev_loss is not None and math.isfinite(point.dev_loss)
    ]
    rates = [(point.step, point.learning_rate) for point in recorded if point.learning_rate is not None]
    if not losses and not dev:
        return None
    values = [value for _, value in (*losses, *dev)]
    last = max(step for step, _ in (*losses, *dev))
    x, y = Scale(0, last, 1), scale([0.0, *values], 4)
    ticks = scale([0, last], 5)

    def place(step: int, value: float) -> tuple[float, float]:
        return x.at(step), round(100 - y.at(value), 2)

    def line(series: Sequence[tuple[int, float]]) -> str:
        return " ".join("{},{}".format(*place(step, value)) for step, value in series)

    lowest = min(dev, key=lambda point: point[1]) if dev else None
    peak = max((rate for _, rate in rates), default=0.0)
    return Curves(
        x_ticks=[Tick(x.at(value), f"{value:,.0f}") for value in ticks.values() if value <= last],
        y_ticks=[Tick(round(100 - y.at(value), 2), f"{value:.{_decimals(y.step)}f}") for value in y.values()],
        loss=line(losses),
        dev_line=line(dev),
        dev=[(*place(step, value), f"step {step:,}: dev loss {value:.3f}") for step, value in dev],
        best=(*place(*lowest), f"{lowest[1]:.3f} at step {lowest[0]:,}") if lowest else None,
        learning_rate=" ".join(f"{x.at(step)},{round(100 - 100 * rate / peak, 2)}" for step, rate in rates)
        if peak
        else "",
        peak_rate=f"{peak:.1e}",
    )


def _decimals(step: float) -> int:
    return max(
        0,
        -math.floor(math.log10(step) + 1e-9) + (1 if round(step / 10 ** math.floor(math.log10(step)), 6) == 2.5 else 0),
    )


# -- data ---------------------------------------------------------------------------------------------------------


class QuarantinedRow(NamedTuple):
    """A row that was refused: its line in the source, its id, and every reason."""

    line: int
    id: str
    reasons: Sequence[str]


class Funnel(NamedTuple):
    """Counts of rows on their way from the source to the splits.

    `quarantine_reasons` counts reasons by their short name; `quarantine` holds the first refused rows.
    """

    read: int
    quarantined: int
    quarantine_reasons: Mapping[str, int]
    quarantine: Sequence[QuarantinedRow]
    removed: Mapping[str, int]
    train: int
    dev: int


class FunnelStep(NamedTuple):
    """A step of the funnel: what is kept after it, and what it took away."""

    name: str
    kept: int
    taken: int
    kept_width: float
    taken_width: float


def spoken(name: str) -> str:
    """A short name as people read it: `near_duplicate` is "Near duplicate"."""
    return name.replace("_", " ").capitalize()


def funnel_steps(funnel: Funnel) -> list[FunnelStep]:
    """The way of the rows: read, quarantined, each reason of removal, and what was left out by the draw."""
    taken = [("Quarantined", funnel.quarantined)]
    taken += [(spoken(reason), count) for reason, count in funnel.removed.items()]
    undrawn = funnel.read - sum(count for _, count in taken) - funnel.train - funnel.dev
    if undrawn > 0:
        taken.append(("Not drawn", undrawn))
    whole, left = max(funnel.read, 1), funnel.read
    steps = [FunnelStep("Rows read", left, 0, 100.0, 0.0)]
    for name, count in taken:
        left -= count
        steps.append(FunnelStep(name, left, count, round(100 * left / whole, 3), round(100 * count / whole, 3)))
    return steps
