"""The decision: paired outcomes, a policy and an error level in, a verdict with its reasons out. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tasks.contracts.references import (
    Conditions,
    ItemOutcome,
    Look,
    MetricComparison,
    Outcome,
    Requirement,
    SelfTest,
    Status,
    SystemUnderTest,
    Verdict,
)
from tasks.contracts.spec import MACRO_F1, LookPolicy, Policy
from tasks.gate.comparable import check_conditions, check_outcomes
from tasks.gate.effects import Effect, difference_of, display_intervals
from tasks.gate.looks import ladder_value
from tasks.gate.pairs import Pairs, make_pairs
from tasks.gate.plan import Plan, plan, shown_by
from tasks.gate.reasons import ladder_reasons, look_reasons, verdict_reasons
from tasks.gate.requirements import Asked, ask_all, judge_requirements


class Side(NamedTuple):
    """One model's outcomes and how they came about; `conditions` is None for a bare file, which does not say."""

    system: SystemUnderTest
    conditions: Conditions | None
    outcomes: Sequence[ItemOutcome]


class Comparison(NamedTuple):
    """Both models' outcomes on one set of items, and the classes there are (empty where there are none)."""

    baseline: Sequence[ItemOutcome]
    candidate: Sequence[ItemOutcome]
    labels: Sequence[str] = ()


@dataclass(frozen=True)
class Decision:
    """What follows from the outcomes alone; the fields mean what they mean in `Verdict`."""

    outcome: Outcome
    reasons: tuple[str, ...]
    requirements: tuple[Requirement, ...]
    metrics: tuple[MetricComparison, ...]
    p_value: float
    wins: int
    losses: int
    ties: int
    n: int
    groups: int
    smallest_effect: float | None
    items_to_settle: int | None


def decide(
    golden: Comparison,
    policy: Policy,
    *,
    level: float | None = None,
    suites: Mapping[str, Comparison] | None = None,
) -> Decision:
    """Compare two models item by item, and say what follows.

    PROMOTE if every requirement of the policy is shown at `level`, REJECT if the deciding one, or a guard after Holm's
    correction, is shown to fail, INCONCLUSIVE otherwise.

    Args:
        golden: the golden set's items, one outcome an item and side, in any order.
        policy: what is asked of the candidate.
        level: one-sided error level of this look; None takes all of `policy.alpha`, for a single look.
        suites: the items of each suite that the policy's guards ask about, by name.

    Raises:
        NotComparableError: the outcomes are not those of the same items, or the policy asks about a metric, slice,
            suite or expense that they do not have.
    """
    pairs = _pairs(golden)
    others = {name: _pairs(suite) for name, suite in (suites or {}).items()}
    return decide_pairs(pairs, others, policy, policy.alpha if level is None else level)


def decide_pairs(pairs: Pairs, suites: Mapping[str, Pairs], policy: Policy, level: float) -> Decision:
    """`decide` on arrays."""
    asked = ask_all(pairs, suites, policy, level)
    requirements = judge_requirements(asked, level)
    outcome = outcome_of(requirements)
    plans: dict[int, Plan] = {}
    if outcome is Outcome.INCONCLUSIVE:
        plans = {
            index: plan(asked[index], level) for index, one in enumerate(requirements) if one.status is Status.OPEN
        }
    change = _changes(pairs, policy)
    return Decision(
        outcome=outcome,
        reasons=verdict_reasons(outcome, asked, requirements, plans, change, policy),
        requirements=requirements,
        metrics=compare_metrics(pairs, suites, policy, level, asked[0].effect),
        p_value=requirements[0].p_value,
        wins=change[0],
        losses=change[1],
        ties=pairs.n - change[0] - change[1],
        n=pairs.n,
        groups=pairs.group_count,
        smallest_effect=shown_by(asked[0], level),
        items_to_settle=max((_in_all(asked[index], made, pairs) for index, made in plans.items()), default=None),
    )


def outcome_of(requirements: Sequence[Requirement]) -> Outcome:
    """PROMOTE if all are shown, REJECT if any is failed, else INCONCLUSIVE: the one place where a verdict is made."""
    if any(one.status is Status.FAILED for one in requirements):
        return Outcome.REJECT
    if all(one.status is Status.SHOWN for one in requirements):
        return Outcome.PROMOTE
    return Outcome.INCONCLUSIVE


def give_verdict(
    baseline: Side,
    candidate: Side,
    policy: Policy,
    *,
    look: Look,
    digests: Mapping[str, str],
    suites: Mapping[str, tuple[Side, Side]] | None = None,
    self_test: SelfTest | None = None,
) -> Verdict:
    """The verdict on two evaluations, after checking that they were made under the same conditions.

    Args:
        baseline: what runs today.
        candidate: the model that wants its place.
        policy: what is asked of the candidate.
        look: which look at the golden set this is, and the level that it may spend.
        digests: sha256 of what the verdict rests on, by name (see `Verdict`).
        suites: baseline and candidate on each suite, by name.
        self_test: how the policy did on the baseline against itself.

    Raises:
        NotComparableError: the two evaluations cannot be compared.
    """
    golden = _comparison(baseline, candidate, "")
    others = {name: _comparison(*sides, f"suite {name}: ") for name, sides in (suites or {}).items()}
    decision = decide(golden, policy, level=look.level, suites=others)
    withheld = policy.looks is LookPolicy.LADDER
    judged = decision.outcome
    if withheld and judged is Outcome.REJECT:  # the ladder lets out one bit, and "worse" would be a second
        judged = Outcome.INCONCLUSIVE
    outcome, notes = _standing(judged, look, withheld=withheld)
    if baseline.conditions is None or candidate.conditions is None:
        notes.append(
            "At least one side is a bare file of outcomes, which does not say how they were made: that prompt, "
            "decoding, engine and scorer were the same is taken on trust."
        )
    if withheld:
        rung = ladder_value(decision.metrics[0].candidate, policy.ladder_step)
        reasons = ladder_reasons(outcome, rung, policy)
    else:
        reasons = decision.reasons if outcome is decision.outcome else (notes.pop(0), *decision.reasons)
    return Verdict(
        outcome=outcome,
        reasons=(*reasons, *look_reasons(look, policy), *notes),
        policy=policy,
        requirements=decision.requirements,
        metrics=decision.metrics,
        p_value=decision.p_value,
        wins=decision.wins,
        losses=decision.losses,
        ties=decision.ties,
        n=decision.n,
        groups=decision.groups,
        smallest_effect=decision.smallest_effect,
        items_to_settle=None if withheld else decision.items_to_settle,
        look=look,
        self_test=self_test,
        withheld=withheld,
        candidate=candidate.system,
        baseline=baseline.system,
        digests=dict(digests),
    )


def _standing(outcome: Outcome, look: Look, *, withheld: bool) -> tuple[Outcome, list[str]]:
    """The verdict that stands: a candidate that was judged before is not asked again until it passes.

    The same outcomes give the same verdict. Other answers of the same models are the engine's noise, and other times or
    costs the machine's: they may take a promotion away, and they cannot give one.
    """
    first = look.first_outcome
    if first is None or (look.same_answers and outcome is first):
        return outcome, []
    others = "the same answers in another time or at another cost" if look.same_answers else "other answers"
    differ = f"This candidate was judged before on this golden set, with {others}."
    if outcome is not Outcome.PROMOTE or first is Outcome.PROMOTE:
        return outcome, [differ]
    if withheld:  # nor may the ladder let out that this time it would have passed
        return Outcome.INCONCLUSIVE, [differ]
    return Outcome.INCONCLUSIVE, [
        f"This candidate was judged before on this golden set, with {others}, and the verdict was "
        f"{first.value.upper()}. What it shows now would be enough, but asking again until it does is no evidence: it "
        "is not promoted."
    ]


def _comparison(baseline: Side, candidate: Side, where: str) -> Comparison:
    labels: tuple[str, ...] = ()
    if baseline.conditions is not None and candidate.conditions is not None:
        check_conditions(baseline.conditions, candidate.conditions, where)
        labels = baseline.conditions.decoding.choices
    return Comparison(baseline.outcomes, candidate.outcomes, labels)


def _pairs(comparison: Comparison) -> Pairs:
    left, right = check_outcomes(comparison.baseline, comparison.candidate)
    return make_pairs(left, right, comparison.labels)


# -- metrics ------------------------------------------------------------------------------------------------------


def compare_metrics(
    pairs: Pairs, suites: Mapping[str, Pairs], policy: Policy, level: float, deciding: Effect
) -> tuple[MetricComparison, ...]:
    """Every metric of both models: the deciding one first, then the others, each slice, each suite.

    Both ends of every interval are at `level`, and none is corrected for their number: they inform, the requirements
    decide.

    Args:
        pairs: the golden set's items.
        suites: the items of each suite.
        policy: what was asked.
        level: one-sided error level of each end.
        deciding: the difference on the deciding metric, which the requirements were judged by.
    """
    names = sorted(
        pairs.metrics, key=lambda name: (name != policy.metric, name.startswith("field:"), name != MACRO_F1, name)
    )
    rows = [
        _compare(pairs, name, level, deciding if name == policy.metric else difference_of(pairs, name, level))
        for name in names
    ]
    for name in pairs.slice_names():
        part = pairs.of_slice(name)
        rows.append(_compare(part, policy.metric, level, difference_of(part, policy.metric, level), slice_=name))
    guarded: dict[str, list[str]] = {}
    for guard in policy.guards:
        if guard.suite is not None:
            guarded.setdefault(guard.suite, []).append(guard.metric)
    for name, suite in suites.items():
        for metric in dict.fromkeys(guarded.get(name, suite.metrics[:1])):
            rows.append(_compare(suite, metric, level, difference_of(suite, metric, level), suite=name))
    return tuple(rows)


def _compare(
    pairs: Pairs,
    metric: str,
    level: float,
    effect: Effect,
    *,
    slice_: str | None = None,
    suite: str | None = None,
) -> MetricComparison:
    low, high = effect.interval(level, level)
    # The tests have their word here as well, so that rows read as verdicts do.
    if low > 0 and effect.p_above(0.0, level) >= level:
        low = 0.0
    if high < 0 and effect.p_below(0.0, level) >= level:
        high = 0.0
    (baseline, baseline_interval), (candidate, candidate_interval) = display_intervals(pairs, metric, effect, level)
    return MetricComparison(
        metric=metric,
        slice=slice_,
        suite=suite,
        baseline=baseline,
        baseline_low=baseline_interval.low,
        baseline_high=baseline_interval.high,
        candidate=candidate,
        candidate_low=candidate_interval.low,
        candidate_high=candidate_interval.high,
        difference=effect.estimate,
        low=low,
        high=high,
        confidence=1 - 2 * level,
        method=effect.method,
        n=pairs.n,
    )


def _changes(pairs: Pairs, policy: Policy) -> tuple[int, int]:
    """On how many items the candidate is ahead on the deciding metric, and on how many the baseline.

    Macro-F1 has no score of an item, so there it is counted who has the right class.
    """
    if policy.metric in pairs.scores:
        baseline, candidate = pairs.scores[policy.metric]
        return int((candidate > baseline).sum()), int((baseline > candidate).sum())
    before, after = (answers == pairs.targets for answers in pairs.answers)
    return int((after & ~before).sum()), int((before & ~after).sum())


def _in_all(one: Asked, made: Plan, pairs: Pairs) -> int:
    """Items of the whole golden set that hold so many of the slice."""
    return made.items if one.slice is None else -(-made.items * pairs.n // one.pairs.n)
