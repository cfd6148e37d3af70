"""How numbers are written for people: the same in reasons, tables, reports and the terminal."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from decimal import ROUND_HALF_UP, Decimal

_METRICS = {
    "exact_match": "Exact match",
    "valid_output": "Valid output",
    "macro_f1": "Macro-F1",
    "latency_ms": "Latency",
}


def metric_name(metric: str) -> str:
    """A metric as people call it: `exact_match` is "Exact match", `field:currency` is "Field: currency"."""
    if metric.startswith("field:"):
        return f"Field: {metric.removeprefix('field:')}"
    if metric.startswith("call:"):
        return f"Call: {metric.removeprefix('call:')}"
    return _METRICS.get(metric, metric.replace("_", " ").capitalize())


def place(slice: str | None, suite: str | None) -> str:
    """Which items a number is about: "slice phone", "suite arithmetic", or "" for the whole golden set."""
    if suite is not None:
        return f"suite {suite}"
    return "" if slice is None else f"slice {slice}"


def subject(metric: str, slice: str | None = None, suite: str | None = None) -> str:
    """A metric and which items it is about: "Exact match", "Exact match, slice phone"."""
    where = place(slice, suite)
    return f"{metric_name(metric)}, {where}" if where else metric_name(metric)


def items(n: int, groups: int) -> str:
    """How much a number rests on: "300 items", "300 items in 120 groups"."""
    counted = f"{n:,} item{'' if n == 1 else 's'}"
    return counted if groups >= n else f"{counted} in {groups:,} group{'' if groups == 1 else 's'}"


def percent(share: float) -> str:
    """A share of one: `0.785` is "78.5 %"."""
    return f"{_tenths(share)} %"


def points(difference: float) -> str:
    """A difference of shares in percentage points with its sign: `0.373` is "+37.3", `-0.02` is "−2.0"."""
    tenths = _tenths(difference)
    return "0.0" if tenths == 0 else f"{tenths:+}".replace("-", "−")


def ratio(value: float) -> str:
    """Candidate over baseline: `0.8` is "0.80 ×", `0.0123` is "0.012 ×"."""
    if not math.isfinite(value):
        return "∞ ×"
    return f"{value:.3f} ×" if 0 < value < 0.1 else f"{value:.2f} ×"


def level(share: float) -> str:
    """An error level, to three digits: `0.05` is "5 %", `0.018512` is "1.85 %"."""
    if 0 < share < 1e-5:
        return "below 0.001 %"
    return f"{100 * share:.3g} %"


def p_words(p_value: float) -> str:
    """A p-value: "p = 0.031", "p < 0.0001"."""
    if p_value < 0.0001:
        return "p < 0.0001"
    return f"p = {p_value:.4f}" if p_value < 0.01 else f"p = {p_value:.3f}"


def moment(at: datetime) -> str:
    """A time: "22 November 2026, 14:57 UTC". One without a zone is taken as UTC."""
    utc = at.astimezone(UTC) if at.tzinfo else at
    return f"{utc.day} {utc:%B %Y, %H:%M} UTC"


def _tenths(share: float) -> Decimal:
    """Percent to one decimal, halves away from zero, as people round: 331 of 400 is 82.8, 121 of 400 is 30.3."""
    return Decimal(repr(round(100 * share, 9))).quantize(Decimal("0.1"), ROUND_HALF_UP)
