"""The closed forms, against numbers worked out by hand, published, or counted one by one."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binom, multinomial, permutation_test

from tasks.gate.effects import PairedShares
from tasks.gate.statistics import (
    Floats,
    binomial_interval,
    exact_p,
    exact_p_beyond,
    items_needed,
    score_interval,
    score_statistic,
    sign_flip_p,
    smallest_effect,
)
from tasks.statistics import exact_share_interval, holm_levels, share_interval

# -- right or wrong, item by item -----------------------------------------------------------------------------------


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
def test_score_interval_holds_the_difference_and_mirrors(wins: int, losses: int, n: int, alpha: float) -> None:
    interval = score_interval(wins, losses, n, alpha)
    assert -1 <= interval.low <= (wins - losses) / n + 1e-9
    assert (wins - losses) / n - 1e-9 <= interval.high <= 1
    mirrored = score_interval(losses, wins, n, alpha)
    assert (mirrored.low, mirrored.high) == pytest.approx((-interval.high, -interval.low), abs=1e-8)


# -- ... above another limit than 0 ---------------------------------------------------------------------------------


def largest_tail(wins: int, losses: int, n: int, limit: float) -> float:
    """The definition: all outcomes with a score statistic as large, at the worst share of discordant items."""
    seen = score_statistic(wins, losses, n, limit)
    as_large = np.array(
        [
            (w, x, n - w - x)
            for w in range(n + 1)
            for x in range(n + 1 - w)
            if score_statistic(w, x, n, limit) >= seen - 1e-9
        ]
    )
    tails = [
        multinomial.pmf(as_large, n, [(psi + limit) / 2, (psi - limit) / 2, 1 - psi]).sum()
        for psi in np.linspace(abs(limit), 1.0, 200)
    ]
    return float(min(1.0, max(*tails, exact_p(wins, losses) if limit > 0 else 0.0)))


@pytest.mark.parametrize("limit", [-0.3, -0.05, 0.02, 0.1])
@pytest.mark.parametrize(
    ("wins", "losses", "n"),
    [(1, 0, 2), (5, 0, 5), (4, 1, 10), (7, 1, 21), (0, 0, 25), (0, 3, 25), (12, 2, 25), (20, 5, 25)],
)
def test_the_test_beyond_a_limit_is_the_largest_tail_counted_one_by_one(
    wins: int, losses: int, n: int, limit: float
) -> None:
    found, expected = exact_p_beyond(wins, losses, n, limit), largest_tail(wins, losses, n, limit)
    if score_statistic(wins, losses, n, limit) <= 0:
        assert found == 1.0  # the candidate looks no better than the limit, so nothing need be worked out
        assert expected > 0.3
    else:
        assert found == pytest.approx(expected, rel=0.02, abs=1e-9)


def test_at_the_limit_zero_it_is_mcnemars_exact_test() -> None:
    for wins, losses in ((0, 0), (7, 1), (1, 7), (40, 22)):
        assert exact_p_beyond(wins, losses, 100, 0.0) == exact_p(wins, losses)


def first_win_that_promotes(n: int, limit: float, level: float) -> list[int]:
    """For 0..n losses, from how many wins on the difference is shown to be above the limit; n + 1 for never."""
    first, wins = [], 0
    for losses in range(n + 1):  # more losses need more wins, so the search goes on from where it was
        while wins <= n - losses and PairedShares(wins, losses, n).p_above(limit, level) >= level:
            wins += 1
        first.append(wins if wins <= n - losses else n + 1)
    return first


@pytest.mark.parametrize(
    ("n", "limit", "level"),
    [
        (50, -0.05, 0.05), (50, 0.02, 0.05), (50, 0.05, 0.0083), (50, 0.1, 0.05), (50, 0.1, 0.001),
        (150, -0.05, 0.0083), (150, 0.02, 0.05), (150, 0.05, 0.05), (150, 0.1, 0.0083),
        (300, -0.05, 0.05), (300, 0.05, 0.001),
    ],
)  # fmt: skip
def test_at_the_limit_it_promotes_at_most_at_its_level(n: int, limit: float, level: float) -> None:
    """All outcomes that promote, added up exactly, at 400 shares of discordant items."""
    losses = np.arange(n + 1)
    first = np.array(first_win_that_promotes(n, limit, level))
    for psi in np.linspace(abs(limit), 1.0, 400):
        win, lose = (psi + limit) / 2, (psi - limit) / 2
        tail = binom.sf(first - 1, n - losses, win / (1 - lose) if lose < 1 else 0.0)
        promoted = float(np.sum(binom.pmf(losses, n, lose) * np.where(first <= n - losses, tail, 0.0)))
        assert promoted <= level * 1.001, psi
    assert (first <= n - losses).any()  # it can promote at all


def test_more_is_never_shown_more_easily_than_less() -> None:
    # 7 against 1 of 21: McNemar's test says 0.035 of any improvement, so no p-value of more may be below that.
    limits = [-0.2, -0.05, -0.001, 0.0, 0.001, 0.02, 0.05, 0.1, 0.2, 0.3]
    for wins, losses, n in ((7, 1, 21), (5, 0, 100), (30, 12, 400)):
        p_values = [exact_p_beyond(wins, losses, n, limit) for limit in limits]
        assert p_values == sorted(p_values), (wins, losses, n)


def test_tangos_test_alone_would_promote_too_often_just_above_a_limit() -> None:
    # 2 wins and no loss of 100: the score test finds more than 0.001 at 5 %, the exact one does not.
    n, limit, level = 100, 0.001, 0.05
    assert score_interval(2, 0, n, level).low < limit
    assert score_interval(3, 0, n, level).low > limit
    assert exact_p_beyond(3, 0, n, limit) > level


# -- one share ------------------------------------------------------------------------------------------------------


def test_share_interval_is_wilsons() -> None:
    low, high = share_interval(10, 100, 0.025)
    assert (round(low, 4), round(high, 4)) == (0.0552, 0.1744)


@pytest.mark.parametrize(
    ("successes", "n", "alpha", "expected"),
    [
        (0, 10, 0.025, (0.0, 1 - 0.025 ** (1 / 10))),  # by hand: nobody is right with probability (1 - p)^10
        (10, 10, 0.05, (0.05 ** (1 / 10), 1.0)),
        (1, 1, 0.05, (0.05, 1.0)),
        (5, 10, 0.025, (0.1871, 0.8129)),  # Clopper & Pearson's chart, to four digits
        (10, 100, 0.025, (0.0490, 0.1762)),
    ],
)
def test_the_exact_interval_of_a_share(successes: int, n: int, alpha: float, expected: tuple[float, float]) -> None:
    assert exact_share_interval(successes, n, alpha) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("alpha", [0.05, 0.0083, 1.8e-5])
def test_the_exact_interval_of_a_share_ends_where_the_exact_test_does(alpha: float) -> None:
    low, high = exact_share_interval(37, 60, alpha)
    assert binom.sf(36, 60, low) == pytest.approx(alpha)
    assert binom.cdf(37, 60, high) == pytest.approx(alpha)
    assert binomial_interval(37, 60, 1 - 2 * alpha) == pytest.approx((low, high))


# -- sums whose signs may be flipped --------------------------------------------------------------------------------


def share_of_flips(sums: Floats) -> float:
    """The definition, all 2^G flips one by one."""
    signs = np.array(list(itertools.product([1, -1], repeat=len(sums))))
    return float(np.mean(signs @ sums >= sums.sum() - 1e-9))


RNG = np.random.default_rng(12)
SUMS: dict[str, Floats] = {
    "right or wrong": RNG.choice([-1.0, 0.0, 1.0], 12, p=[0.2, 0.2, 0.6]),
    "groups of right or wrong": RNG.integers(-3, 5, 13).astype(float),
    "halves": RNG.integers(-3, 5, 12) / 2,
    "thirds": RNG.integers(-3, 5, 12) / 3,
    "tenths": RNG.integers(-6, 11, 13) / 10,
    "any numbers": RNG.normal(0.3, 1.0, 14),
    "any numbers, nearly all positive": np.abs(RNG.normal(0.3, 1.0, 13)) * np.r_[-0.1, np.ones(12)],
    "one much larger": np.r_[100.0, RNG.normal(0.0, 1.0, 11)],
    "below zero": RNG.normal(-0.7, 1.0, 12),
    "less than a limit": RNG.integers(0, 2, 12) - 0.02 * RNG.integers(1, 4, 12),
}


@pytest.mark.parametrize("name", SUMS)
def test_sign_flips_are_counted_exactly_where_there_are_few(name: str) -> None:
    sums = SUMS[name]
    expected = share_of_flips(sums)
    counted = name in ("right or wrong", "groups of right or wrong", "halves", "thirds", "tenths")
    # The saddlepoint has no gaps between totals, which with a dozen groups are 1 or 2 % of all flips wide.
    assert sign_flip_p(sums) == pytest.approx(expected, rel=1e-9 if counted else 0.06, abs=0.0 if counted else 0.01)


def test_for_right_or_wrong_sign_flips_are_mcnemars_test() -> None:
    for wins, losses, ties in ((7, 1, 3), (0, 4, 1), (30, 12, 200), (900, 800, 10)):
        sums = np.r_[np.ones(wins), -np.ones(losses), np.zeros(ties)]
        assert sign_flip_p(sums) == pytest.approx(exact_p(wins, losses), rel=1e-9)


@pytest.mark.parametrize("number", range(6))
def test_for_any_numbers_sign_flips_are_a_permutation_test(number: int) -> None:
    rng = np.random.default_rng(number)
    size = (25, 60, 200)[number % 3]
    sums = [rng.normal(0.25, 1.0, size), rng.exponential(1.0, size) - 0.75, rng.standard_t(3, size) + 0.3][number % 3]
    drawn = permutation_test(
        (sums, np.zeros(size)), lambda one, other, axis: (one - other).sum(axis=axis), permutation_type="samples",
        alternative="greater", n_resamples=20_000, vectorized=True, rng=rng,
    ).pvalue  # fmt: skip
    error = math.sqrt(drawn * (1 - drawn) / 20_000)
    assert sign_flip_p(sums) == pytest.approx(drawn, abs=4 * error + 0.02 * drawn)


@pytest.mark.parametrize("sums", [np.linspace(0.1, 1.7, 30), np.full(30, 0.3)])
def test_the_largest_total_there_can_be_has_one_flip(sums: Floats) -> None:
    assert sign_flip_p(sums) == pytest.approx(0.5**30, rel=1e-9)
    assert sign_flip_p(-sums) == pytest.approx(1.0)


def test_sums_of_zero_show_nothing() -> None:
    assert sign_flip_p(np.zeros(0)) == 1.0
    assert sign_flip_p(np.zeros(50)) == 1.0
    # 0.6 - 0.5 - 0.1 is not quite 0: so much is rounding, whatever its sign.
    assert sign_flip_p(np.full(50, 0.6 - 0.5 - 0.1)) == 1.0
    assert sign_flip_p(-np.full(50, 0.6 - 0.5 - 0.1)) == 1.0
    tiny = np.r_[np.full(50, 1e-10), 1.0, 1.0, -1.0]
    assert sign_flip_p(tiny) == pytest.approx(0.125)  # all three, or all tiny ones as well


def test_the_next_totals_are_listed_too() -> None:
    # Of 40 groups the smallest, then the next, then both may be negative: 2^-40 each.
    sizes = np.r_[0.1234, 0.2345, np.linspace(5.0, 9.0, 38)]
    for negative, flips in (([0], 2), ([1], 3), ([0, 1], 4)):
        sums = sizes.copy()
        sums[negative] *= -1
        assert sign_flip_p(sums) == pytest.approx(flips * 0.5**40, rel=1e-9)


@pytest.mark.parametrize("shift", [0.12, 0.15, 0.2])
def test_far_out_the_saddlepoint_is_within_a_few_percent(shift: float) -> None:
    # Thousandths are too fine to be counted by the sum; counted here by hand as whole numbers.
    whole = np.round(1000 * np.random.default_rng(3).normal(shift, 0.3, 150)).astype(int)
    total = int(np.abs(whole).sum())
    tails = np.ones(1)
    for size in np.abs(whole):
        tails = np.convolve(tails, np.r_[0.5, np.zeros(size - 1), 0.5]) if size else tails
    expected = tails[(int(whole.sum()) + total) // 2 :].sum()
    assert expected < 1e-4
    assert sign_flip_p(whole / 1000) == pytest.approx(expected, rel=0.03)


# -- many tests at a time -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p_values", "levels"),
    [
        ([], []),
        ([0.03], [0.05]),
        ([0.01, 0.02], [0.025, 0.05]),
        ([0.02, 0.01], [0.05, 0.025]),
        ([0.03, 0.04], [0.025, 0.025]),  # the first is not below: all keep its level
        ([0.01, 0.04, 0.03, 0.005], [0.05 / 3, 0.025, 0.025, 0.0125]),  # Holm (1979), his example of four
        ([0.001, 0.001, 0.001], [0.05 / 3, 0.025, 0.05]),
        ([0.05 / 3, 0.5, 0.5], [0.05 / 3] * 3),  # at its level is not below it
        ([1.0, 1.0], [0.025, 0.025]),
    ],
)
def test_holm_shares_the_level(p_values: list[float], levels: list[float]) -> None:
    assert holm_levels(p_values, 0.05) == pytest.approx(levels)


def test_holm_finds_something_false_at_most_at_its_level() -> None:
    drawn = np.random.default_rng(4).uniform(size=(4000, 5))
    false = sum(any(p < level for p, level in zip(row, holm_levels(list(row), 0.1), strict=True)) for row in drawn)
    assert false / 4000 == pytest.approx(0.1, abs=0.015)


# -- planning -------------------------------------------------------------------------------------------------------


def test_items_needed_is_connors_formula() -> None:
    # psi 0.2, difference 0.1, alpha 0.05 one-sided, power 0.8:
    # (1.6449 * sqrt(0.2) + 0.8416 * sqrt(0.2 - 0.01))^2 / 0.01 = (0.73561 + 0.36685)^2 / 0.01 = 121.54
    assert items_needed(0.1, 0.2, 0.0, 0.05) == 122


@pytest.mark.parametrize("margin", [-0.05, 0.0, 0.02, 0.1])
@pytest.mark.parametrize("discordance", [0.0, 0.05, 0.4])
def test_smallest_effect_and_items_needed_are_inverse(margin: float, discordance: float) -> None:
    effect = smallest_effect(400, discordance, margin, 0.05)
    assert effect is not None
    assert effect > margin
    assert abs(items_needed(effect, discordance, margin, 0.05) - 400) <= 1


def test_two_items_show_nothing() -> None:
    assert smallest_effect(2, 0.5, 0.0, 0.05) is None


@pytest.mark.parametrize(
    ("effect", "discordance", "margin", "level"),
    [(0.08, 0.3, 0.0, 0.05), (0.05, 0.1, 0.0, 0.001), (0.1, 0.25, 0.03, 0.05), (0.0, 0.15, -0.06, 0.0083)],
)
def test_the_planned_number_of_items_has_the_power_it_promises(
    effect: float, discordance: float, margin: float, level: float
) -> None:
    n = items_needed(effect, discordance, margin, level)
    shares = [(discordance + effect) / 2, (discordance - effect) / 2, 1 - discordance]
    drawn, times = np.unique(np.random.default_rng(1).multinomial(n, shares, size=300), axis=0, return_counts=True)
    shown = sum(
        int(many) for (wins, losses, _), many in zip(drawn, times, strict=True)
        if PairedShares(int(wins), int(losses), n).p_above(margin, level) < level
    )  # fmt: skip
    assert 0.7 < shown / 300 < 0.87  # the exact tests give a little of the planned 0.80 away


def test_of_nothing_counted_nothing_is_known() -> None:
    assert share_interval(0, 0, 0.025) == (0.0, 1.0)
