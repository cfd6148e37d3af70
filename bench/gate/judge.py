"""The gate's own code, called with as little around it as possible."""

from __future__ import annotations

from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from tasks.contracts.references import Ask, Outcome
from tasks.contracts.spec import Policy
from tasks.gate.decide import outcome_of
from tasks.gate.effects import PairedShares, difference_of
from tasks.gate.pairs import Pairs
from tasks.gate.requirements import Asked, ask_all, is_shown, judge_requirements

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

METRIC = "exact_match"


@lru_cache(maxsize=1_000_000)
def counts_promote(wins: int, losses: int, n: int, limit: float, level: float) -> bool:
    """Whether a candidate with these counts is promoted: right-or-wrong items that stand alone.

    A limit below zero is a margin: not worse by more than it.
    """
    ask = Ask.NON_INFERIOR if limit < 0 else Ask.SUPERIOR
    one = Asked(ask, METRIC, None, None, limit, PairedShares(wins, losses, n), _bare(n), decides=True)
    if not is_shown(one, level):
        return False
    return outcome_of(judge_requirements([one], level)) is Outcome.PROMOTE


def pairs_promote(pairs: Pairs, policy: Policy, level: float) -> bool:
    """Whether the candidate is promoted, on outcomes of any kind.

    `is_shown` stops at the first test that refuses, as the gate's self-test does; a promotion is judged in full.
    """
    asked = ask_all(pairs, {}, policy, level)
    if not all(is_shown(one, level) for one in asked):
        return False
    return outcome_of(judge_requirements(asked, level)) is Outcome.PROMOTE


def difference_promotes(pairs: Pairs, metric: str, limit: float, level: float) -> bool:
    """Whether one requirement on a difference is shown, and so promotes: better by `limit`, or not worse by it."""
    ask = Ask.NON_INFERIOR if limit < 0 else Ask.SUPERIOR
    one = Asked(ask, metric, None, None, limit, difference_of(pairs, metric, level), pairs, decides=True)
    if not is_shown(one, level):
        return False
    return outcome_of(judge_requirements([one], level)) is Outcome.PROMOTE


def pairs_promote_in_full(pairs: Pairs, policy: Policy, level: float) -> bool:
    """The same without the short cut."""
    return outcome_of(judge_requirements(ask_all(pairs, {}, policy, level), level)) is Outcome.PROMOTE


def score_pairs(baseline: Floats, candidate: Floats, groups: Ints | None = None) -> Pairs:
    """Scores of items, one metric, as the gate takes them. [n]"""
    n = len(baseline)
    codes = np.arange(n) if groups is None else np.unique(groups, return_inverse=True)[1].astype(np.int64)
    nothing = np.full(n, -1, dtype=np.int64)
    return Pairs({METRIC: (baseline, candidate)}, {}, codes, [None] * n, nothing, (nothing, nothing), ())


@cache
def _bare(n: int) -> Pairs:
    return score_pairs(np.zeros(n), np.zeros(n))


def rate_of(hits: int, trials: int) -> dict[str, float | int]:
    """A simulated rate with its standard error and exact 95 % interval."""
    rate = hits / trials
    bounds = binomtest(hits, trials).proportion_ci(confidence_level=0.95, method="exact")
    return {
        "hits": hits,
        "trials": trials,
        "rate": rate,
        "error": float(np.sqrt(rate * (1 - rate) / trials)),
        "low": float(bounds.low),
        "high": float(bounds.high),
    }
