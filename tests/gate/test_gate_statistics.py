"""The formulas against numbers worked out by hand or published."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tasks.gate.statistics import (
    Interval,
    bootstrap_macro_f1,
    bootstrap_means,
    exact_p,
    items_needed,
    paired_interval,
    score_interval,
    score_statistic,
    share_interval,
    smallest_effect,
)


@pytest.mark.parametrize(
    ("wins", "losses", "expected"),
    [
        (0, 0, 1.0),
        (1, 0, 1 / 2),
        (5, 0, 1 / 32),
        (0, 5, 1.0),
        (4, 1, 6 / 32),
        (7, 1, 9 / 256),
        (1, 7, 255 / 256),
        (3, 3, 42 / 64),
        (10, 2, 79 / 4096),
    ],
)
def test_exact_p_is_the_binomial_tail_counted_by_hand(wins: int, losses: int, expected: float) -> None:
    assert exact_p(wins, losses) == pytest.approx(expected, rel=1e-12)


def test_score_interval_is_the_published_one() -> None:
    # Airway hyper-responsiveness before and after transplantation, 21 children, 1 against 7 discordant pairs:
    # Fagerland, Lydersen & Laake, Statistics in Medicine 33 (2014) 2850-2875, give -0.517 to -0.026 for Tango's.
    low, high = score_interval(1, 7, 21, 0.025)
    assert (round(low, 3), round(high, 3)) == (-0.517, -0.026)


def test_score_interval_without_discordant_items_is_z_squared_over_n_plus_z_squared() -> None:
    z = 1.6448536269514722
    low, high = score_interval(0, 0, 400, 0.05)
    assert high == pytest.approx(z**2 / (400 + z**2), abs=1e-8)
    assert low == pytest.approx(-high, abs=1e-8)


def test_score_statistic_at_zero_is_mcnemars() -> None:
    assert score_statistic(30, 12, 200, 0.0) == pytest.approx((30 - 12) / math.sqrt(30 + 12))


@pytest.mark.parametrize(
    ("wins", "losses", "n"), [(0, 0, 2), (2, 0, 2), (0, 2, 2), (1, 1, 2), (400, 0, 400), (37, 12, 400), (3, 90, 100)]
)
@pytest.mark.parametrize("alpha", [0.5, 0.1, 0.05, 0.001])
def test_interval_holds_the_difference_and_mirrors(wins: int, losses: int, n: int, alpha: float) -> None:
    interval = paired_interval(wins, losses, n, alpha)
    assert -1 <= interval.low <= (wins - losses) / n + 1e-9
    assert (wins - losses) / n - 1e-9 <= interval.high <= 1
    mirrored = paired_interval(losses, wins, n, alpha)
    assert (mirrored.low, mirrored.high) == pytest.approx((-interval.high, -interval.low), abs=1e-8)


def test_interval_takes_zero_in_until_the_exact_test_excludes_it() -> None:
    # 7 against 1: the score test alone excludes 0 at 2.5 %, the exact test (p = 0.035) does not.
    assert score_interval(7, 1, 21, 0.025).low > 0
    assert paired_interval(7, 1, 21, 0.025).low == 0
    assert paired_interval(7, 1, 21, 0.05).low > 0


def test_share_interval_is_wilsons() -> None:
    low, high = share_interval(10, 100, 0.025)
    assert (round(low, 4), round(high, 4)) == (0.0552, 0.1744)


def test_items_needed_is_connors_formula() -> None:
    # psi 0.2, difference 0.1, alpha 0.05 one-sided, power 0.8:
    # (1.6449 * sqrt(0.2) + 0.8416 * sqrt(0.2 - 0.01))^2 / 0.01 = (0.73561 + 0.36685)^2 / 0.01 = 121.54
    assert items_needed(0.1, 0.2, 0.0, 0.05) == 122


@pytest.mark.parametrize("margin", [0.0, 0.02, 0.1])
@pytest.mark.parametrize("discordance", [0.0, 0.05, 0.4])
def test_smallest_effect_and_items_needed_are_inverse(margin: float, discordance: float) -> None:
    effect = smallest_effect(400, discordance, margin, 0.05)
    assert effect is not None
    assert effect > margin
    assert abs(items_needed(effect, discordance, margin, 0.05) - 400) <= 1


def test_two_items_show_nothing() -> None:
    assert smallest_effect(2, 0.5, 0.0, 0.05) is None


def test_planned_number_of_items_has_the_power_it_promises() -> None:
    n = items_needed(0.08, 0.3, 0.0, 0.05)
    counts = np.random.default_rng(1).multinomial(n, [0.19, 0.11, 0.7], size=1500)
    shown = np.mean([exact_p(int(wins), int(losses)) < 0.05 for wins, losses, _ in counts])
    assert 0.74 < shown < 0.86  # the exact test gives a little of the planned 0.80 away


def test_bootstrap_of_means_finds_the_normal_interval() -> None:
    rng = np.random.default_rng(3)
    baseline = rng.uniform(size=500)
    candidate = np.clip(baseline + rng.normal(0.05, 0.2, size=500), 0, 1)
    estimate = bootstrap_means(baseline, candidate, 0.05)
    difference = candidate - baseline
    half = 1.6449 * difference.std(ddof=1) / math.sqrt(500)
    assert estimate.candidate - estimate.baseline == pytest.approx(difference.mean())
    assert estimate.interval == pytest.approx(Interval(difference.mean() - half, difference.mean() + half), abs=0.002)


def test_macro_f1_is_that_of_scikit_learn() -> None:
    from sklearn.metrics import f1_score

    rng = np.random.default_rng(4)
    targets, baseline, candidate = (rng.integers(0, 4, size=200) for _ in range(3))
    candidate = np.where(rng.uniform(size=200) < 0.6, targets, candidate)
    candidate[:5] = -1
    estimate = bootstrap_macro_f1(targets, baseline, candidate, 4, 0.05)
    for found, answers in ((estimate.baseline, baseline), (estimate.candidate, candidate)):
        expected = f1_score(targets, answers, labels=range(4), average="macro", zero_division=0)
        assert found == pytest.approx(expected)
    assert estimate.interval.low < estimate.candidate - estimate.baseline < estimate.interval.high
    assert estimate == bootstrap_macro_f1(targets, baseline, candidate, 4, 0.05)


def test_large_sets_are_resampled_in_pieces_with_the_same_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    baseline = np.random.default_rng(6).uniform(size=300)
    candidate = np.random.default_rng(7).uniform(size=300)
    whole = bootstrap_means(baseline, candidate, 0.05)
    monkeypatch.setattr("tasks.gate.statistics._CELLS", 7 * 300)
    pieces = bootstrap_means(baseline, candidate, 0.05)
    assert (pieces.baseline, pieces.candidate) == (whole.baseline, whole.candidate)
    assert pieces.interval == pytest.approx(whole.interval, abs=0.003)
