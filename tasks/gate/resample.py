"""Bootstrap and permutation over groups of items, for what has no closed form: graded scores, macro-F1, ratios.

Every statistic here is a function of sums over groups. So what is resampled is a table with one row a group, and equal
rows are drawn together, as a multinomial: ten thousand items of eight classes have some two hundred different rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from tasks.statistics import Interval

RESAMPLES = 4_000  # the 2.5 % quantile of a bootstrap then has a standard error of about 0.25 % in level
SEED = 20_261  # the same outcomes give the same interval, always

_IN_TAIL = 50  # resamples wanted beyond a bound; at smaller levels more are drawn ...
_MOST_RESAMPLES = 40_000  # ... up to this many, and beyond them the tail is taken as normal
_LEAST_IN_TAIL = 10
_CELLS = 4_000_000  # numbers held at a time, 32 MB: large tables are resampled in pieces
_DIGITS = 12  # processors differ in the last bits of a sum: without them, equal values are equal everywhere
_DEARER = 10  # how much longer a multinomial takes for a row than drawing one group does
_FLIPS = 2_000  # permutations drawn at a time
_MOST_FLIPS = 1_000_000
_CLEAR = 200  # permutations at least as good that settle that a p-value is large

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Statistic = Callable[[Floats], Floats]  # sums over the items, [r, columns], to values, [r]


@dataclass(frozen=True)
class Bootstrap:
    """A statistic's resampled values in order, and what makes its bounds second-order accurate.

    Bias-corrected and accelerated bounds (BCa): Efron, JASA 82 (1987) 171-185; Efron & Tibshirani, An Introduction to
    the Bootstrap (1993), chapter 14. The acceleration comes from leaving out one group at a time.

    Attributes:
        estimate: the value on the items as they are.
        values: the resampled values, sorted, [resamples].
        bias: z0, the normal quantile of the share of values below the estimate.
        acceleration: a, one sixth of the skewness of the leave-one-out values.
        groups: how many groups were resampled.
    """

    estimate: float
    values: Floats
    bias: float
    acceleration: float
    groups: int

    @property
    def error(self) -> float:
        """Standard error: the standard deviation of the resampled values."""
        return float(self.values.std(ddof=1))

    def interval(self, low_level: float, high_level: float) -> Interval:
        """The lower bound at one one-sided level and the upper at another; the estimate is always between them.

        A large bias would move one of them past the estimate, which is more than so few resamples can say.
        """
        low, high = self._bound(float(ndtri(low_level))), self._bound(-float(ndtri(high_level)))
        return Interval(min(low, self.estimate), max(high, self.estimate))

    def p_above(self, limit: float) -> float:
        """One-sided p-value of "the true value is at most `limit`": the level at which the lower bound meets it."""
        if self._constant:
            return float((1 - min(self.estimate - limit, 1.0)) ** self.groups) if self.estimate > limit else 1.0
        count = len(self.values)
        below = np.searchsorted(self.values, limit, "left") + np.searchsorted(self.values, limit, "right")
        if below / 2 >= _LEAST_IN_TAIL:
            at = float(ndtri(min(below / 2 / count, 1 - 1e-12)))
        else:  # on the tail that the bounds go on along
            at = float(ndtri(_LEAST_IN_TAIL / count)) + (limit - self._anchor(-1)) / self.error
        w = at - self.bias
        denominator = 1 + self.acceleration * w
        if denominator <= 0:  # out of reach of all bounds: of the lower ones, however small the level, or of the upper
            return 0.0 if w < 0 else 1.0
        p_value = float(ndtr(w / denominator - self.bias))
        return p_value if limit < self.estimate else max(p_value, 0.5)

    def p_below(self, limit: float) -> float:
        """One-sided p-value of "the true value is at least `limit`"."""
        turned = Bootstrap(-self.estimate, -self.values[::-1], -self.bias, -self.acceleration, self.groups)
        return turned.p_above(-limit)

    @property
    def _constant(self) -> bool:
        """No resample differs from another: all groups are alike.

        Then nothing but their number says how sure that is: if the true value were d away, a group that shows it would
        turn up with probability d at least, so G groups all miss it with probability (1 - d)^G at most.
        """
        return bool(self.values[-1] - self.values[0] < 1e-12)

    def _bound(self, z: float) -> float:
        """The bound at normal quantile z (negative for a lower one)."""
        if self._constant:
            return self.estimate + math.copysign(1 - float(ndtr(-abs(z))) ** (1 / self.groups), z)
        moved = self.bias + z
        denominator = 1 - self.acceleration * moved
        at = self.bias + moved / denominator if denominator > 0 else math.copysign(math.inf, z)
        share, count = float(ndtr(at)), len(self.values)
        beyond = min(share, 1 - share) * count
        if beyond >= _LEAST_IN_TAIL:
            return float(np.quantile(self.values, share))
        # Too few resamples lie beyond: from where there are some, go on as a normal tail would.
        anchor_z = float(ndtri(_LEAST_IN_TAIL / count))
        reach = min(abs(at), 40.0) + anchor_z
        return self._anchor(at) + math.copysign(reach * self.error, at)

    def _anchor(self, sign: float) -> float:
        share = _LEAST_IN_TAIL / len(self.values)
        return float(np.quantile(self.values, share if sign < 0 else 1 - share))


def resamples_for(level: float, rows: int) -> int:
    """How many resamples a bound at this one-sided level wants, within reason for so many groups."""
    wanted = math.ceil(_IN_TAIL / level)
    return max(RESAMPLES, min(wanted, _MOST_RESAMPLES, 10 * _CELLS // max(rows, 1)))


def group_sums(columns: Floats, groups: Ints) -> Floats:
    """Sums of each column over each group: [n, columns] and codes [n] to [G, columns]."""
    count = int(groups.max()) + 1
    if count == len(groups):
        return columns[np.argsort(groups, kind="stable")]
    return np.stack([np.bincount(groups, column, minlength=count) for column in columns.T], axis=1)


def bootstrap(table: Floats, statistics: Sequence[Statistic], level: float) -> tuple[Bootstrap, ...]:
    """Resample the rows of a table, one a group, with replacement, and take several statistics of each resample.

    Args:
        table: sums over each group, [G, columns].
        statistics: each of the sums over all groups; they are called on many at a time.
        level: the smallest one-sided level that bounds will be asked at.
    """
    rows, counts = _different_rows(table)
    total, different = len(table), len(rows)
    few = different * _DEARER < total
    row_of = np.repeat(np.arange(different), counts)
    resamples = resamples_for(level, different if few else total)
    rng = np.random.default_rng(SEED)
    step = max(1, _CELLS // (different if few else total))
    drawn: list[list[Floats]] = [[] for _ in statistics]
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        if few:
            weights = rng.multinomial(total, counts / total, size=size)
        else:
            chosen = row_of[rng.integers(0, total, size=(size, total))] + different * np.arange(size)[:, None]
            weights = np.bincount(chosen.ravel(), minlength=size * different).reshape(size, different)
        sums = weights.astype(np.float64) @ rows
        for statistic, values in zip(statistics, drawn, strict=True):
            values.append(statistic(sums))
    whole = (rows * counts[:, None]).sum(axis=0)
    return tuple(
        _made(whole, rows, counts, statistic, np.concatenate(values))
        for statistic, values in zip(statistics, drawn, strict=True)
    )


def _made(whole: Floats, rows: Floats, counts: Ints, statistic: Statistic, drawn: Floats) -> Bootstrap:
    estimate = round(float(statistic(whole[None])[0]), _DIGITS)
    values = np.sort(np.round(drawn, _DIGITS))
    acceleration = _acceleration(whole, rows, counts, statistic)
    return Bootstrap(estimate, values, _bias(values, estimate), acceleration, int(counts.sum()))


def _bias(values: Floats, estimate: float) -> float:
    below = (np.searchsorted(values, estimate, "left") + np.searchsorted(values, estimate, "right")) / 2
    return float(ndtri(min(max(below / len(values), 0.5 / len(values)), 1 - 0.5 / len(values))))


def _acceleration(whole: Floats, rows: Floats, counts: Ints, statistic: Statistic) -> float:
    without = statistic(whole - rows)
    mean = float(np.average(without, weights=counts))
    deviation = mean - without
    total = int(counts.sum())
    square = float(np.average(deviation**2, weights=counts)) * total
    if square <= 1e-30:
        return 0.0
    return float(np.average(deviation**3, weights=counts)) * total / (6 * square**1.5)


def swap_p(kept: Floats, swapped: Floats, statistic: Statistic, level: float) -> float:
    """One-sided p-value of "the two sides are exchangeable", for a statistic that is no mean (macro-F1).

    For each draw, every group's two sides are exchanged with probability 1/2 (a paired permutation test; Good,
    Permutation Tests, 2nd ed., 3.1). The p-value is (b + 1) / (m + 1) for b of m draws at least as large as what was
    seen (Phipson & Smyth, SAGMB 9 (2010) 39), so it is never too small. Draws go on until it is clear on which side of
    `level` it lies.

    Args:
        kept: sums over each group as they are, [G, columns].
        swapped: the same with both sides exchanged.
        statistic: of the sums over all groups; larger favours the candidate.
        level: the level that the p-value will be compared with.
    """
    both = np.concatenate([kept, swapped], axis=1)
    rows, counts = _different_rows(both)
    same = np.all(rows[:, : kept.shape[1]] == rows[:, kept.shape[1] :], axis=1)
    fixed = (rows[same, : kept.shape[1]] * counts[same, None]).sum(axis=0)
    rows, counts = rows[~same], counts[~same]
    if not len(rows):
        return 1.0
    stay, gain = rows[:, : kept.shape[1]], rows[:, kept.shape[1] :] - rows[:, : kept.shape[1]]
    start = fixed + (stay * counts[:, None]).sum(axis=0)
    seen = float(statistic(start[None])[0])
    rng = np.random.default_rng(SEED)
    wanted = min(_MOST_FLIPS, max(2 * _FLIPS, math.ceil(20 / level)))
    reached, drawn = 0, 0
    step = max(1, min(_FLIPS, _CELLS // len(rows)))
    while drawn < wanted:
        flips = _heads(counts, step, rng)
        reached += int(np.count_nonzero(statistic(start + flips @ gain) >= seen - 1e-12))
        drawn += step
        if reached >= _CLEAR and reached / drawn > 2 * level:
            break
    return (reached + 1) / (drawn + 1)


def _different_rows(table: Floats) -> tuple[Floats, Ints]:
    """The different rows of a table in order, and how often each is there: `np.unique` of rows, ten times faster.

    Rows are told apart by a hash of their bits; should two have the same, they are compared column by column.
    """
    bits = np.ascontiguousarray(table + 0.0).view(np.uint64)  # + 0.0: minus zero is zero
    factors = np.random.default_rng(SEED).integers(0, 2**63, table.shape[1], dtype=np.uint64) * 2 + 1
    hashes = ((bits ^ (bits >> 29) ^ (bits >> 47)) * factors).sum(axis=1)
    _, first, row_of, counts = np.unique(hashes, return_index=True, return_inverse=True, return_counts=True)
    rows = table[first]
    if not np.array_equal(rows[row_of], table):
        rows, counts = np.unique(table, axis=0, return_counts=True)
    order = np.lexsort(rows.T[::-1])
    return rows[order], counts[order]


def _heads(coins: Ints, size: int, rng: np.random.Generator) -> Floats:
    """How many of so many fair coins come up heads, [size, len(coins)]: random bits, counted 64 at a time."""
    words = -(-coins // 64)
    masks = np.full(int(words.sum()), np.iinfo(np.uint64).max, dtype=np.uint64)
    ends = np.cumsum(words) - 1
    masks[ends] >>= (64 * words - coins).astype(np.uint64)
    bits = rng.integers(0, np.iinfo(np.uint64).max, size=(size, len(masks)), dtype=np.uint64, endpoint=True)
    heads = np.bitwise_count(bits & masks)
    if len(masks) > len(coins):
        heads = np.add.reduceat(heads, ends + 1 - words, axis=1, dtype=np.int64)
    return heads.astype(np.float64)


# -- statistics -------------------------------------------------------------------------------------------------------


def one_hot(codes: Ints, classes: Ints) -> Floats:
    """[n] codes to [n, k] of 0 and 1, a column for each of k classes; a code of no class is all 0."""
    return (codes[:, None] == classes).astype(np.float64)


def macro_f1_columns(targets: Ints, answers: Ints) -> Floats:
    """Per item what macro-F1 sums: hits, targets and answers by class, [n, 3 k].

    The k classes are those that the items have; an answer of another class is wrong, and no class of its own.
    """
    classes = np.unique(targets[targets >= 0])
    wanted, said = one_hot(targets, classes), one_hot(answers, classes)
    return np.concatenate([wanted * said, wanted, said], axis=1)


def macro_f1_of(sums: Floats) -> Floats:
    """Macro-F1 from such sums, [r, 3 k] to [r]: the mean of F1 = 2 hits / (targets + answers) over classes with items.

    A resample may have no item of a rare class. That class is then left out, as it would be of a golden set without it:
    counted as 0 it would pull the resampled values below the estimate, and the bounds, corrected for that, too high.
    """
    hits, wanted, said = np.split(sums, 3, axis=1)
    there = wanted > 0
    scores = np.divide(2 * hits, wanted + said, out=np.zeros_like(hits), where=there)
    return scores.sum(axis=1) / np.maximum(there.sum(axis=1), 1)
