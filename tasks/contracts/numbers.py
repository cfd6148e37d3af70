"""How numbers are written for people: the same in reasons, tables, reports and the terminal."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal

_METRICS = {"exact_match": "Exact match", "valid_output": "Valid output", "macro_f1": "Macro-F1"}


def metric_name(metric: str) -> str:
    """A metric as people call it: `exact_match` is "Exact match", `field:currency` is "Field: currency"."""
    if metric.startswith("field:"):
        return f"Field: {metric.removeprefix('field:')}"
    return _METRICS.get(metric, metric.replace("_", " ").capitalize())


def percent(share: float) -> str:
    """A share of one: `0.785` is "78.5 %"."""
    return f"{_tenths(share)} %"


def points(difference: float) -> str:
    """A difference of shares in percentage points with its sign: `0.373` is "+37.3", `-0.02` is "−2.0"."""
    tenths = _tenths(difference)
    return "0.0" if tenths == 0 else f"{tenths:+}".replace("-", "−")


def p_words(p_value: float) -> str:
    """A p-value: "p = 0.031", "p < 0.0001"."""
    if p_value < 0.0001:
        return "p < 0.0001"
    return f"p = {p_value:.4f}" if p_value < 0.01 else f"p = {p_value:.3f}"


def _tenths(share: float) -> Decimal:
    """Percent to one decimal, halves away from zero, as people round: 331 of 400 is 82.8, 121 of 400 is 30.3."""
    return Decimal(repr(round(100 * share, 9))).quantize(Decimal("0.1"), ROUND_HALF_UP)
