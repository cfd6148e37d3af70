"""How alpha is shared over looks: the levels, that they add up, and when there is nothing left."""

from __future__ import annotations

import hashlib
import itertools
import math
from typing import Any

import pytest

from tasks.contracts.spec import Expense, LookPolicy, MetricGuard, Objective, Policy
from tasks.gate.looks import (
    MOST_LOOKS,
    answers_digest,
    budget_spent,
    ladder_value,
    look_level,
    requirements_digest,
    why_spent,
)
from tests.gate.made_up import item

SPENDING = Policy()
THREE = Policy(looks=LookPolicy.BONFERRONI, declared_looks=3)
LADDER = Policy(looks=LookPolicy.LADDER)
COARSE = Policy(looks=LookPolicy.LADDER, ladder_step=0.1)
OFF = Policy(looks=LookPolicy.OFF)


@pytest.mark.parametrize(
    ("policy", "number", "promotions", "expected"),
    [
        (SPENDING, 1, 0, 0.025),
        (SPENDING, 2, 0, 0.05 / 6),
        (SPENDING, 2, 1, 0.05 / 6),
        (SPENDING, 99, 5, 0.05 / 9900),
        (Policy(alpha=0.1), 3, 0, 0.1 / 12),
        (THREE, 1, 0, 0.05 / 3),
        (THREE, 3, 2, 0.05 / 3),
        (THREE, 4, 0, 0.0),
        (LADDER, 1, 0, 0.05 / 2 / 2),
        (LADDER, 2, 0, 0.05 / 6 / 2),
        (LADDER, 2, 1, 0.05 / 6 / 4 / 100),
        (COARSE, 5, 2, 0.05 / 30 / 8 / (6 * 100)),  # C(4, 2) = 6 pairs of looks, 10 steps each
        (Policy(looks=LookPolicy.LADDER, ladder_step=0.3), 2, 1, 0.05 / 6 / 4 / 4),  # ceil(1 / 0.3) = 4
        (OFF, 1, 0, 0.05),
        (OFF, 1000, 1, 0.05),
    ],
)
def test_level(policy: Policy, number: int, promotions: int, expected: float) -> None:
    assert look_level(policy, number, promotions) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("policy", "looks", "expected"),
    [
        (SPENDING, 0, 0.0),
        (SPENDING, 1, 0.025),
        (SPENDING, 3, 0.0375),
        (THREE, 2, 0.1 / 3),
        (THREE, 3, 0.05),
        (LADDER, 3, 0.0375),
        (OFF, 3, 0.15),
    ],
)
def test_what_is_spent(policy: Policy, looks: int, expected: float) -> None:
    assert budget_spent(policy, looks) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("policy", [SPENDING, THREE, Policy(alpha=0.2)])
def test_what_is_spent_is_the_sum_of_the_levels_and_never_more_than_alpha(policy: Policy) -> None:
    levels = [look_level(policy, number, 0) for number in range(1, 1001)]
    for looks in (1, 2, 3, 10, 1000):
        assert budget_spent(policy, looks) == pytest.approx(math.fsum(levels[:looks]), rel=1e-9)
    assert math.fsum(levels) <= policy.alpha * (1 + 1e-12)


def test_before_look_k_alpha_over_k_is_left() -> None:
    for number in range(1, MOST_LOOKS + 2):
        assert SPENDING.alpha - budget_spent(SPENDING, number - 1) == pytest.approx(SPENDING.alpha / number)


@pytest.mark.parametrize("step", [0.5, 0.34])
def test_the_ladder_holds_over_every_transcript_there_could_be(step: float) -> None:
    """Each look answers "no" or one of m steps; the levels of all looks after all answers are counted one by one."""
    policy = Policy(looks=LookPolicy.LADDER, ladder_step=step)
    answers = [None, *range(math.ceil(1 / step))]
    total = math.fsum(
        look_level(policy, number, sum(answer is not None for answer in transcript))
        for number in range(1, 8)
        for transcript in itertools.product(answers, repeat=number - 1)
    )
    expected = policy.alpha * sum((1 - 0.5**number) / (number * (number + 1)) for number in range(1, 8))
    assert total == pytest.approx(expected, rel=1e-9)
    assert total < policy.alpha


@pytest.mark.parametrize("step", [0.01, 0.05, 0.07, 0.1, 0.3, 0.5, 0.99, 1 / 3])
def test_the_ladder_lets_out_as_many_values_as_its_level_counts(step: float) -> None:
    exact = [number / 5000 for number in range(5001)]
    shown = [ladder_value(value, step) for value in exact]
    assert len(set(shown)) <= math.ceil(1 / step)
    assert shown == sorted(shown)
    assert all(-1e-12 <= above - value <= step + 1e-12 for value, above in zip(exact, shown, strict=True))
    assert (min(shown), max(shown)) == (step, 1.0)


@pytest.mark.parametrize(
    ("policy", "number", "promotions", "says"),
    [
        (SPENDING, 1, 0, None),
        (SPENDING, 99, 98, None),
        (SPENDING, 100, 0, "99 looks have been taken (alpha_spending), which leaves 1.0 % of alpha for all to come"),
        (THREE, 3, 0, None),
        (THREE, 4, 1, "3 looks taken of 3 declared (bonferroni)"),
        (
            Policy(looks=LookPolicy.BONFERRONI, declared_looks=1),
            2,
            0,
            "1 look taken of 1 declared (bonferroni)",
        ),
        (Policy(looks=LookPolicy.BONFERRONI, declared_looks=500), 500, 0, None),
        (LADDER, 99, 0, None),
        (LADDER, 100, 0, "99 looks have been taken (ladder), which leaves 1.0 % of alpha for all to come"),
        (LADDER, 4, 3, None),
        (
            LADDER,
            5,
            4,
            "after 4 looks with 4 promotions the ladder leaves the next one a level of 5e-13, "
            "which no golden set can meet",
        ),
        (OFF, 10_000, 9_999, None),
    ],
)
def test_why_spent(policy: Policy, number: int, promotions: int, says: str | None) -> None:
    assert why_spent(policy, number, promotions) == says


def test_a_ladder_of_very_many_transcripts_has_nothing_left_rather_than_an_overflow() -> None:
    fine = Policy(looks=LookPolicy.LADDER, ladder_step=1e-9)
    assert look_level(fine, 99, 98) == 0.0
    assert "level of 0" in str(why_spent(fine, 99, 98))


@pytest.mark.parametrize(("number", "promotions"), [(0, 0), (-1, 0), (1, 1), (3, 3), (3, -1)])
def test_there_is_no_such_look(number: int, promotions: int) -> None:
    with pytest.raises(ValueError, match=f"look {number} after {promotions} promotions"):
        look_level(SPENDING, number, promotions)


@pytest.mark.parametrize(
    "change",
    [
        {"metric": "valid_output"},
        {"alpha": 0.01},
        {"min_improvement": 0.02},
        {"objective": Objective.NON_INFERIOR_AND_CHEAPER},
        {"margin": 0.03},
        {"min_saving": 0.1},
        {"saving_in": Expense.COST},
        {"guards": (MetricGuard(margin=0.02),)},
        {"max_latency_ratio": 2.0},
        {"max_cost_ratio": 2.0},
        {"looks": LookPolicy.BONFERRONI, "declared_looks": 2},
        {"ladder_step": 0.02},
    ],
)
def test_what_decides_changes_the_requirements(change: dict[str, Any]) -> None:
    assert requirements_digest(Policy(**change)) != requirements_digest(Policy())


def test_whom_to_ask_is_no_requirement() -> None:
    assert requirements_digest(Policy(approval_hours=24)) == requirements_digest(Policy())


def test_answers_are_what_was_said_and_how_it_scored() -> None:
    outcomes = [item(1, True), item(0, False)]
    lines = [
        '["i0000","dog",{"exact_match":0.0,"valid_output":1.0}]',
        '["i0001","dog",{"exact_match":1.0,"valid_output":1.0}]',
    ]
    expected = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert answers_digest(outcomes) == expected
    assert answers_digest(outcomes[::-1]) == expected
    slower = [item(1, True, latency_ms=99.0, prompt_tokens=7, output_tokens=9, cost=0.1, confidence=0.4)]
    assert answers_digest([*slower, outcomes[1]]) == expected


@pytest.mark.parametrize(
    "change",
    [{"id": "other"}, {"prediction": "a dog"}, {"scores": {"exact_match": 0.5, "valid_output": 1.0}}],
)
def test_other_answers_have_another_digest(change: dict[str, Any]) -> None:
    assert answers_digest([item(1, True, **change)]) != answers_digest([item(1, True)])
