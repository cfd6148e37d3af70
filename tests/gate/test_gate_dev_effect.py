"""Two models on dev by the gate's own statistics."""

from __future__ import annotations

import pytest

from tasks.contracts.errors import NotComparableError
from tasks.contracts.references import ItemOutcome
from tasks.gate.dev_effect import compare_on_dev
from tasks.gate.statistics import score_interval


def outcomes(scores: list[int]) -> list[ItemOutcome]:
    return [
        ItemOutcome(
            id=f"d{n:03d}", text=f"text {n}", target="t", prediction="p", latency_ms=1.0, prompt_tokens=1,
            output_tokens=1, scores={"exact_match": float(score), "valid_output": 1.0},
        )
        for n, score in enumerate(scores)
    ]  # fmt: skip


def test_the_difference_is_paired_and_its_interval_is_the_gates() -> None:
    before = outcomes([1] * 40 + [0] * 20 + [1] * 2 + [0] * 38)
    after = outcomes([1] * 40 + [1] * 20 + [0] * 2 + [0] * 38)
    first, *others = compare_on_dev(before, after, "exact_match", ())
    assert (first.metric, first.n, first.confidence) == ("exact_match", 100, 0.95)
    assert (first.baseline, first.candidate) == (0.42, 0.60)
    assert first.difference == pytest.approx(0.18)
    interval = score_interval(20, 2, 100, 0.025)
    assert (first.low, first.high) == pytest.approx((interval.low, interval.high))
    assert [one.metric for one in others] == ["valid_output"]
    assert (others[0].low <= 0.0 <= others[0].high, others[0].difference) == (True, 0.0)


def test_other_rows_are_refused() -> None:
    with pytest.raises(NotComparableError, match="do not hold the same items"):
        compare_on_dev(outcomes([1, 0, 1]), outcomes([1, 0]), "exact_match", ())
