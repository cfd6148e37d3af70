"""What the report shows, worked out from outcomes and counts: scales, rows and positions. Pure, no markup.

Positions and widths are percentages of the width of the chart that they belong to.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tasks.contracts.numbers import points
from tasks.contracts.references import ClassScore, EvaluationSummary, ItemOutcome

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
    """An item on which one model does better; `start` is what a folded long text shows, "" for a short one.

    `before_score` and `after_score` are "" for a metric of right or wrong. `tied_to` names slice and group, if any.
    """

    id: str
    target: str
    before: str
    after: str
    before_score: str
    after_score: str
    tied_to: str
    text: str
    start: str


class Changes(NamedTuple):
    """How the two models' items go together: `gained` the candidate does better, `lost` the baseline.

    `same` holds what the others are called and how many there are; `words` what gained and lost are called.
    """

    metric: str
    words: tuple[str, str]
    gained: list[ChangedItem]
    lost: list[ChangedItem]
    same: list[tuple[str, int]]


def changes(baseline: Sequence[ItemOutcome], candidate: Sequence[ItemOutcome], metric: str) -> Changes:
    """The items on which the deciding metric went up (gained) and down (lost), the largest change first.

    Macro-F1 has no score of an item; there an item counts by whether its answer is right.
    """
    scored = metric if metric in baseline[0].scores else "exact_match"
    after = {outcome.id: outcome for outcome in candidate}
    pairs = [(before, after[before.id], before.scores[scored], after[before.id].scores[scored]) for before in baseline]
    graded = any(score not in (0.0, 1.0) for *_, first, second in pairs for score in (first, second))
    ordered = sorted(pairs, key=lambda pair: (-abs(pair[3] - pair[2]), pair[0].target, pair[0].id))
    kept = Counter(first for *_, first, second in pairs if first == second)
    if graded:
        same = [("score the same in both", kept.total())]
    elif scored == "exact_match":
        same = [("right in both", kept[1.0]), ("wrong in both", kept[0.0])]
    else:
        same = [("score 1 in both", kept[1.0]), ("score 0 in both", kept[0.0])]
    return Changes(
        metric=scored,
        words=("from wrong to right", "from right to wrong") if scored == "exact_match" and not graded
        else ("score higher in the candidate", "score lower in the candidate"),
        gained=[_changed(*pair, graded) for pair in ordered if pair[3] > pair[2]],
        lost=[_changed(*pair, graded) for pair in ordered if pair[3] < pair[2]],
        same=same,
    )  # fmt: skip


def _changed(before: ItemOutcome, after: ItemOutcome, first: float, second: float, graded: bool) -> ChangedItem:
    tied_to = [
        f"{name} {value}" for name, value in (("slice", before.slice), ("group", before.group)) if value is not None
    ]
    return ChangedItem(
        id=before.id,
        target=before.target,
        before=before.prediction,
        after=after.prediction,
        before_score=f"{first:.2f}" if graded else "",
        after_score=f"{second:.2f}" if graded else "",
        tied_to=", ".join(tied_to),
        text=before.text,
        start=before.text[: LONG_TEXT // 2].rstrip() if len(before.text) > LONG_TEXT else "",
    )


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
