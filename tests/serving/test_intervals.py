"""The closed forms are the gate's, word for word: two rooms, one formula."""

from __future__ import annotations

import pytest

from tasks.gate import statistics as gate
from tasks.serving import intervals


@pytest.mark.parametrize("alpha", [0.025, 0.001])
@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (0, 40), (7, 40), (40, 40), (999, 1000)])
def test_intervals_of_a_share_are_the_gates(successes: int, n: int, alpha: float) -> None:
    assert intervals.share_interval(successes, n, alpha) == gate.share_interval(successes, n, alpha)
    assert intervals.exact_share_interval(successes, n, alpha) == gate.exact_share_interval(successes, n, alpha)


def test_of_nothing_counted_nothing_is_known() -> None:
    assert intervals.share_interval(0, 0, 0.025) == (0.0, 1.0)


@pytest.mark.parametrize("p_values", [[], [0.04], [0.001, 0.02, 0.04], [0.5, 0.0001, 0.5], [0.03, 0.03]])
def test_holms_levels_are_the_gates(p_values: list[float]) -> None:
    assert intervals.holm_levels(p_values, 0.05) == gate.holm_levels(p_values, 0.05)
    assert intervals.POWER == gate.POWER
