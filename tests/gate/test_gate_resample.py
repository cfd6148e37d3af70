"""Bootstrap bounds and permutation tests, against other implementations, by counting, and by simulation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import binom
from scipy.stats import bootstrap as scipy_bootstrap
from sklearn.metrics import f1_score

from tasks.gate import resample
from tasks.gate.resample import (
    Bootstrap,
    Floats,
    Ints,
    Statistic,
    group_sums,
    macro_f1_columns,
    macro_f1_of,
    resamples_for,
    swap_p,
)

LEVELS = (0.4, 0.1, 0.05, 0.0083, 1e-3, 1.8e-5, 1e-8)


def mean_of(sums: Floats) -> Floats:
    return sums[:, 0] / sums[:, 1]


def counted(values: Floats) -> Floats:
    """A table whose `mean_of` is the mean of these values, one a group."""
    return np.stack([values, np.ones(len(values))], axis=1)


def bootstrap(table: Floats, statistic: Statistic, level: float) -> Bootstrap:
    (made,) = resample.bootstrap(table, (statistic,), level)
    return made


def mean_bootstrap(values: Floats, level: float = 0.05) -> Bootstrap:
    return bootstrap(counted(values), mean_of, level)


def classes_of(rng: np.random.Generator, n: int, classes: int, accuracy: float) -> tuple[Ints, Ints]:
    targets = rng.integers(0, classes, n)
    return targets, np.where(rng.random(n) < accuracy, targets, rng.integers(-1, classes, n))


# -- against others -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["skewed", "right or wrong", "groups of three", "a ratio"])
@pytest.mark.parametrize("level", [0.05, 0.0083])
def test_bounds_are_those_of_scipy(monkeypatch: pytest.MonkeyPatch, shape: str, level: float) -> None:
    monkeypatch.setattr(resample, "RESAMPLES", 20_000)
    rng = np.random.default_rng(7)
    table = {
        "skewed": counted(rng.exponential(1.0, 60)),
        "right or wrong": counted((rng.random(80) < 0.15).astype(float)),
        "groups of three": np.stack([rng.binomial(3, rng.random(50)), np.full(50, 3.0)], axis=1),
        "a ratio": np.exp(rng.normal(0.0, 0.6, (45, 2))),
    }[shape]
    theirs = scipy_bootstrap(
        tuple(table.T), lambda one, other, axis: one.sum(axis=axis) / other.sum(axis=axis), paired=True,
        confidence_level=1 - 2 * level, n_resamples=20_000, vectorized=True, method="BCa", rng=rng,
    )  # fmt: skip
    ours = bootstrap(table, mean_of, level)
    assert ours.error == pytest.approx(theirs.standard_error, rel=0.03)
    # The quantiles of 20,000 draws differ by a few percent of a standard error, or by one step of what is counted.
    apart = 0.12 * ours.error if shape in ("skewed", "a ratio") else 0.12 * ours.error + 1 / 80
    assert tuple(ours.interval(level, level)) == pytest.approx(tuple(theirs.confidence_interval), abs=apart)


def test_bounds_of_macro_f1_are_those_of_scipy() -> None:
    rng = np.random.default_rng(8)
    targets, answers = classes_of(rng, 120, 3, 0.7)

    def macro_f1(targets: Ints, answers: Ints) -> float:
        return float(macro_f1_of(macro_f1_columns(targets, answers).sum(axis=0, keepdims=True))[0])

    theirs = scipy_bootstrap(
        (targets, answers), macro_f1, paired=True, vectorized=False, confidence_level=0.9, n_resamples=1500, rng=rng
    )
    ours = bootstrap(macro_f1_columns(targets, answers), macro_f1_of, 0.05)
    assert tuple(ours.interval(0.05, 0.05)) == pytest.approx(
        tuple(theirs.confidence_interval), abs=0.25 * theirs.standard_error
    )


@pytest.mark.parametrize("accuracy", [0.0, 0.3, 0.9, 1.0])
def test_macro_f1_is_that_of_scikit_learn(accuracy: float) -> None:
    rng = np.random.default_rng(4)
    for classes in (2, 3, 8):
        targets, answers = classes_of(rng, 200, classes, accuracy)  # -1: an answer that is no class
        columns = macro_f1_columns(targets, answers)
        expected = f1_score(targets, answers, labels=np.unique(targets), average="macro", zero_division=0)
        assert float(macro_f1_of(columns.sum(axis=0, keepdims=True))[0]) == pytest.approx(expected)
        grouped = group_sums(columns, np.arange(200) // 7)
        assert grouped.shape == (29, 3 * classes)
        assert float(macro_f1_of(grouped.sum(axis=0, keepdims=True))[0]) == pytest.approx(expected)


def test_an_answer_of_a_class_without_items_is_wrong_and_no_class_of_its_own() -> None:
    targets, answers = np.array([0, 0, 1, 1]), np.array([0, 5, 1, 1])
    columns = macro_f1_columns(targets, answers)
    assert columns.shape == (4, 6)
    assert float(macro_f1_of(columns.sum(axis=0, keepdims=True))[0]) == pytest.approx((2 / 3 + 1.0) / 2)


def test_a_class_that_a_resample_lacks_is_left_out_of_its_mean() -> None:
    columns = macro_f1_columns(np.array([0, 0, 1]), np.array([0, 1, 1]))
    without_class_1 = columns[:2].sum(axis=0, keepdims=True)
    assert float(macro_f1_of(without_class_1)[0]) == pytest.approx(2 / 3)
    assert float(macro_f1_of(np.zeros((1, 6)))[0]) == 0.0


# -- bounds and p-values --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["normal", "skewed", "macro-F1"])
@pytest.mark.parametrize("level", [0.3, 0.05, 0.0083, 1e-3, 1.8e-5])
def test_a_p_value_is_below_a_level_where_the_bound_is_beyond_the_limit(shape: str, level: float) -> None:
    rng = np.random.default_rng(9)
    if shape == "macro-F1":
        made = bootstrap(macro_f1_columns(*classes_of(rng, 300, 4, 0.8)), macro_f1_of, level)
    else:
        made = mean_bootstrap(rng.normal(0.2, 1.0, 150) if shape == "normal" else rng.exponential(1.0, 60), level)
    low, high = made.interval(level, level)
    near = 0.04 * made.error  # a step between two of the resampled values
    for limit in np.linspace(made.estimate - 12 * made.error, made.estimate + 12 * made.error, 401):
        if abs(limit - low) > near:
            assert (made.p_above(limit) < level) == (low > limit), limit
        if abs(limit - high) > near:
            assert (made.p_below(limit) < level) == (high < limit), limit


def test_a_limit_out_of_reach_is_passed_for_certain() -> None:
    # With a skewness of six the bound stops, however small the level: what lies beyond even that is shown, not open.
    made = mean_bootstrap(np.r_[np.full(30, 1.0), 1.6])
    assert made.acceleration > 0.05
    low, high = made.interval(1e-12, 1e-12)
    assert (made.p_above(0.0), made.p_below(0.0)) == (0.0, 1.0)
    assert made.p_above(low - 0.3) == 0.0
    assert made.p_below(high + 3.0) < 1e-6
    assert mean_bootstrap(-np.r_[np.full(30, 1.0), 1.6]).p_below(0.0) == 0.0


SHAPES: dict[str, Callable[[np.random.Generator], Floats]] = {
    "two groups": lambda rng: rng.random(2),
    "right or wrong": lambda rng: (rng.random(40) < 0.2).astype(float),
    "one of many": lambda rng: np.r_[1.0, np.zeros(199)],
    "graded": lambda rng: rng.random(300) - 0.45,
    "very skewed": lambda rng: rng.random(60) ** 12,
    "all alike": lambda rng: np.full(80, 0.4),
    "nearly all alike": lambda rng: np.r_[np.full(80, 0.4), 0.4 + 1e-9],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_smaller_level_never_gives_a_narrower_interval(shape: str) -> None:
    made = mean_bootstrap(SHAPES[shape](np.random.default_rng(3)), 1e-8)
    intervals = [made.interval(level, level) for level in LEVELS]
    assert np.all(np.isfinite(intervals))
    for level, narrow, wide in zip(LEVELS[1:], intervals, intervals[1:], strict=False):
        assert wide.low <= narrow.low + 1e-12, level
        assert wide.high >= narrow.high - 1e-12, level
        assert wide.low <= made.estimate <= wide.high, level


def test_a_large_bias_moves_no_bound_past_the_estimate() -> None:
    values = np.sort(np.random.default_rng(2).normal(0.5, 0.05, 4_000))
    biased = Bootstrap(0.6, values, bias=3.0, acceleration=0.0, groups=60)  # hardly any is as large as the estimate
    for level in LEVELS:
        low, high = biased.interval(level, level)
        assert low <= 0.6 <= high
    lows = [biased.interval(level, level).low for level in LEVELS]
    assert lows == sorted(lows, reverse=True)
    assert biased.p_above(0.6) >= 0.5
    assert biased.p_above(0.7) >= 0.5


def test_groups_that_are_all_alike_are_as_sure_as_they_are_many() -> None:
    # If one in a hundred were otherwise, all of 80 groups would miss it with a chance of 0.99^80 = 0.45.
    made = mean_bootstrap(np.full(80, 0.4))
    low, high = made.interval(0.05, 0.001)
    assert (low, high) == pytest.approx((0.4 - (1 - 0.05 ** (1 / 80)), 0.4 + (1 - 0.001 ** (1 / 80))))
    assert made.p_above(0.39) == pytest.approx(0.99**80)
    assert (made.p_above(0.4), made.p_above(0.5), made.p_above(-5.0)) == (1.0, 1.0, 0.0)
    assert made.p_below(0.41) == pytest.approx(0.99**80)
    assert (made.error, made.bias, made.acceleration) == pytest.approx((0.0, 0.0, 0.0))


def test_more_is_drawn_for_a_smaller_level_within_reason() -> None:
    assert [resamples_for(level, 100) for level in (0.05, 0.0125, 0.005, 1e-9)] == [4_000, 4_000, 10_000, 40_000]
    assert resamples_for(1e-9, 100_000) == 4_000  # a table this long is resampled as often as the time allows


def test_large_tables_are_resampled_in_pieces_and_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    few = np.round(np.random.default_rng(5).random(300), 1)
    many = np.random.default_rng(6).random(300)
    whole = [mean_bootstrap(values).values for values in (few, many)]
    monkeypatch.setattr(resample, "_CELLS", 7 * 300)
    monkeypatch.setattr(resample, "resamples_for", lambda level, rows: 4_000)
    for values, expected in zip((few, many), whole, strict=True):
        # For another number of rows a BLAS may add in another order, so the last bit can differ.
        np.testing.assert_allclose(mean_bootstrap(values).values, expected, rtol=1e-10)  # sums in other orders


@pytest.mark.parametrize("values", [np.round(np.random.default_rng(5).random(200), 1), np.zeros(50)])
def test_the_order_of_groups_changes_nothing(values: Floats) -> None:
    expected = mean_bootstrap(values)
    for seed in range(3):
        again = mean_bootstrap(np.random.default_rng(seed).permutation(values))
        assert np.array_equal(again.values, expected.values)
        assert again.interval(0.05, 0.05) == expected.interval(0.05, 0.05)


def test_different_rows_are_found_in_order() -> None:
    rng = np.random.default_rng(1)
    for table in (rng.integers(-2, 3, (500, 4)) / 2, rng.random((40, 3)), np.zeros((3, 2)), -np.zeros((3, 2))):
        rows, counts = resample._different_rows(table)
        expected = np.unique(table, axis=0, return_counts=True)
        assert np.array_equal(rows, expected[0])
        assert np.array_equal(counts, expected[1])


def test_rows_of_one_hash_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoFactors:
        def integers(self, *_: object, **__: object) -> Ints:
            return np.full(2, 2**63, dtype=np.uint64)  # twice that is 0: the hash is a plain sum

    monkeypatch.setattr(np.random, "default_rng", lambda _: NoFactors())
    rows, counts = resample._different_rows(np.array([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0]]))
    assert rows.tolist() == [[1.0, 2.0], [2.0, 1.0]]
    assert counts.tolist() == [2, 1]


# -- coverage -------------------------------------------------------------------------------------------------------


def test_bounds_on_groups_miss_the_truth_as_often_as_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 groups of one to five items, right or wrong together: each end at 5 % misses in about 5 % of 500 samples."""
    monkeypatch.setattr(resample, "RESAMPLES", 600)
    rng = np.random.default_rng(11)
    missed = np.zeros(2)
    for _ in range(500):
        sizes = rng.integers(1, 6, 100)
        rate = rng.beta(2.0, 1.0, 100)  # of the group; its items are right with it, 2/3 of them on average
        made = bootstrap(np.stack([rng.binomial(sizes, rate), sizes], axis=1).astype(float), mean_of, 0.05)
        low, high = made.interval(0.05, 0.05)
        missed += [low > 2 / 3, high < 2 / 3]
    # Three standard errors of 500 samples at 5 % are 2.9 %. As single items they would miss in some 10 %.
    assert np.all(np.abs(missed / 500 - 0.05) < 0.029), missed / 500


def test_rare_classes_do_not_lift_the_bounds_of_macro_f1(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty classes of two items each: the lower end at 5 % may not pass the truth four times as often."""
    monkeypatch.setattr(resample, "RESAMPLES", 600)
    rng = np.random.default_rng(5)
    shares = np.r_[0.6, np.full(20, 0.02)]
    right = np.linspace(0.85, 0.6, 21)

    def made(n: int) -> Floats:
        targets = rng.choice(21, n, p=shares)
        return macro_f1_columns(targets, np.where(rng.random(n) < right[targets], targets, rng.choice(21, n, p=shares)))

    truth = float(macro_f1_of(made(400_000).sum(axis=0, keepdims=True))[0])
    passed = sum(bootstrap(made(100), macro_f1_of, 0.05).interval(0.05, 0.05).low > truth for _ in range(150))
    assert passed / 150 < 0.12


# -- swapped sides --------------------------------------------------------------------------------------------------


def difference(sums: Floats) -> Floats:
    after, before = np.split(sums, 2, axis=1)
    return macro_f1_of(after) - macro_f1_of(before)


def both_ways(targets: Ints, baseline: Ints, candidate: Ints, groups: Ints) -> tuple[Floats, Floats]:
    before, after = (group_sums(macro_f1_columns(targets, side), groups) for side in (baseline, candidate))
    return np.concatenate([after, before], axis=1), np.concatenate([before, after], axis=1)


def share_of_swaps(kept: Floats, swapped: Floats) -> float:
    """The definition: all 2^G exchanges one by one."""
    seen = difference(kept.sum(axis=0, keepdims=True))[0]
    which = np.array(list(itertools.product([0, 1], repeat=len(kept))))
    sums = np.stack([np.where(one[:, None] == 1, swapped, kept).sum(axis=0) for one in which])
    return float(np.mean(difference(sums) >= seen - 1e-12))


@pytest.mark.parametrize("per_group", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_swapped_sides_are_counted_as_all_exchanges_would_be(per_group: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = 11 * per_group
    targets, baseline = classes_of(rng, n, 3, 0.4)
    candidate = np.where(rng.random(n) < 0.75, targets, baseline)
    kept, swapped = both_ways(targets, baseline, candidate, np.arange(n) // per_group)
    expected = share_of_swaps(kept, swapped)
    found = swap_p(kept, swapped, difference, 0.001)
    assert found == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 20_000) + 1e-4)
    assert found >= 1 / 20_001  # a p-value of draws is never 0


def test_sides_that_answer_alike_are_not_told_apart() -> None:
    targets, answers = classes_of(np.random.default_rng(0), 50, 3, 0.7)
    kept, swapped = both_ways(targets, answers, answers, np.arange(50))
    assert swap_p(kept, swapped, difference, 0.05) == 1.0


@pytest.mark.parametrize("level", [0.05, 0.0083, 1e-4])
def test_a_clear_difference_is_drawn_until_its_p_value_is_far_below_the_level(level: float) -> None:
    targets = np.arange(300) % 3
    kept, swapped = both_ways(targets, (targets + 1) % 3, targets, np.arange(300))
    assert swap_p(kept, swapped, difference, level) < level / 15
    assert swap_p(swapped, kept, difference, level) == 1.0


@pytest.mark.parametrize("coins", [1, 5, 63, 64, 65, 128, 1000])
def test_coins_fall_as_a_binomial_says(coins: int) -> None:
    heads = resample._heads(np.array([coins, 2, coins]), 4_000, np.random.default_rng(2))
    assert heads.shape == (4_000, 3)
    assert set(np.unique(heads[:, 1])) == {0.0, 1.0, 2.0}
    for column in (heads[:, 0], heads[:, 2]):
        assert column.mean() == pytest.approx(coins / 2, abs=4 * math.sqrt(coins / 4 / 4_000))
        assert column.var() == pytest.approx(coins / 4, rel=0.1)
        median = math.floor(coins / 2)
        assert np.mean(column <= median) == pytest.approx(binom.cdf(median, coins, 0.5), abs=0.032)
    assert abs(np.corrcoef(heads[:, 0], heads[:, 2])[0, 1]) < 0.07
