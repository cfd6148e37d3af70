"""A quantity that a requirement is about, with its bounds and tests: a difference, a value, or a ratio.

Which method applies follows from the outcomes alone. Right-or-wrong items that stand alone have closed forms, exact
where it matters. As soon as any two items belong together, or a score is graded, or the metric is no mean, groups are
resampled: there is no way to ask for less.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom, norm

from tasks.contracts.errors import NotComparableError
from tasks.contracts.spec import MACRO_F1
from tasks.gate.pairs import Floats, Pairs, scores_of
from tasks.gate.resample import (
    Bootstrap,
    Statistic,
    bootstrap,
    group_sums,
    macro_f1_columns,
    macro_f1_of,
    swap_p,
)
from tasks.gate.statistics import (
    empirical_likelihood_p,
    exact_p_beyond,
    rare_losses_p,
    score_interval,
    score_statistic,
    sign_flip_p,
)
from tasks.statistics import Interval, exact_share_interval, share_interval

MCNEMAR = "McNemar exact + Tango score"
CLOPPER_PEARSON = "Clopper-Pearson exact"
BCA_FLIPS = "BCa bootstrap + sign flips"
BCA_SWAPS = "BCa bootstrap + swapped sides"
BCA = "BCa bootstrap"

_DIFFERENCES, _SHARES, _RATIOS = Interval(-1.0, 1.0), Interval(0.0, 1.0), Interval(0.0, math.inf)


class Effect(Protocol):
    """A quantity of which a requirement asks that it lies above (or below) a limit."""

    @property
    def estimate(self) -> float:
        """The value on these items."""

    @property
    def error(self) -> float:
        """Its standard error, for planning."""

    @property
    def method(self) -> str:
        """How it is bounded and tested."""

    def interval(self, low_level: float, high_level: float) -> Interval:
        """The lower bound at one one-sided level and the upper at another."""

    def p_above(self, limit: float, level: float) -> float:
        """One-sided p-value of "it is at most `limit`", to be compared with `level`."""

    def p_below(self, limit: float, level: float) -> float:
        """One-sided p-value of "it is at least `limit`"."""

    def quick_above(self, limit: float, level: float) -> float:
        """A p-value that is cheap and no larger than `p_above`: from `level` on, nothing dearer need be asked."""

    def quick_below(self, limit: float, level: float) -> float:
        """The same for `p_below`."""


# -- closed forms -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairedShares:
    """The difference of two shares over the same items, each right or wrong, each standing alone."""

    wins: int
    losses: int
    n: int
    method: str = MCNEMAR

    @property
    def estimate(self) -> float:
        """Candidate minus baseline."""
        return (self.wins - self.losses) / self.n

    @property
    def error(self) -> float:
        """Standard error."""
        return float(np.sqrt(max((self.wins + self.losses) / self.n - self.estimate**2, 0.0) / self.n))

    def interval(self, low_level: float, high_level: float) -> Interval:
        """Tango's score interval."""
        return Interval(
            score_interval(self.wins, self.losses, self.n, low_level).low,
            score_interval(self.wins, self.losses, self.n, high_level).high,
        )

    def p_above(self, limit: float, level: float) -> float:
        """McNemar's exact test at 0, the unconditional exact test elsewhere.

        Where the score test refuses already, its own p-value is given: the exact one is dearer, and larger.
        """
        score = float(norm.sf(score_statistic(self.wins, self.losses, self.n, limit)))
        if limit != 0 and score >= level:
            return score
        return exact_p_beyond(self.wins, self.losses, self.n, limit)

    def p_below(self, limit: float, level: float) -> float:
        """The same with the sides exchanged."""
        return PairedShares(self.losses, self.wins, self.n).p_above(-limit, level)

    def quick_above(self, limit: float, level: float) -> float:
        """The same test: it is cheap."""
        return self.p_above(limit, level)

    def quick_below(self, limit: float, level: float) -> float:
        """The same test: it is cheap."""
        return self.p_below(limit, level)


@dataclass(frozen=True)
class Share:
    """How often one model is right on items that stand alone."""

    successes: int
    n: int
    method: str = CLOPPER_PEARSON

    @property
    def estimate(self) -> float:
        """The share."""
        return self.successes / self.n

    @property
    def error(self) -> float:
        """Standard error."""
        return float(np.sqrt(self.estimate * (1 - self.estimate) / self.n))

    def interval(self, low_level: float, high_level: float) -> Interval:
        """The exact interval."""
        return Interval(
            exact_share_interval(self.successes, self.n, low_level).low,
            exact_share_interval(self.successes, self.n, high_level).high,
        )

    def p_above(self, limit: float, level: float) -> float:
        """The exact binomial test."""
        return float(binom.sf(self.successes - 1, self.n, limit))

    def p_below(self, limit: float, level: float) -> float:
        """The exact binomial test of the other side."""
        return float(binom.cdf(self.successes, self.n, limit))

    def quick_above(self, limit: float, level: float) -> float:
        """The same test: it is cheap."""
        return self.p_above(limit, level)

    def quick_below(self, limit: float, level: float) -> float:
        """The same test: it is cheap."""
        return self.p_below(limit, level)


# -- resampled --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mirrored:
    """An effect with the sides exchanged.

    A difference is always resampled in the direction in which it is positive, so that exchanging the two models turns
    the verdict around exactly, and not but for the luck of the draw.
    """

    inner: Effect

    @property
    def estimate(self) -> float:
        """The value on these items."""
        return -self.inner.estimate

    @property
    def error(self) -> float:
        """Its standard error."""
        return self.inner.error

    @property
    def method(self) -> str:
        """How it is bounded and tested."""
        return self.inner.method

    def interval(self, low_level: float, high_level: float) -> Interval:
        """The inner interval, turned around."""
        low, high = self.inner.interval(high_level, low_level)
        return Interval(-high, -low)

    def p_above(self, limit: float, level: float) -> float:
        """As the inner one."""
        return self.inner.p_below(-limit, level)

    def p_below(self, limit: float, level: float) -> float:
        """As the inner one."""
        return self.inner.p_above(-limit, level)

    def quick_above(self, limit: float, level: float) -> float:
        """As the inner one."""
        return self.inner.quick_below(-limit, level)

    def quick_below(self, limit: float, level: float) -> float:
        """As the inner one."""
        return self.inner.quick_above(-limit, level)


_Test = Callable[
    [float, float], float | None
]  # limit, level -> p-value of "at most limit", None if there is no such test


@dataclass(frozen=True)
class Resampled:
    """A statistic of groups. A bound counts only where bootstrap and permutation test both say so.

    Attributes:
        table: sums over each group, [G, columns].
        statistic: of the sums over all groups.
        above: a permutation test of "at most limit", where there is one.
        below: the same for "at least limit".
        level: the smallest level that bounds will be asked at.
        ends: the least and the largest value there can be; bounds go no further.
        beside: other statistics, taken of the same resamples, since drawing these is what takes time.
    """

    table: Floats
    statistic: Statistic
    above: _Test
    below: _Test
    level: float
    method: str
    ends: Interval
    beside: tuple[Statistic, ...] = ()

    @cached_property
    def bootstraps(self) -> tuple[Bootstrap, ...]:
        """Of the statistic, then of those beside it."""
        return bootstrap(self.table, (self.statistic, *self.beside), self.level)

    @property
    def _bootstrap(self) -> Bootstrap:
        return self.bootstraps[0]

    @cached_property
    def estimate(self) -> float:
        """The value on these items."""
        return float(self.statistic(self.table.sum(axis=0, keepdims=True))[0])

    @property
    def error(self) -> float:
        """Standard error of the resampled values."""
        return self._bootstrap.error

    def interval(self, low_level: float, high_level: float) -> Interval:
        """BCa bounds."""
        low, high = self._bootstrap.interval(low_level, high_level)
        return Interval(max(low, self.ends.low), min(high, self.ends.high))

    def p_above(self, limit: float, level: float) -> float:
        """The larger of the bootstrap's and the permutation test's p-value."""
        return max(self._bootstrap.p_above(limit), self.above(limit, level) or 0.0)

    def p_below(self, limit: float, level: float) -> float:
        """The same for the other side."""
        return max(self._bootstrap.p_below(limit), self.below(limit, level) or 0.0)

    def quick_above(self, limit: float, level: float) -> float:
        """The permutation test alone."""
        return self.above(limit, level) or 0.0

    def quick_below(self, limit: float, level: float) -> float:
        """The permutation test alone."""
        return self.below(limit, level) or 0.0


def difference_of(pairs: Pairs, metric: str, level: float, where: str = "policy.metric") -> Effect:
    """Candidate minus baseline on a metric.

    Raises:
        NotComparableError: the outcomes do not have this metric.
    """
    if metric == MACRO_F1 and pairs.classes:
        forward = _macro_f1_difference(pairs, 0, 1, level)
        return forward if forward.estimate >= 0 else Mirrored(_macro_f1_difference(pairs, 1, 0, level))
    baseline, candidate = scores_of(pairs, metric, where)
    if not pairs.grouped and _right_or_wrong(baseline) and _right_or_wrong(candidate):
        wins, losses = int((candidate > baseline).sum()), int((baseline > candidate).sum())
        return PairedShares(wins, losses, pairs.n)
    if (candidate - baseline).sum() < 0:
        return Mirrored(_mean_difference(pairs, candidate, baseline, level))
    return _mean_difference(pairs, baseline, candidate, level)


def _mean_difference(pairs: Pairs, baseline: Floats, candidate: Floats, level: float) -> Resampled:
    change = candidate - baseline
    sums = group_sums(np.stack([change, np.ones_like(change)], axis=1), pairs.groups)
    return _ratio_of_sums(sums, level, _DIFFERENCES)


def value_of(pairs: Pairs, metric: str, side: int, level: float, where: str = "policy.metric") -> Effect:
    """One model's own value on a metric; side 0 is the baseline, 1 the candidate.

    Raises:
        NotComparableError: the outcomes do not have this metric.
    """
    if metric == MACRO_F1 and pairs.classes:
        table = group_sums(macro_f1_columns(pairs.targets, pairs.answers[side]), pairs.groups)
        return Resampled(table, macro_f1_of, _none, _none, level, BCA, _SHARES)
    scores = scores_of(pairs, metric, where)[side]
    if not pairs.grouped and _right_or_wrong(scores):
        return Share(int(scores.sum()), pairs.n)
    sums = group_sums(np.stack([scores, np.ones_like(scores)], axis=1), pairs.groups)
    return _ratio_of_sums(sums, level, _SHARES)


def expense_ratio(pairs: Pairs, expense: str, level: float, where: str) -> Effect:
    """Candidate over baseline, of the mean of an expense.

    Raises:
        NotComparableError: the outcomes do not say what an answer cost.
    """
    found = pairs.expenses.get(expense)
    if found is None:
        raise NotComparableError(
            f"Not every item says its {expense}, which the policy limits.",
            where=where,
            fix=f"give every item of both sides the column `{expense}`, or take the limit out of the policy",
        )
    baseline, candidate = found
    if baseline.sum() <= 0:
        raise NotComparableError(
            f"The baseline's {expense} is zero throughout, so there is no ratio.",
            where=where,
            fix="measure it, or take the limit out of the policy",
        )
    sums = group_sums(np.stack([candidate, baseline], axis=1), pairs.groups)
    return _ratio_of_sums(sums, level, _RATIOS)


def _ratio_of_sums(sums: Floats, level: float, ends: Interval) -> Resampled:
    """The first column's total over the second's: a mean where the second counts items. [G, 2]"""
    largest = float(sums[:, 1].max())

    def test(side: float, limit: float) -> float:
        excess = side * (sums[:, 0] - limit * sums[:, 1])
        reach = limit - ends.low if side > 0 else ends.high - limit
        worst = reach * largest if math.isfinite(reach) else float(np.abs(excess).max())
        if ends == _DIFFERENCES:  # losses are those of items, whatever the limit
            rare = rare_losses_p(side * sums[:, 0], largest, -side * limit * float(sums[:, 1].mean()))
        else:
            rare = rare_losses_p(excess, worst)
        return max(sign_flip_p(excess), rare, empirical_likelihood_p(excess, worst))

    def above(limit: float, level: float) -> float:
        return test(1.0, limit)

    def below(limit: float, level: float) -> float:
        return test(-1.0, limit)

    return Resampled(sums, _ratio, above, below, level, BCA_FLIPS, ends)


def display_intervals(pairs: Pairs, metric: str, difference: Effect, level: float) -> list[tuple[float, Interval]]:
    """Both models' own values and intervals for the eye: Wilson's for a share of items that stand alone, else BCa.

    Macro-F1's come with its difference, from the same resamples.
    """
    mirrored = isinstance(difference, Mirrored)
    inner = difference.inner if isinstance(difference, Mirrored) else difference
    if metric == MACRO_F1 and pairs.classes and isinstance(inner, Resampled):
        ahead, behind = inner.bootstraps[1:]
        sides = (ahead, behind) if mirrored else (behind, ahead)
        bounds = [side.interval(level, level) for side in sides]
        return [
            (side.estimate, Interval(max(low, 0.0), min(high, 1.0)))
            for side, (low, high) in zip(sides, bounds, strict=True)
        ]
    found = []
    for effect in (value_of(pairs, metric, 0, level), value_of(pairs, metric, 1, level)):
        if isinstance(effect, Share):
            found.append((effect.estimate, share_interval(effect.successes, effect.n, level)))
        else:
            found.append((effect.estimate, effect.interval(level, level)))
    return found


def _macro_f1_difference(pairs: Pairs, baseline: int, candidate: int, level: float) -> Resampled:
    """Macro-F1 of one side less that of another; 0 is the baseline, 1 the candidate."""
    sides = [group_sums(macro_f1_columns(pairs.targets, side), pairs.groups) for side in pairs.answers]
    kept = np.concatenate([sides[candidate], sides[baseline]], axis=1)
    swapped = np.concatenate([sides[baseline], sides[candidate]], axis=1)

    def difference(sums: Floats) -> Floats:
        return _macro_f1_ahead(sums) - _macro_f1_behind(sums)

    def above(limit: float, level: float) -> float | None:
        return swap_p(kept, swapped, difference, level) if limit == 0 else None

    def below(limit: float, level: float) -> float | None:
        return swap_p(swapped, kept, difference, level) if limit == 0 else None

    beside = (_macro_f1_ahead, _macro_f1_behind)
    return Resampled(kept, difference, above, below, level, BCA_SWAPS, _DIFFERENCES, beside)


def _macro_f1_ahead(sums: Floats) -> Floats:
    return macro_f1_of(np.split(sums, 2, axis=1)[0])


def _macro_f1_behind(sums: Floats) -> Floats:
    return macro_f1_of(np.split(sums, 2, axis=1)[1])


def _ratio(sums: Floats) -> Floats:
    return np.divide(sums[:, 0], sums[:, 1], out=np.zeros(len(sums)), where=sums[:, 1] != 0)


def _right_or_wrong(scores: NDArray[np.float64]) -> bool:
    return bool(np.all((scores == 0.0) | (scores == 1.0)))


def _none(limit: float, level: float) -> None:
    return None
