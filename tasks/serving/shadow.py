"""A shadow against the live version: how often they agree, who is right where they do not, and what it costs.

Where both give the same answer, both are right or both are wrong. So only disagreements need a person, and the
difference in accuracy is the share of disagreements times what reviews of them say:

    accuracy(shadow) - accuracy(live) = P(disagree) x (wins - losses) / reviewed

The reviewed ones must be drawn from the disagreements without looking at them; every one, or each with the same chance.

A shadow report is looked at while it grows, so what it decides holds at every look (`share_sequence`). The intervals
that it merely shows are the usual ones, for one look.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import betaln
from scipy.stats import binom, chi2, norm

from tasks.contracts.errors import SpecError
from tasks.contracts.observe import PairedCost, Preferred, ShadowDecision, ShadowReport, ShadowSpec
from tasks.statistics import POWER, Interval, exact_share_interval, share_interval

Floats = NDArray[np.float64]

_RESAMPLES = 1_000
_SEED = 7
_DAY = 86_400.0
_MOST = 10**9  # decided pairs; beyond, it is never


class ShadowPair(NamedTuple):
    """One request that the live version and the shadow were both asked. Holds no text.

    Attributes:
        key: of its user or session, or its own id: requests of one key are resampled together.
        at: when it came.
        agrees: whether the answers are the same; None where the shadow gave none.
        live_ms: latency of the live version.
        shadow_ms: of the shadow; None where it gave no answer.
        live_cost: money; None where it is not known.
        shadow_cost: likewise.
        review: what a person said of the two; None where nobody was asked.
    """

    key: str
    at: datetime
    agrees: bool | None
    live_ms: float | None = None
    shadow_ms: float | None = None
    live_cost: float | None = None
    shadow_cost: float | None = None
    review: Preferred | None = None


class _Counts(NamedTuple):
    pairs: int
    answered: int
    agreed: int
    wins: int
    losses: int
    ties: int

    @property
    def disagreed(self) -> int:
        return self.answered - self.agreed

    @property
    def reviewed(self) -> int:
        return self.wins + self.losses + self.ties


def shadow_report(pairs: Iterable[ShadowPair], spec: ShadowSpec) -> ShadowReport:
    """What is known so far, what it decides, and when it will be decided.

    Args:
        pairs: in any order.
        spec: margin and alpha.

    Raises:
        SpecError: no pairs, or times of which some have a zone and some have none.
    """
    known = list(pairs)
    if not known:
        raise SpecError(
            "No request has been answered by the shadow, so there is nothing to compare.",
            where="shadow",
            fix="check that the shadow runs and `shadow.share` is above 0, then wait",
        )
    if len({pair.at.tzinfo is None for pair in known}) > 1:
        raise SpecError("Some times have a zone and some have none.", where="shadow", fix="give each time a zone")
    counts = _count(known)
    failed = counts.pairs - counts.answered
    decided = counts.wins + counts.losses
    difference = _difference(counts, spec.alpha)
    decision = _decide(counts, difference, spec)
    plan = None if decision is not ShadowDecision.OPEN else _plan(counts, spec)
    span = (max(pair.at for pair in known) - min(pair.at for pair in known)).total_seconds() / _DAY
    days = _days(plan, counts, span) if plan else None
    agreement = share_interval(counts.agreed, counts.answered, 0.025)
    wins = exact_share_interval(counts.wins, decided, 0.025) if decided else Interval(0.0, 1.0)
    failures = share_interval(failed, counts.pairs, 0.025)
    return ShadowReport(
        pairs=counts.pairs,
        failed=failed,
        failed_low=failures.low,
        failed_high=failures.high,
        agreed=counts.agreed,
        agreement=counts.agreed / counts.answered if counts.answered else None,
        agreement_low=agreement.low,
        agreement_high=agreement.high,
        wins=counts.wins,
        losses=counts.losses,
        ties=counts.ties,
        win_share=counts.wins / decided if decided else None,
        win_share_low=wins.low,
        win_share_high=wins.high,
        p_value=sign_test(counts.wins, counts.losses),
        difference=_estimate(counts),
        difference_low=difference.low,
        difference_high=difference.high,
        latency=compare_costs([(pair.key, pair.live_ms, pair.shadow_ms) for pair in known]),
        cost=compare_costs([(pair.key, pair.live_cost, pair.shadow_cost) for pair in known]),
        decision=decision,
        pairs_more=plan.pairs if plan else None,
        reviews_more=plan.reviews if plan else None,
        days=days.expected if days else None,
        days_low=days.low if days else None,
        days_high=days.high if days else None,
        why=_words(counts, difference, decision, plan, days, spec),
    )


def _count(pairs: Sequence[ShadowPair]) -> _Counts:
    answered = [pair for pair in pairs if pair.agrees is not None]
    # A review of answers that agree says nothing of the difference.
    reviews = [pair.review for pair in answered if pair.agrees is False and pair.review is not None]
    wins, losses = reviews.count(Preferred.SHADOW), reviews.count(Preferred.LIVE)
    return _Counts(
        pairs=len(pairs),
        answered=len(answered),
        agreed=sum(pair.agrees is True for pair in answered),
        wins=wins,
        losses=losses,
        ties=len(reviews) - wins - losses,
    )


# -- who is right -----------------------------------------------------------------------------------------------------


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p-value of "a win is as likely as a loss", exact: twice the smaller binomial tail, at most 1.

    McNemar's test in its conditional form (Psychometrika 12 (1947) 153-157); 1 without wins and losses.
    """
    return min(1.0, 2 * float(binom.sf(max(wins, losses) - 1, wins + losses, 0.5))) if wins + losses else 1.0


def share_sequence(successes: int, n: int, alpha: float) -> Interval:
    """An interval of one share that holds at every n at once with confidence 1 - alpha.

    All shares p whose likelihood is not below alpha times that of the counts under a share drawn from Beta(1/2, 1/2):

        B(s + 1/2, n - s + 1/2) / B(1/2, 1/2) < p^s (1 - p)^(n - s) / alpha

    For the true p the ratio is a martingale that begins at 1, so by Ville's inequality it ever reaches 1 / alpha with
    probability at most alpha (Robbins, Annals of Mathematical Statistics 41 (1970) 1397-1409). One and a half times
    to twice as wide as the interval for a single look.
    """
    if n == 0:
        return Interval(0.0, 1.0)
    limit = _log_mixture(successes, n - successes) + math.log(alpha)

    def excess(share: float) -> float:
        return successes * math.log(share) + (n - successes) * math.log1p(-share) - limit

    middle = min(max(successes / n, 1e-12), 1 - 1e-12)
    low = 0.0 if successes == 0 else _root(excess, 1e-15, middle)
    high = 1.0 if successes == n else _root(excess, middle, 1 - 1e-15)
    return Interval(low, high)


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    return float(brentq(function, low, high, xtol=1e-12))


def _log_mixture(successes: int, failures: int) -> float:
    return float(betaln(successes + 0.5, failures + 0.5) - betaln(0.5, 0.5))


def _estimate(counts: _Counts) -> float | None:
    if not counts.answered or (counts.disagreed and not counts.reviewed):
        return None
    if not counts.disagreed:
        return 0.0
    return counts.disagreed / counts.answered * (counts.wins - counts.losses) / counts.reviewed


def _difference(counts: _Counts, alpha: float) -> Interval:
    """The interval of the difference at every look: P(disagree) x P(decided) x (2 P(win) - 1), each within its own.

    Half of alpha goes to the share of wins, on which the sign depends, a quarter to each of the others.
    """
    decided = counts.wins + counts.losses
    wins = share_sequence(counts.wins, decided, alpha / 2)
    disagree = share_sequence(counts.disagreed, counts.answered, alpha / 4)
    settled = share_sequence(decided, counts.reviewed, alpha / 4)
    least, most = disagree.low * settled.low, disagree.high * settled.high
    low, high = 2 * wins.low - 1, 2 * wins.high - 1
    return Interval(low * (most if low < 0 else least), high * (most if high > 0 else least))


def _decide(counts: _Counts, difference: Interval, spec: ShadowSpec) -> ShadowDecision:
    # Differing by less than the margin comes first: better by less than what matters is alike.
    if -spec.margin < difference.low and difference.high < spec.margin:
        return ShadowDecision.ALIKE
    if difference.low > 0:
        return ShadowDecision.SHADOW
    if difference.high < 0:
        return ShadowDecision.LIVE
    return ShadowDecision.OPEN


# -- when it will be decided ------------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """What is still needed."""

    pairs: int
    reviews: int


class _Days(NamedTuple):
    expected: float
    low: float
    high: float


def _plan(counts: _Counts, spec: ShadowSpec) -> _Plan | None:
    """How many more decide, with 80 % power, if the true difference is the margin and if it is none; None if unknown.

    Of the pairs that a review decides, a difference of the margin m makes (1 + m / psi) / 2 wins, psi being the share
    of all pairs that a review would decide. Of the two numbers the larger is taken.
    """
    if not counts.disagreed:
        return None
    disagree = counts.disagreed / counts.answered
    settled = (counts.wins + counts.losses) / counts.reviewed if counts.wins + counts.losses else 1.0
    found = decided_needed((1 + min(spec.margin / (disagree * settled), 1.0)) / 2, spec.alpha / 2)
    alike = _fewest(lambda decided: _shows_alike(decided, settled, disagree, spec))
    if found is None or alike is None:
        return None
    reviews = math.ceil(max(found, alike) / settled)
    pairs = math.ceil(reviews / disagree)
    return _Plan(max(0, pairs - counts.answered), max(0, reviews - counts.reviewed))


def _shows_alike(decided: int, settled: float, disagree: float, spec: ShadowSpec) -> bool:
    """Whether so many decided pairs show no difference, where wins and losses are uneven by 1.28 deviations."""
    uneven = float(norm.isf((1 - POWER) / 2)) * math.sqrt(decided)
    wins = min(decided, math.ceil((decided + uneven) / 2))
    reviewed = max(decided, round(decided / settled))
    answered = max(reviewed, round(reviewed / disagree))
    counts = _Counts(answered, answered, answered - reviewed, wins, decided - wins, reviewed - decided)
    return _decide(counts, _difference(counts, spec.alpha), spec) is ShadowDecision.ALIKE


def decided_needed(share: float, alpha: float) -> int | None:
    """The fewest decided pairs whose `share_sequence` leaves out 1/2 with 80 % power, if wins have this share.

    None if it takes more than a billion.
    """

    def enough(n: int) -> bool:
        wins = math.floor(n * share - float(norm.ppf(POWER)) * math.sqrt(n * share * (1 - share)))
        if wins <= n / 2:
            return False
        return _log_mixture(wins, n - wins) - n * math.log(0.5) >= math.log(1 / alpha)

    return _fewest(enough)


def _fewest(enough: Callable[[int], bool]) -> int | None:
    """The smallest number that is enough, if all larger ones are; None beyond a billion."""
    high = 1
    while not enough(high):
        high *= 2
        if high > _MOST:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _days(plan: _Plan, counts: _Counts, span: float) -> _Days | None:
    """How long it takes at the rates seen, of requests or of reviews, whichever is slower.

    The interval is that of a Poisson rate (Garwood, Biometrika 28 (1936) 437-442).
    """
    if span <= 0:
        return None
    parts: list[_Days] = []
    for more, seen in ((plan.pairs, counts.answered), (plan.reviews, counts.reviewed)):
        if more == 0:
            continue
        if seen == 0:
            return None
        fewest, most = float(chi2.ppf(0.025, 2 * seen)) / 2, float(chi2.ppf(0.975, 2 * seen + 2)) / 2
        parts.append(_Days(more * span / seen, more * span / most, more * span / fewest))
    return max(parts, default=_Days(0.0, 0.0, 0.0))


def _words(
    counts: _Counts,
    difference: Interval,
    decision: ShadowDecision,
    plan: _Plan | None,
    days: _Days | None,
    spec: ShadowSpec,
) -> str:
    bounds = f"between {100 * difference.low:+.1f} and {100 * difference.high:+.1f} points"
    match decision:
        case ShadowDecision.SHADOW:
            return f"The shadow is better: its accuracy differs by {bounds}."
        case ShadowDecision.LIVE:
            return f"The live version is better: the shadow's accuracy differs by {bounds}."
        case ShadowDecision.ALIKE:
            return f"They are alike: the shadow's accuracy differs by {bounds}, less than {100 * spec.margin:g}."
        case ShadowDecision.OPEN:
            pass
    if plan is None:
        return f"Open: the shadow's accuracy differs by {bounds}, and nothing yet says how much more it takes."
    needed = f"about {plan.pairs:,} more requests and {plan.reviews:,} more reviews"
    if not plan.pairs and not plan.reviews:
        return (
            f"Open: the shadow's accuracy differs by {bounds}. So many reviews decide in four of five cases, and "
            f"did not here: the difference is probably near {100 * spec.margin:g} points, or half of that."
        )
    if days is None:
        missing = "no reviews yet" if plan.reviews and not counts.reviewed else "too little time seen"
        when = f"no rate to say when ({missing})"
    else:
        when = f"at the present rate {days.expected:.1f} days ({days.low:.1f} to {days.high:.1f})"
    return (
        f"Open: the shadow's accuracy differs by {bounds}. To tell a difference of {100 * spec.margin:g} points from "
        f"none takes {needed}; {when}."
    )


# -- what it costs ----------------------------------------------------------------------------------------------------


def compare_costs(costs: Sequence[tuple[str, float | None, float | None]]) -> PairedCost | None:
    """Means and 95th percentiles on both sides with intervals of their differences; None if nothing has both sides.

    The intervals are percentiles of 1,000 bootstrap samples (Efron and Tibshirani 1993, chapter 13). Keys are drawn,
    not requests, for requests of one key are alike; with one request a key that is the bootstrap over requests.

    Args:
        costs: key, live, shadow.
    """
    known = [(key, live, shadow) for key, live, shadow in costs if live is not None and shadow is not None]
    if not known:
        return None
    keys = {key: place for place, key in enumerate(dict.fromkeys(key for key, _, _ in known))}
    of_key = np.array([keys[key] for key, _, _ in known])
    live, shadow = (np.array([pair[side] for pair in known], dtype=np.float64) for side in (1, 2))
    sums, sizes = np.bincount(of_key, shadow - live), np.bincount(of_key).astype(np.float64)
    orders = [np.argsort(side) for side in (live, shadow)]

    def tail(weights: Floats) -> tuple[float, float]:
        live_p95, shadow_p95 = (
            _p95(side[order], weights[order]) for side, order in zip((live, shadow), orders, strict=True)
        )
        return live_p95, shadow_p95

    generator = np.random.default_rng(_SEED)
    means, tails = np.empty(_RESAMPLES), np.empty(_RESAMPLES)
    for sample in range(_RESAMPLES):
        drawn = np.bincount(generator.integers(len(keys), size=len(keys)), minlength=len(keys)).astype(np.float64)
        means[sample] = drawn @ sums / (drawn @ sizes)
        live_p95, shadow_p95 = tail(drawn[of_key])
        tails[sample] = shadow_p95 - live_p95
    low, high = np.percentile(means, [2.5, 97.5])
    tail_low, tail_high = np.percentile(tails, [2.5, 97.5])
    tail_live, tail_shadow = tail(np.ones(len(known)))
    return PairedCost(
        pairs=len(known),
        live=float(live.mean()),
        shadow=float(shadow.mean()),
        difference=float((shadow - live).mean()),
        low=float(low),
        high=float(high),
        live_p95=tail_live,
        shadow_p95=tail_shadow,
        p95_difference=tail_shadow - tail_live,
        p95_low=float(tail_low),
        p95_high=float(tail_high),
    )


def _p95(ordered: Floats, weights: Floats) -> float:
    """The 95th percentile of values in order with weights: the first that 95 % of the weight reaches."""
    reached = np.cumsum(weights)
    return float(ordered[np.searchsorted(reached, 0.95 * reached[-1] - 1e-9)])
