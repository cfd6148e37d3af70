"""The forest plot: every requirement and every metric as an interval on a scale, in groups. Pure, no markup.

Positions and widths are percentages of the width of the scale that they belong to.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tasks.contracts.numbers import items, metric_name, percent, place, points, ratio
from tasks.contracts.references import Ask, MetricComparison, Requirement, Verdict
from tasks.report.summary import lowest
from tasks.report.views import Scale, Tick, scale
from tasks.report.words import asked, found, interval

MAX_ROWS = 25  # of slices that nothing is asked of; those with the lowest differences

_DIFFERENCES = (Ask.SUPERIOR, Ask.NON_INFERIOR)
_OWN_TICKS = 2  # a small scale has room for about so many


class Mark(NamedTuple):
    """An interval on a scale: the bar from `left`, the dot, the limit that is asked for, the line of no difference.

    `cut_low` and `cut_high` say that the interval goes on beyond the scale. `own` marks a scale that is not the common
    one of points; its `ticks` are then its own.
    """

    left: float
    width: float
    dot: float
    limit: float | None
    origin: float | None
    ticks: list[Tick]
    cut_low: bool
    cut_high: bool
    own: bool


class ForestRow(NamedTuple):
    """A requirement, or a metric for information (`asked` and `status` are then "").

    `status` is shown, failed or open; `word` says it, or where the interval of a metric for information lies.
    """

    name: str
    where: str
    asked: str
    size: str
    baseline: str
    baseline_range: str
    candidate: str
    candidate_range: str
    found: str
    interval: str
    status: str
    word: str
    decides: bool
    mark: Mark


class ForestGroup(NamedTuple):
    """Rows under a heading; `left_out` counts rows beyond `MAX_ROWS`."""

    title: str
    rows: list[ForestRow]
    left_out: int = 0


class Forest(NamedTuple):
    """All rows, and the ticks of the common scale of points."""

    ticks: list[Tick]
    groups: list[ForestGroup]


def forest(verdict: Verdict) -> Forest:
    """Requirements against their limits, then what was measured beside them, on one scale of points.

    Fields have a table of their own; they are here where something is asked of them.
    """
    required = {_key(one) for one in verdict.requirements if one.ask in _DIFFERENCES}
    rest = [row for row in verdict.metrics if _key(row) not in required]
    slices = [row for row in rest if row.slice is not None]
    suites = [row for row in rest if row.suite is not None]
    others = [row for row in rest if _is_whole(row) and not row.metric.startswith("field:")]
    shown = lowest(slices, MAX_ROWS)
    axis = _common(verdict, others, [*shown, *suites])

    def asked_rows(decides: bool) -> list[ForestRow]:
        return [_asked_row(one, verdict, axis) for one in verdict.requirements if one.decides is decides]

    def told(rows: Iterable[MetricComparison]) -> list[ForestRow]:
        return [_told_row(row, verdict, axis) for row in rows]

    groups = [
        ForestGroup("What decides", asked_rows(True)),
        ForestGroup("Guards", asked_rows(False)),
        ForestGroup("Slices (for information)", told(shown), len(slices) - len(shown)),
        ForestGroup("Other metrics (for information)", told(others)),
        ForestGroup("Suites (for information)", told(suites)),
    ]
    return Forest(_points_ticks(axis), [group for group in groups if group.rows])


def alone(requirement: Requirement) -> Mark:
    """A requirement on a scale of its own, as large as it takes."""
    if requirement.ask in _DIFFERENCES:
        axis = scale([*_finite(requirement.low, requirement.high), requirement.limit, 0.0])
        return _mark(requirement.estimate, requirement.low, requirement.high, axis, requirement.limit, 0.0)._replace(
            ticks=_points_ticks(axis)
        )
    return _own(requirement, 4)


def primary_values(verdict: Verdict) -> MetricComparison | None:
    """Both models' values of the deciding requirement's metric, if they were compared."""
    return _values_of(verdict.requirements[0], verdict)


# -- scales -------------------------------------------------------------------------------------------------------


def _common(verdict: Verdict, others: Sequence[MetricComparison], parts: Sequence[MetricComparison]) -> Scale:
    """The scale of points: as wide as what is asked and the whole golden set need.

    Slices can be small and their intervals wide; they may double it and are cut beyond that, or one slice of five items
    would press everything else together.
    """
    core = [0.0]
    for one in verdict.requirements:
        if one.ask in _DIFFERENCES:
            core += [one.low, one.high, one.limit]
    for row in others:
        core += [row.low, row.high]
    low, high = min(core), max(core)
    room = (high - low) / 2
    ends = [end for row in parts for end in (row.low, row.high)]
    return scale([max(min([low, *ends]), low - room), min(max([high, *ends]), high + room)], 6)


def _mark(value: float, low: float, high: float, axis: Scale, limit: float | None, origin: float | None) -> Mark:
    def at(place: float) -> float:
        return min(max(axis.at(place), 0.0), 100.0) if math.isfinite(place) else math.copysign(50.0, place) + 50.0

    left = at(low)
    return Mark(
        left=left,
        width=round(at(high) - left, 3),
        dot=at(value),
        limit=None if limit is None else at(limit),
        origin=None if origin is None else at(origin),
        ticks=[],
        cut_low=low < axis.low - 1e-9,
        cut_high=high > axis.high + 1e-9,
        own=False,
    )


def _own(one: Requirement, ticks: int) -> Mark:
    """A floor or a ratio on a small scale of its own; a ratio has a line at 1, where nothing changes."""
    origin = 1.0 if one.ask is Ask.RATIO else None
    axis = scale([*_finite(one.low, one.high, one.estimate), one.limit, *([origin] if origin else [])], ticks)
    words = ratio if one.ask is Ask.RATIO else percent
    return _mark(one.estimate, one.low, one.high, axis, one.limit, origin)._replace(
        ticks=[Tick(axis.at(value), words(value).replace(".0 %", " %")) for value in axis.values()], own=True
    )


def _points_ticks(axis: Scale) -> list[Tick]:
    return [Tick(axis.at(value), points(value).removesuffix(".0")) for value in axis.values()]


def _finite(*values: float) -> list[float]:
    return [value for value in values if math.isfinite(value)]


# -- rows ---------------------------------------------------------------------------------------------------------


def _asked_row(one: Requirement, verdict: Verdict, axis: Scale) -> ForestRow:
    values = _values_of(one, verdict)
    if one.ask in _DIFFERENCES:
        mark = _mark(one.estimate, one.low, one.high, axis, one.limit, 0.0)
    else:
        mark = _own(one, _OWN_TICKS)
    return ForestRow(
        name=metric_name(one.metric),
        where=place(one.slice, one.suite),
        asked=asked(one),
        size=items(one.n, one.groups),
        baseline=percent(values.baseline) if values else "",
        baseline_range=_range(values.baseline_low, values.baseline_high) if values else "",
        candidate=percent(values.candidate) if values else "",
        candidate_range=_range(values.candidate_low, values.candidate_high) if values else "",
        found=found(one),
        interval=interval(one),
        status=one.status.value,
        word=one.status.value,
        decides=one.decides,
        mark=mark,
    )


def _told_row(row: MetricComparison, verdict: Verdict, axis: Scale) -> ForestRow:
    return ForestRow(
        name=metric_name(row.metric),
        where=place(row.slice, row.suite),
        asked="",
        size=items(row.n, verdict.groups if _is_whole(row) else row.n),  # of parts, nobody says the groups
        baseline=percent(row.baseline),
        baseline_range=_range(row.baseline_low, row.baseline_high),
        candidate=percent(row.candidate),
        candidate_range=_range(row.candidate_low, row.candidate_high),
        found=points(row.difference),
        interval=f"{points(row.low)} to {points(row.high)}",
        status="",
        word="above 0" if row.low > 0 else "below 0" if row.high < 0 else "not told apart",
        decides=False,
        mark=_mark(row.difference, row.low, row.high, axis, None, 0.0),
    )


def _values_of(one: Requirement, verdict: Verdict) -> MetricComparison | None:
    return next((row for row in verdict.metrics if _key(row) == _key(one)), None)


def _key(one: Requirement | MetricComparison) -> tuple[str, str | None, str | None]:
    return one.metric, one.slice, one.suite


def _is_whole(row: MetricComparison) -> bool:
    return row.slice is None and row.suite is None


def _range(low: float, high: float) -> str:
    return f"{100 * low:.1f} – {100 * high:.1f}"
