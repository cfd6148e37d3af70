"""What holds of every verdict, whatever the outcomes: tried on outcomes that hypothesis makes up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.contracts.references import ItemOutcome, Outcome, Status
from tasks.contracts.spec import EVERY_SLICE, MACRO_F1, MetricGuard, Policy
from tasks.gate import resample
from tasks.gate.decide import Comparison, Decision, decide
from tests.gate.made_up import item

LABELS = ("a", "b", "c")
MIRRORED = {
    Outcome.PROMOTE: Outcome.REJECT,
    Outcome.REJECT: Outcome.PROMOTE,
    Outcome.INCONCLUSIVE: Outcome.INCONCLUSIVE,
}

tried = settings(deadline=None, derandomize=True, database=None, max_examples=40)


@pytest.fixture(scope="module", autouse=True)
def _few_resamples() -> Iterator[None]:
    """What is tried here holds for any number of resamples, and so many verdicts should take seconds."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(resample, "RESAMPLES", 400)
        patched.setattr(resample, "_MOST_RESAMPLES", 400)
        yield


@dataclass(frozen=True)
class Made:
    """Made-up outcomes, and the metric that decides on them."""

    baseline: list[ItemOutcome]
    candidate: list[ItemOutcome]
    metric: str

    def decided(self, level: float = 0.05, **policy: Any) -> Decision:
        return decide(
            Comparison(self.baseline, self.candidate, LABELS), Policy(metric=self.metric, **policy), level=level
        )


@st.composite
def outcomes(draw: st.DrawFn, most: int = 40, metrics: tuple[str, ...] = ("exact_match", "graded", MACRO_F1)) -> Made:
    """Two sides of 2 to `most` items, in groups or alone, of which one often is a good deal better than the other."""
    metric = draw(st.sampled_from(metrics))
    count = draw(st.integers(2, most))
    grades = st.sampled_from((0.0, 0.25, 0.6, 1.0)) if metric == "graded" else st.sampled_from((0.0, 1.0))
    scores = [draw(st.lists(grades, min_size=count, max_size=count)) for _ in range(2)]
    better = draw(st.sampled_from((None, 0, 1)))
    if better is not None:  # else hardly any verdict would be anything but open
        often = draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))
        scores[better] = [1.0 if chance else score for chance, score in zip(often, scores[better], strict=True)]
    targets = draw(st.lists(st.sampled_from(LABELS), min_size=count, max_size=count))
    answers = draw(st.lists(st.sampled_from((*LABELS, "none")), min_size=count, max_size=count))
    groups = draw(
        st.none() | st.lists(st.sampled_from((None, *range(max(2, count // 2)))), min_size=count, max_size=count)
    )
    slices = draw(st.lists(st.sampled_from(("x", "y")), min_size=count, max_size=count))
    made = [
        [
            item(
                number, True, target=target, prediction=target if score == 1.0 else answer, slice=name,
                scores={"exact_match": float(score == 1.0), "graded": score, "valid_output": 1.0},
                group=None if groups is None or groups[number] is None else f"g{groups[number]}",
            )
            for number, (score, target, answer, name) in enumerate(zip(side, targets, answers, slices, strict=True))
        ]
        for side in scores
    ]  # fmt: skip
    return Made(made[0], made[1], metric)


guards = st.builds(
    MetricGuard,
    metric=st.sampled_from(("exact_match", "graded", "valid_output", MACRO_F1)),
    slice=st.sampled_from((None, EVERY_SLICE)),
    margin=st.sampled_from((0.01, 0.2)),
    floor=st.sampled_from((None, 0.3, 0.9)),
)


@tried
@given(made=outcomes())
def test_exchanging_the_sides_turns_the_verdict_around(made: Made) -> None:
    there, back = made.decided(), Made(made.candidate, made.baseline, made.metric).decided()
    assert back.outcome is MIRRORED[there.outcome]
    assert (back.wins, back.losses, back.ties) == (there.losses, there.wins, there.ties)
    (one,), (other,) = there.requirements, back.requirements
    assert one.estimate == -other.estimate
    if one.estimate == 0:
        assert there.outcome is Outcome.INCONCLUSIVE
    else:
        assert (one.low, one.high) == (-other.high, -other.low)


@tried
@given(made=outcomes(), score=st.sampled_from((0.0, 0.6, 1.0)), at=st.integers(0, 1000), times=st.sampled_from((1, 30)))
def test_a_tie_never_turns_the_verdict_around(made: Made, score: float, at: int, times: int) -> None:
    before = made.decided().outcome
    group = made.baseline[at % len(made.baseline)].group  # of a group that is there, or alone
    ties = [
        item(
            1000 + number, True, target="a", prediction="a" if score == 1.0 else "b", slice="x", group=group,
            scores={"exact_match": float(score == 1.0), "graded": score, "valid_output": 1.0},
        )
        for number in range(times)
    ]  # fmt: skip
    after = Made([*made.baseline, *ties], [*made.candidate, *ties], made.metric).decided().outcome
    assert {before, after} != {Outcome.PROMOTE, Outcome.REJECT}


@settings(tried, max_examples=20)
@given(made=outcomes(), guard=guards, order=st.randoms(use_true_random=False))
def test_the_order_of_items_never_matters(made: Made, guard: MetricGuard, order: Any) -> None:
    shuffled = Made(
        order.sample(made.baseline, len(made.baseline)), order.sample(made.candidate, len(made.candidate)), made.metric
    )
    assert shuffled.decided(guards=(guard,)) == made.decided(guards=(guard,))


@tried
@given(
    made=outcomes(),
    asked=st.lists(guards, max_size=2, unique_by=lambda one: (one.metric, one.slice)),
    improvement=st.sampled_from((0.0, 0.05)),
    level=st.sampled_from((0.2, 0.05, 0.004)),
)
def test_a_verdict_is_what_its_requirements_say(
    made: Made, asked: list[MetricGuard], improvement: float, level: float
) -> None:
    decision = made.decided(level, guards=tuple(asked), min_improvement=improvement)
    statuses = [one.status for one in decision.requirements]
    if decision.outcome is Outcome.PROMOTE:
        assert set(statuses) == {Status.SHOWN}
    assert (decision.outcome is Outcome.REJECT) == (Status.FAILED in statuses)
    for one in decision.requirements:
        assert one.low <= one.high
        assert 0.0 <= one.p_value <= 1.0
        assert 0 < one.fail_level <= level == one.level
        if one.status is Status.SHOWN:
            assert one.p_value < level
            assert one.low > one.limit
        assert (one.status is Status.FAILED) == (one.high < one.limit)
    assert decision.requirements[0].p_value == decision.p_value
    assert (decision.items_to_settle is not None) == (decision.outcome is Outcome.INCONCLUSIVE)
    assert decision.items_to_settle is None or decision.items_to_settle > 0
    assert decision.smallest_effect is None or decision.smallest_effect > improvement
    assert all(row.low <= row.difference <= row.high for row in decision.metrics)


@tried
@given(made=outcomes(), guard=guards, another=guards)
def test_a_guard_more_never_makes_a_promotion(made: Made, guard: MetricGuard, another: MetricGuard) -> None:
    without = made.decided().outcome
    with_one = made.decided(guards=(guard,)).outcome
    assert with_one is not Outcome.PROMOTE or without is Outcome.PROMOTE
    if (guard.metric, guard.slice) != (another.metric, another.slice):
        with_two = made.decided(guards=(guard, another)).outcome
        assert with_two is not Outcome.PROMOTE or with_one is Outcome.PROMOTE


@tried
@given(made=outcomes(metrics=("exact_match", "graded")), improvement=st.sampled_from((0.0, 0.01, 0.1)))
def test_asking_for_more_never_makes_a_promotion(made: Made, improvement: float) -> None:
    promoted = [
        made.decided(level, min_improvement=asked).outcome is Outcome.PROMOTE
        for level, asked in ((0.2, improvement), (0.05, improvement), (0.05, improvement + 0.05), (0.001, 0.5))
    ]
    assert promoted == sorted(promoted, reverse=True)
