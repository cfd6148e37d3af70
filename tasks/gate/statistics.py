"""The closed forms: paired 0/1 outcomes, and sums whose signs may be flipped. Pure functions of counts.

Of n items, `wins` are right in the candidate alone, `losses` in the baseline alone; the others are ties. The difference
is (wins - losses) / n. Every interval is two-sided with confidence 1 - 2 alpha, so that each of its ends is the
one-sided bound at level alpha that a verdict uses.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import binom, norm

from tasks.statistics import POWER, Interval, exact_share_interval

_COUNTED = 1_000_000  # largest total of whole numbers that is counted exactly
_ROUNDING = 1e-12  # a sum that is nearer to zero is zero: 0.6 - 0.5 - 0.1 is -3e-17
_SCALES = (1, 2, 3, 4, 5, 10, 12, 20, 100)
_LISTED = 5_000  # sets of groups that are listed one by one; where there are more, the saddlepoint is accurate
_CELLS = 1_000_000  # terms that are added up at a time
_WINDOW = 9.0  # standard deviations of a count that are summed over; what lies outside has less than 1e-18

Floats = NDArray[np.float64]


# -- right or wrong, item by item -----------------------------------------------------------------------------------


def exact_p(wins: int, losses: int) -> float:
    """One-sided p-value of "the candidate is no better": P(X >= wins) for X ~ Binomial(wins + losses, 1/2).

    McNemar's test in its exact conditional form (McNemar, Psychometrika 12 (1947) 153-157; Agresti, Categorical Data
    Analysis, 3rd ed., 11.1.3). 1 when no item tells the two apart.
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
    if variance <= 1e-12:
        return 0.0 if abs(excess) < 1e-9 else math.copysign(math.inf, excess)
    return excess / math.sqrt(variance)


@lru_cache(maxsize=65_536)
def score_interval(wins: int, losses: int, n: int, alpha: float) -> Interval:
    """Tango's score interval of the difference: all differences that the score test does not refuse at `alpha`."""
    observed = (wins - losses) / n
    z = float(norm.isf(alpha))
    if z <= 0:
        return Interval(observed, observed)
    # Each end is the same search, so that exchanging the two models mirrors the interval to the last bit.
    return Interval(-_score_bound(losses, wins, n, z), _score_bound(wins, losses, n, z))


def _score_bound(wins: int, losses: int, n: int, z: float) -> float:
    """The upper end: where the score statistic has fallen to -z."""
    edge = 1 - 1e-12
    start = (wins - losses) / n
    if start >= edge or score_statistic(wins, losses, n, edge) > -z:
        return 1.0
    start = max(start, -edge)
    return float(brentq(lambda d: score_statistic(wins, losses, n, d) + z, start, edge, xtol=1e-10))


@lru_cache(maxsize=65_536)
def exact_p_beyond(wins: int, losses: int, n: int, limit: float) -> float:
    """One-sided p-value of "the true difference is at most `limit`", exact for every share of discordant items.

    At limit 0 it is McNemar's `exact_p`. Elsewhere it is the largest probability, over the unknown discordance psi, of
    a score statistic as large as the one seen, if wins, losses and ties are trinomial with
    ((psi + limit) / 2, (psi - limit) / 2, 1 - psi): the unconditional exact test (Chan, Statistics in Medicine 17
    (1998) 1403-1413; for paired shares Hsueh, Liu and Chen, Biometrics 57 (2001) 478-483), ordered by Tango's
    statistic. Tango's test alone promotes up to twice too often just above a positive limit, where losses are rare.
    What is above a positive limit is above 0 as well, so there it is never less than `exact_p`.

    The search over psi goes in steps of a quarter of the standard deviation of the observed discordance, which on the
    scale of arcsin(sqrt(psi)) is 1 / (2 sqrt(n)) everywhere.
    """
    if limit == 0:
        return exact_p(wins, losses)
    seen = score_statistic(wins, losses, n, limit)
    if seen <= 0:
        return 1.0
    most_losses = _most_losses(n, limit, seen)
    least = math.asin(math.sqrt(abs(limit)))
    steps = max(8, math.ceil(8 * math.sqrt(n) * (math.pi / 2 - least)) + 1)
    discordance = np.sin(np.linspace(least, math.pi / 2, steps)) ** 2
    beyond = float(min(1.0, _region_probabilities(most_losses, n, limit, discordance).max()))
    return max(beyond, exact_p(wins, losses)) if limit > 0 else beyond


def _most_losses(n: int, limit: float, seen: float) -> NDArray[np.int64]:
    """For 0..n wins, the largest number of losses whose score statistic is still at least `seen`; -1 for none.

    The statistic falls as losses rise, so it is found by bisection, for all wins at a time.
    """
    wins = np.arange(n + 1)
    low, high = np.full(n + 1, -1), n - wins  # low: known to be in (or none), high: candidate
    while np.any(low < high):
        middle = (low + high + 1) // 2
        inside = _score_statistics(wins, middle, n, limit) >= seen - 1e-9
        low = np.where(inside, middle, low)
        high = np.where(inside, high, middle - 1)
    return low


def _score_statistics(wins: NDArray[np.int64], losses: NDArray[np.int64], n: int, difference: float) -> Floats:
    """`score_statistic` of many counts."""
    b = (2 * n - wins + losses) * difference - wins - losses
    c = -losses * difference * (1 - difference)
    share = (np.sqrt(np.maximum(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
    variance = n * (2 * share + difference * (1 - difference))
    excess = wins - losses - n * difference
    flat = np.where(np.abs(excess) < 1e-9, 0.0, np.copysign(np.inf, excess))
    return np.where(variance > 1e-12, excess / np.sqrt(np.maximum(variance, 1e-300)), flat)


def _region_probabilities(most_losses: NDArray[np.int64], n: int, limit: float, discordance: Floats) -> Floats:
    """P(losses <= most_losses[wins]) for trinomial wins and losses, at each of several shares of discordant items."""
    win, loss = np.maximum(0.0, (discordance + limit) / 2), np.maximum(0.0, (discordance - limit) / 2)
    rest = np.clip(loss / np.maximum(1 - win, 1e-300), 0.0, 1.0)  # of an item that is no win, to be a loss
    spread = math.ceil(_WINDOW * math.sqrt(max(float((n * win * (1 - win)).max()), 1.0)) + _WINDOW)
    probabilities = np.zeros(len(discordance))
    step = max(1, _CELLS // (2 * spread + 1))
    for start in range(0, len(discordance), step):
        part = slice(start, start + step)
        wins = np.floor(n * win[part]).astype(np.int64)[:, None] + np.arange(-spread, spread + 1)
        row, column = np.nonzero((wins >= 0) & (wins <= n) & (most_losses[np.clip(wins, 0, n)] >= 0))
        counted = wins[row, column]
        terms = binom.pmf(counted, n, win[part][row]) * binom.cdf(most_losses[counted], n - counted, rest[part][row])
        probabilities[part] = np.bincount(row, terms, minlength=len(wins))
    return probabilities


# -- sums whose signs may be flipped ----------------------------------------------------------------------------------


def sign_flip_p(sums: Floats) -> float:
    """One-sided p-value of "these sums lie around zero or below": the share of sign flips with at least this total.

    Under the null each group's sum could as well have had the other sign (baseline and candidate exchanged for the
    whole group), so all 2^G flips are alike (Fisher 1935; Good, Permutation Tests, 2nd ed., 3.1). For sums of -1, 0 and
    1 this is McNemar's exact test. Whole numbers are counted exactly, by convolution, and so are the last few thousand
    flips of any numbers; else the tail is taken from the saddlepoint of the flip distribution (Lugannani and Rice,
    Advances in Applied Probability 12 (1980) 475-490; for permutation tests Robinson, JRSS B 44 (1982) 91-101), whose
    relative error is about a percent even far out, where drawing flips at random would need millions of them.

    Args:
        sums: one sum a group, (G,), of candidate minus baseline (minus the limit, for a limit other than zero).
    """
    sums = sums[np.abs(sums) > _ROUNDING]
    sizes, observed = np.abs(sums), float(sums.sum())
    if not len(sizes):
        return 1.0
    largest = float(sizes.sum())
    if abs(observed) >= largest * (1 - 1e-12):
        return float(0.5 ** len(sizes)) if observed > 0 else 1.0
    for scale in _SCALES:  # halves, thirds, tenths: what graded scores often are
        whole = np.round(sizes * scale)
        if whole.sum() <= _COUNTED and np.allclose(sizes * scale, whole, rtol=0, atol=1e-9):
            return _counted_flips(whole.astype(np.int64), observed * scale)
    few = _few_flips(sizes, (largest - abs(observed)) / 2)
    tail = _saddlepoint_flips(sizes, abs(observed)) if few is None else few
    return tail if observed > 0 else 1.0 - tail


def rare_losses_p(sums: Floats, worst: float, allowed: float = 0.0) -> float:
    """One-sided p-value of "these sums lie around zero or below", for sums whose losses are rare and large.

    Sign flips and the bootstrap both learn from the losses that were seen. Where a loss is rare, a set of few groups
    often holds none or one, and both are then far too sure. So it is asked as well how likely so few losses are if
    losses were just frequent enough to make up for the gains: P(X <= k) for X ~ Binomial(G, q), where k of the G sums
    are negative, and q times their mean size equals the mean gain (Clopper and Pearson's upper bound on the frequency
    of losses, turned into a test). Their mean size counts one loss of the worst possible size on top of those seen, so
    that a size that never came up is not taken for impossible. With many losses this test is the weaker one and has no
    say.

    Args:
        sums: one sum a group, (G,), as for `sign_flip_p`.
        worst: the size of the largest loss that one group could have.
        allowed: how much a group may lose on average, negative for what it must gain: minus the limit. It is kept apart
            from the sums, since a group that is neither better nor worse would else count as a small loss, and many of
            these would make losses look frequent and small.
    """
    losses = -sums[sums < -_ROUNDING]
    gain = float(sums[sums > _ROUNDING].sum()) / len(sums) + allowed
    size = (float(losses.sum()) + max(worst, float(losses.max(initial=0.0)))) / (len(losses) + 1)
    if gain <= 0 or size <= 0:
        return 1.0 if gain <= 0 else 0.0
    return float(binom.cdf(len(losses), len(sums), min(1.0, gain / size)))


def empirical_likelihood_p(sums: Floats, worst: float) -> float:
    """One-sided p-value of "these sums lie around zero or below", that heeds how lopsided they are.

    How unlikely are the sums under the distribution nearest to them whose mean is zero? With weights w, the likelihood
    ratio is prod(1 + t x)^-w, t the root of sum(w x / (1 + t x)) = 0, and the root of twice its logarithm is about
    standard normal (Owen, Biometrika 75 (1988) 237-249). Sign flips take gains and losses for alike, so at small levels
    they are too sure where losses are the larger and rarer ones; this likelihood is not.

    Half an observation of the worst possible loss is put to those seen, as an adjusted likelihood puts in one that
    makes the null possible at all (Chen, Variyath and Abraham, JCGS 17 (2008) 426-443, with another value). Without it,
    a loss that never came up would count as impossible. Half was chosen on simulated histories among a half, one, and
    one of the largest loss seen; `bench/gate/README.md` says at what cost in power.

    Args:
        sums: one sum a group, (G,), as for `sign_flip_p`.
        worst: the size of the largest loss that one group could have.
    """
    values, weights = np.append(sums, -worst), np.append(np.ones(len(sums)), 0.5)
    if float(weights @ values) <= _ROUNDING * float(weights @ np.abs(values)):
        return 1.0
    lowest = float(values.min())
    if lowest >= 0:
        return 0.0

    def slope(t: float) -> float:
        return float(np.sum(weights * values / (1 + t * values)))

    end = (1 - 1e-10) / -lowest
    if slope(end) > 0:
        return 0.0
    t = float(brentq(slope, 0.0, end, xtol=1e-14))
    ratio = 2 * float(np.sum(weights * np.log1p(t * values)))
    return float(norm.sf(math.sqrt(max(ratio, 0.0))))


def _counted_flips(sizes: NDArray[np.int64], observed: float) -> float:
    """P(sum of flipped sizes >= observed), exactly: the sizes that come out positive are a sum of scaled binomials."""
    total = int(sizes.sum())
    probability = np.ones(1)
    for size, count in zip(*np.unique(sizes[sizes > 0], return_counts=True), strict=True):
        steps = np.zeros(int(size) * int(count) + 1)
        steps[:: int(size)] = binom.pmf(np.arange(count + 1), count, 0.5)
        probability = np.convolve(probability, steps)
    positive = math.ceil((observed + total) / 2 - 1e-9)
    return float(min(1.0, probability[positive:].sum()))


def _few_flips(sizes: Floats, slack: float) -> float | None:
    """The same tail, by listing the sets of groups that may be negative: those of total at most `slack`.

    Only near the largest total are there few of them, and just there the saddlepoint, which sees no gaps between the
    totals, is up to a factor of two too small. None if there are more than a few thousand.
    """
    ordered = np.sort(sizes)
    limit = slack + 1e-9 * float(sizes.sum())
    if 2.0 ** np.count_nonzero(np.cumsum(ordered[:64]) <= limit) > _LISTED:  # all sets of the smallest are among them
        return None
    found, open_sets = 0, [(0, 0.0)]  # (first group that may still be added, total so far)
    while open_sets:
        start, total = open_sets.pop()
        found += 1
        within = int(np.searchsorted(ordered[start:], limit - total, side="right"))
        if found + len(open_sets) + within > _LISTED:  # each open set will be found
            return None
        open_sets += [(start + index + 1, total + float(ordered[start + index])) for index in range(within)]
    return float(found * 0.5 ** len(sizes))


def _saddlepoint_flips(sizes: Floats, observed: float) -> float:
    """The same tail, of a total that is not negative, from the cumulant generating function sum(log cosh(t x))."""
    scaled = sizes / sizes.max()
    target = observed / float(sizes.max())
    if target < 1e-9 * scaled.sum():
        return 0.5

    def slope(t: float) -> float:
        return float(np.sum(scaled * np.tanh(t * scaled))) - target

    end = 1.0
    while slope(end) < 0:
        end *= 2
        if end > 1e9:  # as good as every sign on one side
            return float(0.5 ** len(sizes))
    t = float(brentq(slope, 0.0, end, xtol=1e-13))
    tilted = t * scaled
    cumulant = float(np.sum(tilted + np.log1p(np.exp(-2 * tilted)) - math.log(2.0)))
    curvature = float(np.sum((scaled / np.cosh(np.minimum(tilted, 300.0))) ** 2))
    w = math.sqrt(max(2 * (t * target - cumulant), 0.0))
    u = t * math.sqrt(curvature)
    if w < 1e-3:
        return float(norm.sf(target / math.sqrt(float(np.sum(scaled**2)))))
    return float(min(1.0, max(norm.sf(w) + norm.pdf(w) * (1 / u - 1 / w), 0.5 ** len(sizes))))


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
        psi = max(discordance, abs(effect), abs(margin))
        spread = norm.isf(alpha) * math.sqrt(psi - margin**2) + norm.ppf(POWER) * math.sqrt(max(psi - effect**2, 0.0))
        return float(spread - math.sqrt(n) * (effect - margin))

    if shortfall(1.0) >= 0:
        return None
    return float(brentq(shortfall, margin + 1e-12, 1.0)) if shortfall(margin + 1e-12) > 0 else margin


def binomial_interval(successes: int, n: int, confidence: float) -> Interval:
    """The exact two-sided interval of a simulated rate (Clopper and Pearson)."""
    return exact_share_interval(successes, n, (1 - confidence) / 2)
