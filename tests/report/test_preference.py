"""What is said of the preference stage."""

from __future__ import annotations

import pytest

from tasks.contracts.prefer import DevEffect
from tasks.contracts.references import MetricComparison
from tasks.report.preference import effect_of, effect_sentence


def row(low: float, high: float, difference: float = 0.05) -> MetricComparison:
    return MetricComparison(
        metric="exact_match", baseline=0.4, baseline_low=0.3, baseline_high=0.5, candidate=0.4 + difference,
        candidate_low=0.3, candidate_high=0.6, difference=difference, low=low, high=high, confidence=0.95,
        method="any", n=1200,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("low", "high", "effect"),
    [
        (0.01, 0.09, DevEffect.GAIN),
        (0.0, 0.1, DevEffect.NONE_SHOWN),
        (-0.01, 0.09, DevEffect.NONE_SHOWN),
        (-0.1, 0.0, DevEffect.NONE_SHOWN),
        (-0.1, -0.01, DevEffect.LOSS),
    ],
)
def test_only_an_interval_on_one_side_of_zero_shows_something(low: float, high: float, effect: DevEffect) -> None:
    assert effect_of(row(low, high)) is effect


@pytest.mark.parametrize(
    ("low", "ending"), [(0.011, "1.1 to +9.0): a gain."), (-0.011, "−1.1 to +9.0): no difference shown.")]
)
def test_the_sentence_has_both_values_the_difference_and_the_interval(low: float, ending: str) -> None:
    said = effect_sentence(row(low, 0.09))
    assert said.startswith(
        "Exact match on 1,200 held-out dev rows: 40.0 % before, 45.0 % after: +5.0 points (95 % interval "
    )
    assert said.endswith(ending)
