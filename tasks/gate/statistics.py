"""The statistics of paired 0/1 outcomes, and of paired means and macro-F1. Pure functions of counts and arrays.

Of n items, `wins` are right in the candidate alone, `losses` in the baseline alone; the others are ties. The difference
is (wins - losses) / n. Every interval is two-sided with confidence 1 - 2 alpha, so that each of its ends is the
one-sided bound at level alpha that a verdict uses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import binom, binomtest, norm

POWER = 0.8  # the chance of showing an effect of the size named, by convention
RESAMPLES = 4000  # the 5 % quantile of a bootstrap then has a standard error of about 0.3 % in level
SEED = 20_261  # the same outcomes give the same interval, always

_CELLS = 4_000_000  # counts held at a time, 32 MB: large sets are resampled in pieces

Floats = NDArray[np.float64]


class Interval(NamedTuple):
    """Lower and upper bound."""

    low: float
    high: float


def exact_p(wins: int, losses: int) -> float:
    """One-sided p-value of "the candidate is no better": P(X >= wins) for X ~ Binomial(wins + losses, 1/2).

    McNemar's test in its exact conditional form (McNemar 1947; Agresti, Categorical Data Analysis, 3rd ed., 11.1.3).
    1 when no item tells the two apart.
    """
    return float(binom.sf(wins - 1, wins + losses, 0.5)) if wins + losses else 1.0


def score_statistic(wins: int, losses: int, n: int, difference: float) -> float:
    """Tango's score statistic of "the true difference is `difference`", about standard normal if it is so.

    Tango, Statistics in Medicine 17 (1998) 891-908, equations 13 and 14. It needs no continuity correction and stays
    defined with no discordant items. At difference 0 it is McNemar's (wins - losses) / sqrt(wins + losses).
    """
    b = (2 * n - wins + losses) * difference - wins - losses
    c = -losses * difference * (1 - difference)
    share = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
    variance = n * (2 * share + difference * (1 - difference))
    excess = wins - losses - n * difference
    if variance <= 0:
        return 0.0 if excess == 0 else math.copysign(math.inf, excess)
    return excess / math.sqrt(variance)


def score_interval(wins: int, losses: int, n: int, alpha: float) -> Interval:
    """Tango's score interval of the difference: all differences that the score test does not refuse at `alpha`."""
    observed = (wins - losses) / n
    z = float(norm.isf(alpha))
    if z <= 0:
        return Interval(observed, observed)
    edge = 1 - 1e-12

    def solve(target: float, start: float, end: float) -> float:
        if (score_statistic(wins, losses, n, end) - target) * (score_statistic(wins, losses, n, start) - target) > 0:
            return math.copysign(1.0, end)
        return float(brentq(lambda d: score_statistic(wins, losses, n, d) - target, start, end, xtol=1e-10))

    low = solve(z, max(observed, -edge), -edge) if observed > -edge else -1.0
    high = solve(-z, min(observed, edge), edge) if observed < edge else 1.0
    return Interval(low, high)


def paired_interval(wins: int, losses: int, n: int, alpha: float) -> Interval:
    """The interval of the difference that decides: Tango's, and it holds 0 unless the exact test excludes 0 as well.

    The score test alone is a little too eager on few discordant items. Taking 0 in unless the exact test refuses it
    makes one rule of the two: the interval lies above 0 only if `exact_p(wins, losses) < alpha`.
    """
    low, high = score_interval(wins, losses, n, alpha)
    if exact_p(wins, losses) >= alpha:
        low = min(low, 0.0)
    if exact_p(losses, wins) >= alpha:
        high = max(high, 0.0)
    return Interval(low, high)


def share_interval(successes: int, n: int, alpha: float) -> Interval:
    """Wilson's score interval of one share (Wilson, JASA 22 (1927) 209-212)."""
    bounds = binomtest(successes, n).proportion_ci(confidence_level=1 - 2 * alpha, method="wilson")
    return Interval(float(bounds.low), float(bounds.high))


# -- planning -----------------------------------------------------------------------------------------------------


def items_needed(effect: float, discordance: float, margin: float, alpha: float) -> int:
    """About how many items show, with 80 % power, that a true difference `effect` is not `margin`.

    n = (z_alpha sqrt(psi - margin^2) + z_beta sqrt(psi - effect^2))^2 / (effect - margin)^2, psi the share of
    discordant items (Connor, Biometrics 43 (1987) 207-211, there with margin 0). psi is at least the size of either
    difference, because a difference of d needs discordant items on a share of at least |d|.
    """
    psi = max(discordance, abs(effect), abs(margin))
    spread = norm.isf(alpha) * math.sqrt(max(psi - margin**2, 0.0)) + norm.ppf(POWER) * math.sqrt(
        max(psi - effect**2, 0.0)
    )
    return math.ceil((spread / (effect - margin)) ** 2)


def smallest_effect(n: int, discordance: float, margin: float, alpha: float) -> float | None:
    """The smallest true difference that n items show to be above `margin` with 80 % power: `items_needed` solved.

    None if these items could not even show a difference of 1.
    """

    def shortfall(effect: float) -> float:
        psi = max(discordance, effect)
        spread = norm.isf(alpha) * math.sqrt(psi - margin**2) + norm.ppf(POWER) * math.sqrt(max(psi - effect**2, 0.0))
        return float(spread - math.sqrt(n) * (effect - margin))

    if shortfall(1.0) >= 0:
        return None
    return float(brentq(shortfall, margin + 1e-12, 1.0)) if shortfall(margin + 1e-12) > 0 else margin


# -- bootstrap ----------------------------------------------------------------------------------------------------


class Estimate(NamedTuple):
    """A value of both models and their difference, each with its interval."""

    baseline: float
    candidate: float
    baseline_interval: Interval
    candidate_interval: Interval
    interval: Interval


def bootstrap_means(baseline: Floats, candidate: Floats, alpha: float) -> Estimate:
    """Means of paired scores (n,), bounded by a paired percentile bootstrap over items.

    Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    scores = np.stack([baseline, candidate], axis=1)
    return _estimate(lambda counts: counts @ scores / len(scores), len(scores), alpha)


def bootstrap_macro_f1(
    targets: NDArray[np.int64], baseline: NDArray[np.int64], candidate: NDArray[np.int64], classes: int, alpha: float
) -> Estimate:
    """Macro-F1 of both models, bounded by a paired percentile bootstrap over items.

    Args:
        targets: class index of each item, (n,).
        baseline: class index of the baseline's answer, (n,); -1 for an answer that is no class.
        candidate: the same for the candidate.
        classes: number of classes; each counts alike.
        alpha: one-sided level.
    """
    of_class = np.arange(classes)
    is_target = targets[:, None] == of_class
    sides = [
        ((is_target & is_answer).astype(float), is_target.astype(float) + is_answer)
        for is_answer in (baseline[:, None] == of_class, candidate[:, None] == of_class)
    ]

    def macro_f1(counts: Floats) -> Floats:
        columns = []
        for hits, targets_and_answers in sides:
            both = counts @ targets_and_answers
            columns.append(np.divide(2 * (counts @ hits), both, out=np.zeros_like(both), where=both > 0).mean(axis=1))
        return np.stack(columns, axis=1)

    return _estimate(macro_f1, len(targets), alpha)


def _estimate(statistic: Callable[[Floats], Floats], n: int, alpha: float) -> Estimate:
    """Both models' values from how often each item counts: `statistic` maps (resamples, n) to (resamples, 2)."""
    rng = np.random.default_rng(SEED)
    rows = max(1, _CELLS // n)
    drawn = []
    for start in range(0, RESAMPLES, rows):
        size = min(rows, RESAMPLES - start)
        items = rng.integers(0, n, size=(size, n)) + n * np.arange(size)[:, None]
        drawn.append(statistic(np.bincount(items.ravel(), minlength=size * n).reshape(size, n).astype(np.float64)))
    values = np.concatenate(drawn)
    baseline, candidate = (float(value) for value in statistic(np.ones((1, n)))[0])

    def bounds(sample: Floats) -> Interval:
        low, high = np.quantile(sample, [alpha, 1 - alpha])
        return Interval(float(low), float(high))

    return Estimate(
        baseline, candidate, bounds(values[:, 0]), bounds(values[:, 1]), bounds(values[:, 1] - values[:, 0])
    )
