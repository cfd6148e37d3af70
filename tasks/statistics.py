"""Shares with their intervals, and several tests at a time: what gate and serving both reckon with.

scipy is loaded by the first call, since the gateway's hot path imports this.
"""

from __future__ import annotations

import math
from typing import NamedTuple

POWER = 0.8  # the chance of showing an effect of the size named, by convention


class Interval(NamedTuple):
    """Lower and upper bound."""

    low: float
    high: float


def share_interval(successes: int, n: int, alpha: float) -> Interval:
    """Wilson's score interval of one share, for display (Wilson, JASA 22 (1927) 209-212).

    Two-sided with confidence 1 - 2 alpha; everything from 0 to 1 where nothing was counted.
    """
    from scipy.stats import norm

    if n == 0:
        return Interval(0.0, 1.0)
    z = float(norm.isf(alpha))
    middle = (successes + z * z / 2) / (n + z * z)
    half = z * math.sqrt(successes * (n - successes) / n + z * z / 4) / (n + z * z)
    return Interval(max(0.0, middle - half), min(1.0, middle + half))


def exact_share_interval(successes: int, n: int, alpha: float) -> Interval:
    """The exact interval of one share, for decisions (Clopper and Pearson, Biometrika 26 (1934) 404-413).

    Two-sided with confidence 1 - 2 alpha, so that each end is the one-sided bound at level alpha.
    """
    from scipy.stats import beta

    low = float(beta.ppf(alpha, successes, n - successes + 1)) if successes else 0.0
    high = float(beta.isf(alpha, successes + 1, n - successes)) if successes < n else 1.0
    return Interval(low, high)


def holm_levels(p_values: list[float], alpha: float) -> list[float]:
    """The level at which each of several tests is made so that the chance of any false finding is at most `alpha`.

    Holm, Scandinavian Journal of Statistics 6 (1979) 65-70: the smallest p-value at alpha / m, the next at
    alpha / (m - 1), and so on as long as they are below; from the first that is not, all keep its level. A test is
    significant if its p-value is below its level.
    """
    levels = [0.0] * len(p_values)
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    level, going = alpha, True
    for rank, index in enumerate(order):
        if going:
            level = alpha / (len(order) - rank)
            going = p_values[index] < level
        levels[index] = level
    return levels
