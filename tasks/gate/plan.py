"""What it would take to settle what is open: the smallest effect that these items can show, and how many more would."""

from __future__ import annotations

import math
from typing import NamedTuple

from scipy.stats import norm

from tasks.gate.effects import PairedShares
from tasks.gate.requirements import Asked
from tasks.gate.statistics import items_needed, smallest_effect
from tasks.statistics import POWER


class Plan(NamedTuple):
    """About how many `items` show with 80 % power that an effect of `effect` is not the limit.

    Attributes:
        items: in all, of the set that the requirement is about.
        effect: the effect that is planned on, in units of the metric (for a ratio, of the ratio).
        shown: the effect nearest to the limit that the present items could show, None if there is none.
        observed: whether `effect` is the one that was seen.
    """

    items: int
    effect: float
    shown: float | None
    observed: bool


def plan(one: Asked, level: float) -> Plan:
    """Plan on the effect seen, unless it is too near to the limit to plan on.

    An effect at the limit would ask for infinitely many items. So what is nearer to it than half of the smallest effect
    that these items could show counts as noise, and the plan halves that smallest effect instead.

    Right-or-wrong items that stand alone are planned from their discordance (`items_needed`); all else from the
    standard error seen, which carries the groups with it: its square falls as the number of items grows (Miller 2024,
    arXiv 2411.00640, sections 2.2 and 5).
    """
    n, limit, estimate = one.pairs.n, one.limit, one.effect.estimate
    side = -1.0 if one.below else 1.0
    shown = shown_by(one, level)
    reach = (abs(shown - limit) if shown is not None else max(1.0 - side * limit, 0.1)) / 2
    observed = abs(estimate - limit) >= reach
    effect = estimate if observed else limit + side * reach
    if isinstance(one.effect, PairedShares):
        discordance = (one.effect.wins + one.effect.losses) / n
        items = items_needed(effect, discordance, limit, level)
    else:
        items = math.ceil(n * (_reach(one, level) / (effect - limit)) ** 2)
    return Plan(max(items, n + 1), effect, shown, observed)


def shown_by(one: Asked, level: float) -> float | None:
    """The effect nearest to the limit that these items show with 80 % power (the minimum detectable effect)."""
    if isinstance(one.effect, PairedShares):
        discordance = (one.effect.wins + one.effect.losses) / one.pairs.n
        return smallest_effect(one.pairs.n, discordance, one.limit, level)
    reach = _reach(one, level)
    if one.below:
        return one.limit - reach if one.limit > reach else None
    return one.limit + reach if one.limit + reach <= 1.0 else None


def _reach(one: Asked, level: float) -> float:
    """How far from the limit an effect must be to be shown with 80 % power: z standard errors.

    Groups that are all alike have no spread to plan on. Then it is as for right-or-wrong items of which only such an
    effect would tell any apart, z^2 / groups (`items_needed` with a discordance of the effect's size).
    """
    z = float(norm.isf(level)) + float(norm.ppf(POWER))
    error = one.effect.error
    return z * error if error > 1e-12 else z * z / one.pairs.group_count
