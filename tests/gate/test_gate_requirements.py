"""What a policy asks, one requirement at a time: shown, failed or open, and at which level."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tasks.contracts.errors import NotComparableError
from tasks.contracts.references import Ask, ItemOutcome, Outcome, Requirement, Status
from tasks.contracts.spec import EVERY_SLICE, MACRO_F1, MetricGuard, Objective, Policy
from tasks.gate.decide import Comparison, Decision, decide
from tasks.gate.pairs import make_pairs
from tasks.gate.requirements import ask_all, is_failed, is_shown, judge_requirements
from tasks.gate.statistics import exact_p_beyond
from tasks.statistics import exact_share_interval, holm_levels
from tests.gate.made_up import LABELS, scored, sides, with_column

SHOWN, FAILED, OPEN = Status.SHOWN, Status.FAILED, Status.OPEN


def statuses(decision: Decision) -> list[Status]:
    return [one.status for one in decision.requirements]


def guarded(before: list[ItemOutcome], after: list[ItemOutcome], **guard: Any) -> Requirement:
    """The one requirement of a guard, beside a deciding one that is open."""
    decision = decide(Comparison(before, after), Policy(guards=(MetricGuard(**guard),)))
    assert len(decision.requirements) == 2
    return decision.requirements[1]


# -- the deciding difference ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wins", "losses", "improvement", "status"),
    [
        (60, 20, 0.0, SHOWN),
        (20, 60, 0.0, FAILED),
        (40, 38, 0.0, OPEN),
        (60, 20, 0.02, SHOWN),
        (60, 20, 0.08, OPEN),
        (60, 20, 0.2, FAILED),  # better, and not by so much
        (5, 0, 0.0, SHOWN),  # 2^-5
        (4, 0, 0.0, OPEN),
    ],
)
def test_better_by_more_than_the_improvement_asked_for(
    wins: int, losses: int, improvement: float, status: Status
) -> None:
    before, after = sides(wins, losses, 200, 200 - wins - losses)
    decision = decide(Comparison(before, after), Policy(min_improvement=improvement))
    (one,) = decision.requirements
    assert (one.ask, one.metric, one.limit, one.decides) == (Ask.SUPERIOR, "exact_match", improvement, True)
    assert (one.status, one.level, one.fail_level, one.n, one.groups) == (status, 0.05, 0.05, 400, 400)
    assert one.estimate == pytest.approx((wins - losses) / 400)
    if status is SHOWN:
        assert one.p_value == exact_p_beyond(wins, losses, 400, improvement) < 0.05
        assert one.low > improvement
    else:
        assert one.p_value >= 0.05
        assert one.low <= improvement
    assert (one.high < improvement) == (status is FAILED)
    assert decision.p_value == one.p_value


@pytest.mark.parametrize(("level", "status"), [(0.05, SHOWN), (0.006, SHOWN), (0.005, OPEN), (1e-5, OPEN)])
def test_a_smaller_level_asks_for_more(level: float, status: Status) -> None:
    decision = decide(Comparison(*sides(10, 1, 30, 30)), Policy(), level=level)
    assert decision.p_value == pytest.approx(12 / 2048)  # by hand: 0.0059
    assert statuses(decision) == [status]
    assert decision.requirements[0].level == level
    assert decision.metrics[0].confidence == pytest.approx(1 - 2 * level)


# -- guards ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wins", "losses", "margin", "status"),
    [
        (10, 10, 0.05, SHOWN),
        (10, 10, 0.01, OPEN),
        (10, 30, 0.05, OPEN),
        (5, 45, 0.05, FAILED),
        (30, 10, 0.001, SHOWN),  # better is not worse
        (0, 0, 0.01, SHOWN),  # with 400 items alike, one of which would be lost in a hundred
        (0, 0, 0.001, OPEN),
    ],
)
def test_a_margin_must_be_shown_not_to_be_lost(wins: int, losses: int, margin: float, status: Status) -> None:
    one = guarded(*sides(wins, losses, 200, 200 - wins - losses), margin=margin)
    assert (one.ask, one.limit, one.status, one.decides) == (Ask.NON_INFERIOR, -margin, status, False)
    assert (one.low > -margin, one.high < -margin) == (status is SHOWN, status is FAILED)
    if status is SHOWN:
        assert one.p_value == exact_p_beyond(wins, losses, 400, -margin) < 0.05


@pytest.mark.parametrize(
    ("right", "floor", "status"),
    [
        (180, 0.8, SHOWN),
        (180, 0.9, OPEN),  # what is seen is not what is so
        (180, 0.86, OPEN),
        (180, 0.97, FAILED),
        (200, 0.98, SHOWN),  # 0.98^200 = 0.018
        (200, 0.99, OPEN),  # 0.99^200 = 0.13
        (0, 0.01, OPEN),  # 0.99^200 again, from the other side
        (0, 0.02, FAILED),
    ],
)
def test_a_floor_must_be_shown_to_be_reached(right: int, floor: float, status: Status) -> None:
    before, after = scored([1] * 200), scored([1] * right + [0] * (200 - right))
    one = guarded(before, after, floor=floor)
    assert (one.ask, one.limit, one.status, one.estimate) == (Ask.FLOOR, floor, status, right / 200)
    assert (one.low, one.high) == pytest.approx(exact_share_interval(right, 200, 0.05))
    assert one.method == "Clopper-Pearson exact"


@pytest.mark.parametrize(
    ("metric", "floor", "status"),
    [
        ("graded", 0.6, SHOWN), ("graded", 0.72, OPEN), ("graded", 0.8, FAILED),
        (MACRO_F1, 0.6, SHOWN), (MACRO_F1, 0.75, OPEN), (MACRO_F1, 0.9, FAILED),
    ],
)  # fmt: skip
def test_a_floor_for_what_has_no_closed_form(metric: str, floor: float, status: Status) -> None:
    before, after = sides(30, 30, 120, 20)
    grades = np.random.default_rng(1).beta(7, 3, 200)  # around 0.7
    before, after = (
        [
            one.model_copy(update={"scores": one.scores | {"graded": float(grade)}})
            for one, grade in zip(side, grades, strict=True)
        ]
        for side in (before, after)
    )
    one = guarded(before, after, metric=metric, floor=floor)
    assert (one.ask, one.status, one.method.split(" +")[0]) == (Ask.FLOOR, status, "BCa bootstrap")
    assert one.low < one.estimate < one.high


def test_margin_and_floor_of_one_guard_are_two_requirements() -> None:
    before, after = sides(10, 10, 170, 10)
    decision = decide(Comparison(before, after), Policy(guards=(MetricGuard(margin=0.1, floor=0.8),)))
    assert [(one.ask, one.status) for one in decision.requirements[1:]] == [
        (Ask.NON_INFERIOR, SHOWN), (Ask.FLOOR, SHOWN),
    ]  # fmt: skip


def test_a_worse_macro_f1_fails_its_guard_though_more_items_are_right() -> None:
    # The candidate gives up on a rare class, and gains twice as many items of the frequent one.
    targets = ["a"] * 340 + ["b"] * 60
    before = scored([1] * 300 + [0] * 40 + [1] * 60, target=targets, prediction=["a"] * 300 + ["b"] * 100)
    after = scored([1] * 340 + [0] * 20 + [1] * 40, target=targets, prediction=["a"] * 360 + ["b"] * 40)
    plain = decide(Comparison(before, after), Policy())
    assert plain.outcome is Outcome.PROMOTE
    after = scored([1] * 340 + [0] * 60, target=targets, prediction=["a"] * 400)
    strict = decide(Comparison(before, after), Policy(guards=(MetricGuard(metric=MACRO_F1, margin=0.02),)))
    assert strict.outcome is Outcome.REJECT
    assert strict.requirements[1].status is FAILED


# -- what an answer costs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "limit", "factor", "status"),
    [
        ("max_latency_ratio", 1.0, 0.8, SHOWN),
        ("max_latency_ratio", 0.8, 0.8, OPEN),
        ("max_latency_ratio", 0.6, 0.8, FAILED),
        ("max_latency_ratio", 1.2, 1.0, SHOWN),
        ("max_cost_ratio", 1.0, 0.8, SHOWN),
        ("max_cost_ratio", 1.0, 1.3, FAILED),
    ],
)
def test_a_ratio_must_be_shown_to_stay_below_its_limit(field: str, limit: float, factor: float, status: Status) -> None:
    rng = np.random.default_rng(3)
    expense = "latency_ms" if field == "max_latency_ratio" else "cost"
    before, after = sides(30, 20, 150, 100)
    took = np.exp(rng.normal(3.0, 0.4, (2, 300)))
    before = with_column(before, **{expense: (took[0] / took[0].mean()).tolist()})
    after = with_column(after, **{expense: (factor * took[1] / took[1].mean()).tolist()})
    decision = decide(Comparison(before, after), Policy.model_validate({field: limit}))
    one = decision.requirements[-1]
    assert (one.ask, one.metric, one.limit, one.status) == (Ask.RATIO, expense, limit, status)
    assert one.estimate == pytest.approx(factor)
    assert (one.high < limit, one.low > limit) == (status is SHOWN, status is FAILED)
    assert (one.p_value < 0.05) == (status is SHOWN)


def test_an_expense_of_nothing_has_no_ratio() -> None:
    before, after = sides(5, 5, 5, 5)
    for costs in ([0.0] * 20, [None] * 20):
        with pytest.raises(NotComparableError, match="Not every item says its cost") as refused:
            decide(
                Comparison(with_column(before, cost=costs), with_column(after, cost=[0.1] * 20)),
                Policy(max_cost_ratio=1.0),
            )
        assert refused.value.where == "policy.max_cost_ratio"


CHEAPER = Policy(objective=Objective.NON_INFERIOR_AND_CHEAPER, margin=0.05, min_saving=0.2)


@pytest.mark.parametrize(
    ("wins", "losses", "factor", "expected", "outcome"),
    [
        (10, 10, 0.6, [SHOWN, SHOWN], Outcome.PROMOTE),
        (10, 10, 0.8, [SHOWN, OPEN], Outcome.INCONCLUSIVE),
        (10, 10, 1.0, [SHOWN, FAILED], Outcome.REJECT),
        (10, 30, 0.6, [OPEN, SHOWN], Outcome.INCONCLUSIVE),
        (5, 60, 0.6, [FAILED, SHOWN], Outcome.REJECT),
        (5, 60, 1.0, [FAILED, FAILED], Outcome.REJECT),
    ],
)
def test_not_worse_and_cheaper_needs_both(
    wins: int, losses: int, factor: float, expected: list[Status], outcome: Outcome
) -> None:
    took = np.exp(np.random.default_rng(3).normal(3.0, 0.3, (2, 400)))
    before, after = sides(wins, losses, 200, 200 - wins - losses)
    before = with_column(before, latency_ms=(took[0] / took[0].mean()).tolist())
    after = with_column(after, latency_ms=(factor * took[1] / took[1].mean()).tolist())
    decision = decide(Comparison(before, after), CHEAPER)
    assert statuses(decision) == expected
    assert decision.outcome is outcome
    assert [(one.ask, one.limit, one.decides) for one in decision.requirements] == [
        (Ask.NON_INFERIOR, -0.05, True), (Ask.RATIO, 0.8, True),
    ]  # fmt: skip
    assert [one.fail_level for one in decision.requirements] == [0.05, 0.05]


# -- slices and suites ----------------------------------------------------------------------------------------------


def sliced() -> tuple[list[ItemOutcome], list[ItemOutcome]]:
    """Much better on `chat` (200 items), worse on `phone` (100)."""
    chat, phone = sides(60, 10, 100, 30), sides(3, 30, 50, 17)
    names = ["chat"] * 200 + ["phone"] * 100
    joined = [
        with_column([*one, *other], id=[f"i{number:04d}" for number in range(300)], slice=names)
        for one, other in zip(chat, phone, strict=True)
    ]
    return joined[0], joined[1]


def test_a_guard_on_every_slice_is_a_requirement_of_each() -> None:
    decision = decide(Comparison(*sliced()), Policy(guards=(MetricGuard(slice=EVERY_SLICE, margin=0.05),)))
    assert [(one.slice, one.n, one.status) for one in decision.requirements[1:]] == [
        ("chat", 200, SHOWN), ("phone", 100, FAILED),
    ]  # fmt: skip
    assert decision.requirements[0].status is SHOWN
    assert decision.outcome is Outcome.REJECT
    assert decision.reasons[0].startswith("Exact match, slice phone: not worse by 5.0 points is shown to fail")
    assert [(row.slice, row.n) for row in decision.metrics if row.slice] == [("chat", 200), ("phone", 100)]


def test_a_guard_on_one_slice_is_about_its_items_alone() -> None:
    decision = decide(Comparison(*sliced()), Policy(guards=(MetricGuard(slice="chat", margin=0.05, floor=0.7),)))
    assert [(one.ask, one.slice, one.n, one.status) for one in decision.requirements[1:]] == [
        (Ask.NON_INFERIOR, "chat", 200, SHOWN), (Ask.FLOOR, "chat", 200, SHOWN),
    ]  # fmt: skip
    assert decision.requirements[2].estimate == pytest.approx(160 / 200)
    assert decision.outcome is Outcome.PROMOTE


def test_a_guard_on_a_suite_is_about_other_items() -> None:
    policy = Policy(
        guards=(
            MetricGuard(suite="sums", margin=0.05),
            MetricGuard(suite="sums", metric="valid_output", floor=0.9),
            MetricGuard(suite="tales", metric="polite", margin=0.1),
        )
    )
    polite = [
        [one.model_copy(update={"scores": {"polite": 0.5}}) for one in side] for side in sides(0, 0, 30, 30)
    ]  # fmt: skip
    suites = {"sums": Comparison(*sides(2, 40, 50, 8)), "tales": Comparison(polite[0], polite[1])}
    decision = decide(Comparison(*sides(60, 20, 200, 120)), policy, suites=suites)
    assert [(one.suite, one.metric, one.n, one.status) for one in decision.requirements[1:]] == [
        ("sums", "exact_match", 100, FAILED), ("sums", "valid_output", 100, SHOWN), ("tales", "polite", 60, SHOWN),
    ]  # fmt: skip
    assert decision.outcome is Outcome.REJECT
    assert [(row.suite, row.metric) for row in decision.metrics if row.suite] == [
        ("sums", "exact_match"), ("sums", "valid_output"), ("tales", "polite"),
    ]  # fmt: skip
    without = decide(Comparison(*sides(60, 20, 200, 120)), Policy(), suites=suites)
    assert [(row.suite, row.metric) for row in without.metrics if row.suite] == [
        ("sums", "exact_match"), ("tales", "polite"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("policy", "says", "where"),
    [
        ({"metric": "polite"}, "no polite, but exact_match", "policy.metric"),
        ({"guards": [{"metric": "polite", "margin": 0.1}]}, "no polite", "policy.guards[0]"),
        (
            {"guards": [{"margin": 0.1}, {"metric": "polite", "floor": 0.1}]},
            "no polite",
            "policy.guards[1]",
        ),
        ({"guards": [{"slice": "phone", "margin": 0.1}]}, "guards the slice 'phone', and no item", "policy.guards[0]"),
        ({"guards": [{"slice": "*", "margin": 0.1}]}, "guards the slice '*', and no item", "policy.guards[0]"),
        ({"guards": [{"suite": "sums", "margin": 0.1}]}, "suite 'sums'", "policy.guards[0]"),
        ({"max_cost_ratio": 1.0}, "Not every item says its cost", "policy.max_cost_ratio"),
        (
            {"objective": "non_inferior_and_cheaper", "saving_in": "cost"},
            "Not every item says its cost",
            "policy.saving_in",
        ),
    ],
)
def test_what_the_outcomes_do_not_have_is_refused_with_the_place_in_the_policy(
    policy: dict[str, Any], says: str, where: str
) -> None:
    with pytest.raises(NotComparableError) as refused:
        decide(Comparison(*sides(10, 5, 20, 15)), Policy.model_validate(policy))
    assert says in str(refused.value)
    assert refused.value.where == where
    assert refused.value.fix


def test_an_unknown_slice_is_told_the_ones_there_are() -> None:
    with pytest.raises(NotComparableError) as refused:
        decide(Comparison(*sliced()), Policy(guards=(MetricGuard(slice="mail", margin=0.1),)))
    assert refused.value.fix == "name one of the slices there are: chat, phone"


# -- many guards ----------------------------------------------------------------------------------------------------


def with_metrics(counts: dict[str, tuple[int, int]], n: int = 100) -> Comparison:
    """Both sides with several metrics of right or wrong, each with so many wins and losses of n items."""
    before, after = sides(n // 2, 0, n - n // 2, 0)
    rows: tuple[list[dict[str, float]], list[dict[str, float]]] = ([], [])
    for number in range(n):
        for side, out in enumerate(rows):
            out.append(
                {
                    name: float(number >= wins + losses or (number < wins) == bool(side))
                    for name, (wins, losses) in counts.items()
                }
            )
    return Comparison(*(
        [one.model_copy(update={"scores": one.scores | extra}) for one, extra in zip(side, more, strict=True)]
        for side, more in zip((before, after), rows, strict=True)
    ))  # fmt: skip


def guards_on(*names: str, margin: float = 0.02) -> Policy:
    return Policy(guards=tuple(MetricGuard(metric=name, margin=margin) for name in names))


def test_one_guard_of_many_must_fail_more_clearly_than_one_alone() -> None:
    # 10 losses and 2 wins of 100 are more than 2 points lost with p = 0.039.
    assert exact_p_beyond(10, 2, 100, 0.02) == pytest.approx(0.0392, abs=1e-4)
    alone = decide(with_metrics({"a": (2, 10)}), guards_on("a"))
    assert (alone.outcome, alone.requirements[1].fail_level) == (Outcome.REJECT, 0.05)
    many = decide(with_metrics({"a": (2, 10), "b": (0, 0), "c": (0, 0)}), guards_on("a", "b", "c"))
    assert many.outcome is Outcome.INCONCLUSIVE
    assert [one.fail_level for one in many.requirements] == pytest.approx([0.05, 0.05 / 3, 0.05 / 3, 0.05 / 3])
    assert many.requirements[1].status is OPEN
    assert [one.level for one in many.requirements] == [0.05] * 4  # what is to be shown is not shared


def test_guards_fail_at_the_levels_of_holm() -> None:
    counts = {"a": (0, 60), "b": (2, 14), "c": (2, 10), "d": (5, 5)}
    decision = decide(with_metrics(counts), guards_on(*counts))
    p_values = [exact_p_beyond(losses, wins, 100, 0.02) for wins, losses in counts.values()]
    assert p_values[0] < 1e-9 < p_values[1] < 0.05 / 3 < p_values[2] < 0.05 < p_values[3]
    found = decision.requirements[1:]
    assert [one.fail_level for one in found] == pytest.approx(holm_levels(p_values, 0.05))
    assert [one.status is FAILED for one in found] == [True, True, False, False]


def test_a_guard_that_fails_by_the_score_test_alone_lends_no_level_to_the_next() -> None:
    # 11 losses, 2 wins: the score test says 0.021, the exact one 0.027. So Holm stops there, at 0.05 / 2.
    assert exact_p_beyond(11, 2, 100, 0.02) == pytest.approx(0.0268, abs=1e-4)
    counts = {"a": (0, 60), "b": (2, 11), "c": (2, 10)}
    decision = decide(with_metrics(counts), guards_on(*counts))
    assert [one.fail_level for one in decision.requirements[1:]] == pytest.approx([0.05 / 3, 0.025, 0.025])
    assert [one.status for one in decision.requirements[1:]] == [FAILED, OPEN, OPEN]


def test_candidates_that_meet_all_of_many_guards_are_rejected_at_most_at_the_level() -> None:
    """Twelve metrics, each lost by exactly its margin: the chance that any guard fails is at most 5 %."""
    rng = np.random.default_rng(6)
    rejected = 0
    for _ in range(400):
        drawn = rng.multinomial(100, [0.06, 0.10, 0.84], size=12)
        p_values = [exact_p_beyond(int(losses), int(wins), 100, 0.04) for wins, losses, _ in drawn]
        rejected += any(p < level for p, level in zip(p_values, holm_levels(p_values, 0.05), strict=True))
    assert rejected / 400 < 0.05 + 0.033  # three standard errors


# -- the short way --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("metric", ["exact_match", "graded", MACRO_F1])
def test_the_short_way_finds_what_the_long_way_finds(metric: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    before, after = sides(int(rng.integers(5, 30)), int(rng.integers(5, 30)), 40, 40)
    before, after = (
        [
            one.model_copy(update={"scores": one.scores | {"graded": float(one.scores["exact_match"] * draw)}})
            for one, draw in zip(side, rng.random(len(side)), strict=True)
        ]
        for side in (before, after)
    )
    policy = Policy(metric=metric, max_latency_ratio=1.2)
    after = with_column(after, latency_ms=np.exp(rng.normal(2.3, 0.5, len(after))).tolist())
    for level in (0.2, 0.05):
        asked = ask_all(make_pairs(before, after, LABELS), {}, policy, level)
        for one, found in zip(asked, judge_requirements(asked, level), strict=True):
            assert is_shown(one, level) == (found.status is SHOWN)
            assert is_failed(one, level) == (found.status is FAILED)
