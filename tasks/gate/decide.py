"""The decision: paired outcomes and a policy in, a verdict with its reasons out. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tasks.contracts.errors import NotComparableError
from tasks.contracts.numbers import p_words, percent, points
from tasks.contracts.references import (
    Conditions,
    ItemOutcome,
    MetricComparison,
    Outcome,
    SystemUnderTest,
    Verdict,
)
from tasks.contracts.spec import Metric, Policy
from tasks.gate.comparable import check_conditions, check_outcomes
from tasks.gate.statistics import (
    POWER,
    Interval,
    bootstrap_macro_f1,
    bootstrap_means,
    exact_p,
    items_needed,
    paired_interval,
    share_interval,
    smallest_effect,
)

EXACT = "McNemar exact + Tango score"
MEANS = "paired bootstrap"

_DOES = {Metric.EXACT_MATCH: "is right on", Metric.VALID_OUTPUT: "gives a valid answer on"}


class Side(NamedTuple):
    """One model's outcomes and how they came about; `conditions` is None for a bare file, which does not say."""

    system: SystemUnderTest
    conditions: Conditions | None
    outcomes: Sequence[ItemOutcome]


@dataclass(frozen=True)
class Decision:
    """What follows from the outcomes alone; the fields mean what they mean in `Verdict`."""

    outcome: Outcome
    reasons: tuple[str, ...]
    metrics: tuple[MetricComparison, ...]
    p_value: float
    wins: int
    losses: int
    ties: int
    n: int
    items_to_settle: int | None


def outcome_of(interval: Interval, margin: float) -> Outcome:
    """The verdict that an interval of the difference gives: above the margin, below it, or neither.

    This is the only place where a verdict is made, and it looks at nothing but the interval that is shown, so table
    and verdict always agree.
    """
    if interval.low > margin:
        return Outcome.PROMOTE
    if interval.high < margin:
        return Outcome.REJECT
    return Outcome.INCONCLUSIVE


def decide(
    baseline: Sequence[ItemOutcome], candidate: Sequence[ItemOutcome], policy: Policy, labels: Sequence[str] = ()
) -> Decision:
    """Compare two models item by item on the policy's metric.

    PROMOTE if the lower bound of the paired difference is above `min_improvement`, REJECT if the upper bound is below
    it, INCONCLUSIVE otherwise. The bounds are those of `paired_interval`: with `min_improvement` 0, PROMOTE needs
    McNemar's exact one-sided test below `alpha`.

    Args:
        baseline: what runs today, one outcome an item, in any order.
        candidate: the model that wants its place, the same items.
        policy: what is asked of the candidate.
        labels: the classes there are; with them macro-F1 is compared as well.

    Raises:
        NotComparableError: the outcomes are not those of the same items, or the deciding metric is not 0 or 1.
    """
    left, right = check_outcomes(baseline, candidate)
    metric, n = policy.metric.value, len(left)
    if metric not in left[0].scores:
        raise NotComparableError(
            f"The outcomes have no {metric}, which the policy decides on, but {', '.join(sorted(left[0].scores))}.",
            where="policy.metric",
            fix="name a metric that they have, or score the answers with it",
        )
    for side, outcomes in (("baseline", left), ("candidate", right)):
        for item in outcomes:
            if item.scores[metric] not in (0.0, 1.0):
                raise NotComparableError(
                    f"The deciding metric of an item is {item.scores[metric]}, and it must be 0 (wrong) or 1 (right).",
                    where=f"{side}, item {item.id}, {metric}",
                    fix="decide on a metric that says right or wrong for each item",
                )
    metrics = compare_metrics(left, right, policy, labels)
    primary = next(comparison for comparison in metrics if comparison.metric == metric)
    wins, losses = _discordant(_scores(left, metric), _scores(right, metric))
    outcome = outcome_of(Interval(primary.low, primary.high), policy.min_improvement)
    plan = None
    if outcome is Outcome.INCONCLUSIVE:
        plan = _plan(wins, losses, n, policy)
    return Decision(
        outcome=outcome,
        reasons=_reasons(outcome, primary, wins, losses, policy, plan),
        metrics=metrics,
        p_value=exact_p(wins, losses),
        wins=wins,
        losses=losses,
        ties=n - wins - losses,
        n=n,
        items_to_settle=plan.items if plan else None,
    )


def give_verdict(baseline: Side, candidate: Side, policy: Policy, *, looks: int, digests: Mapping[str, str]) -> Verdict:
    """The verdict on two evaluations, after checking that they were made under the same conditions.

    Args:
        baseline: what runs today.
        candidate: the model that wants its place.
        policy: what is asked of the candidate.
        looks: how many different candidates this golden set has judged, this one included.
        digests: sha256 of what the verdict rests on, by name (see `Verdict`).

    Raises:
        NotComparableError: the two evaluations cannot be compared.
    """
    notes = []
    labels: tuple[str, ...] = ()
    if baseline.conditions is not None and candidate.conditions is not None:
        check_conditions(baseline.conditions, candidate.conditions)
        labels = baseline.conditions.decoding.choices
    else:
        notes.append(
            "At least one side is a bare file of outcomes, which does not say how they were made: that prompt, "
            "decoding, engine and scorer were the same is taken on trust."
        )
    if looks > 1:
        notes.append(
            f"This golden set has now judged {looks} different candidates. Each one is a new chance of a lucky "
            "promotion; freeze a fresh golden set from time to time."
        )
    decision = decide(baseline.outcomes, candidate.outcomes, policy, labels)
    return Verdict(
        outcome=decision.outcome,
        reasons=(*decision.reasons, *notes),
        policy=policy,
        metrics=decision.metrics,
        p_value=decision.p_value,
        wins=decision.wins,
        losses=decision.losses,
        ties=decision.ties,
        n=decision.n,
        items_to_settle=decision.items_to_settle,
        looks=looks,
        candidate=candidate.system,
        baseline=baseline.system,
        digests=dict(digests),
    )


# -- metrics ------------------------------------------------------------------------------------------------------


def compare_metrics(
    baseline: Sequence[ItemOutcome], candidate: Sequence[ItemOutcome], policy: Policy, labels: Sequence[str]
) -> tuple[MetricComparison, ...]:
    """Every metric of both models, the deciding one first; both sides hold the same items in the same order.

    Right-or-wrong metrics get the interval that decides and Wilson's for each value; other means, and macro-F1, get a
    paired bootstrap.
    """
    names = sorted(baseline[0].scores, key=lambda name: (name != policy.metric, name.startswith("field:"), name))
    comparisons = [_compare_scores(name, _scores(baseline, name), _scores(candidate, name), policy) for name in names]
    if labels:
        index = {label: position for position, label in enumerate(labels)}
        estimate = bootstrap_macro_f1(
            np.array([index.get(outcome.target, -1) for outcome in baseline]),
            np.array([index.get(outcome.prediction.strip(), -1) for outcome in baseline]),
            np.array([index.get(outcome.prediction.strip(), -1) for outcome in candidate]),
            len(labels),
            policy.alpha,
        )
        comparisons.insert(1, _comparison("macro_f1", *estimate, policy.alpha, MEANS, len(baseline)))
    return tuple(comparisons)


def _compare_scores(name: str, baseline: np.ndarray, candidate: np.ndarray, policy: Policy) -> MetricComparison:
    n, alpha = len(baseline), policy.alpha
    if not np.isin(np.concatenate([baseline, candidate]), (0.0, 1.0)).all():
        return _comparison(name, *bootstrap_means(baseline, candidate, alpha), alpha, MEANS, n)
    wins, losses = _discordant(baseline, candidate)
    return _comparison(
        name,
        float(baseline.mean()),
        float(candidate.mean()),
        share_interval(int(baseline.sum()), n, alpha),
        share_interval(int(candidate.sum()), n, alpha),
        paired_interval(wins, losses, n, alpha),
        alpha,
        EXACT,
        n,
        difference=(wins - losses) / n,
    )


def _comparison(
    metric: str,
    baseline: float,
    candidate: float,
    baseline_interval: Interval,
    candidate_interval: Interval,
    interval: Interval,
    alpha: float,
    method: str,
    n: int,
    difference: float | None = None,
) -> MetricComparison:
    return MetricComparison(
        metric=metric,
        baseline=baseline,
        baseline_low=baseline_interval.low,
        baseline_high=baseline_interval.high,
        candidate=candidate,
        candidate_low=candidate_interval.low,
        candidate_high=candidate_interval.high,
        difference=candidate - baseline if difference is None else difference,
        low=interval.low,
        high=interval.high,
        confidence=1 - 2 * alpha,
        method=method,
        n=n,
    )


def _scores(outcomes: Sequence[ItemOutcome], metric: str) -> np.ndarray:
    return np.array([outcome.scores[metric] for outcome in outcomes])


def _discordant(baseline: np.ndarray, candidate: np.ndarray) -> tuple[int, int]:
    """How many items only the candidate has right, and how many only the baseline."""
    return int((candidate > baseline).sum()), int((baseline > candidate).sum())


# -- what would settle it -------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """About how many `items` show with 80 % power that a difference of `effect` is not the margin.

    `shown` is the smallest difference that the present items could show, None if there is none; `observed` says
    whether `effect` is the difference that was seen.
    """

    items: int
    effect: float
    shown: float | None
    observed: bool


def _plan(wins: int, losses: int, n: int, policy: Policy) -> Plan:
    """Plan on the difference seen, unless it is too near to the margin to plan on.

    A difference of zero would ask for infinitely many items. So what is nearer to the margin than half of the smallest
    difference that these items could show counts as noise, and the plan halves that smallest difference instead.
    """
    margin, discordance = policy.min_improvement, (wins + losses) / n
    shown = smallest_effect(n, discordance, margin, policy.alpha)
    effect = (wins - losses) / n
    halved = ((1.0 if shown is None else shown) + margin) / 2
    observed = abs(effect - margin) >= halved - margin
    if not observed:
        effect = halved
    return Plan(max(items_needed(effect, discordance, margin, policy.alpha), n + 1), effect, shown, observed)


# -- words --------------------------------------------------------------------------------------------------------


def _reasons(
    outcome: Outcome, primary: MetricComparison, wins: int, losses: int, policy: Policy, plan: Plan | None
) -> tuple[str, ...]:
    does, margin, n = _DOES[policy.metric], policy.min_improvement, primary.n
    numbers = (
        f"The candidate {does} {percent(primary.candidate)} of {n:,} items, the baseline on "
        f"{percent(primary.baseline)}: {points(primary.difference)} points ({100 * primary.confidence:.0f} % interval "
        f"{points(primary.low)} to {points(primary.high)}), {p_words(exact_p(wins, losses))}."
    )
    above = "0" if margin == 0 else points(margin)
    better = "better" if margin == 0 else f"better by more than {100 * margin:.1f} points"
    match outcome:
        case Outcome.PROMOTE:
            meaning = (
                f"The whole interval lies above {above}, so the candidate is shown to be {better}; a candidate that "
                f"is not would pass with a chance of at most {100 * policy.alpha:g} %."
            )
        case Outcome.REJECT if primary.high < 0:
            meaning = "The whole interval lies below 0, so the candidate is shown to be worse than the baseline."
        case Outcome.REJECT:
            meaning = f"The whole interval lies below {above}, so the candidate is shown not to be {better}."
        case Outcome.INCONCLUSIVE:
            meaning = (
                f"The interval holds {above}, so the candidate is neither shown to be {better} nor shown not to be."
            )
    if wins + losses == 0:
        told = "The two models are right and wrong on exactly the same items, so no item tells them apart."
    else:
        told = (
            f"{wins + losses:,} of the items tell the two apart: {wins:,} only the candidate gets right, {losses:,} "
            "only the baseline."
        )
    reasons = (numbers, meaning, told)
    return reasons if plan is None else (*reasons, _plan_words(plan, n, policy))


def _plan_words(plan: Plan, n: int, policy: Policy) -> str:
    power, margin = f"{100 * POWER:.0f} % power", policy.min_improvement
    asked = "" if margin == 0 else f", of which {100 * margin:.1f} are asked for"
    if plan.shown is None:
        able = f"These {n:,} items could hardly show any difference with {power}."
    else:
        able = f"With {power}, these {n:,} items can show a difference of {points(plan.shown)} points or more{asked}."
    if plan.observed:
        return (
            f"{able} If the observed {points(plan.effect)} points are real, about {plan.items:,} items in all would "
            "settle it."
        )
    return (
        f"{able} The observed difference is too close to {points(margin) if margin else 0} to plan on; about "
        f"{plan.items:,} items in all would show one of {points(plan.effect)} points."
    )
