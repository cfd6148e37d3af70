"""The gate tries itself on candidates that are no better, and a gate that would promote them cannot be armed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tasks.contracts.errors import NotComparableError, SpecError
from tasks.contracts.references import ItemOutcome
from tasks.contracts.spec import MACRO_F1, Expense, LookPolicy, MetricGuard, Objective, Policy
from tasks.gate import selftest
from tasks.gate.effects import PairedShares
from tasks.gate.pairs import Pairs, make_pairs
from tasks.gate.requirements import ask_all
from tasks.gate.selftest import (
    RESAMPLED,
    TWO_EVALUATIONS,
    _no_better,
    check_armed,
    may_be_armed,
    self_test,
)
from tests.gate.made_up import labelled, scored

LABELS = ("a", "b", "c")


def answered(accuracy: float, n: int, seed: int = 0, *, per_group: int | None = None) -> list[ItemOutcome]:
    """A model's answers to the same items, right on so many of them."""
    targets = [LABELS[number % 3] for number in range(n)]
    rng = np.random.default_rng(seed)
    answers = [
        target if right else LABELS[(LABELS.index(target) + 1) % 3]
        for target, right in zip(targets, rng.random(n) < accuracy, strict=True)
    ]
    group = [None if per_group is None else f"g{number // per_group}" for number in range(n)]
    return labelled(targets, answers, group=group, latency_ms=np.exp(rng.normal(3.0, 0.4, n)).tolist())


def itself(n: int = 300, accuracy: float = 0.7, **given: Any) -> Pairs:
    """A baseline on both sides."""
    outcomes = answered(accuracy, n, **given)
    return make_pairs(outcomes, outcomes, LABELS)


def graded(n: int) -> Pairs:
    outcomes = scored(np.random.default_rng(2).beta(4, 2, n))
    return make_pairs(outcomes, outcomes, ())


# -- sound policies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pairs", "policy", "histories"),
    [
        (itself(2000), Policy(), 600),
        (itself(60, accuracy=0.5), Policy(), 600),
        (itself(600), Policy(alpha=0.2), 600),
        (itself(600, per_group=4), Policy(alpha=0.1), 300),
        (itself(300), Policy(metric=MACRO_F1, alpha=0.1), 120),
        (itself(300, per_group=3), Policy(metric=MACRO_F1, alpha=0.1), 120),
        (graded(300), Policy(alpha=0.1), 120),
        (itself(200), Policy(min_improvement=0.05), 200),
    ],
    ids=[
        "many items",
        "few items",
        "another alpha",
        "groups",
        "macro-F1",
        "macro-F1 in groups",
        "graded",
        "improvement",
    ],
)
def test_a_sound_policy_promotes_about_as_often_as_it_promises(pairs: Pairs, policy: Policy, histories: int) -> None:
    result = self_test(pairs, policy, noise=RESAMPLED, histories=histories)
    assert (result.histories, result.looks, result.alpha, result.noise) == (histories, 1, policy.alpha, "resampled")
    assert result.rate == result.promotions / histories
    assert result.low <= result.rate <= result.high
    error = (policy.alpha * (1 - policy.alpha) / histories) ** 0.5
    assert result.rate <= policy.alpha + 2.6 * error
    if policy.min_improvement == 0 and pairs.n > 100:
        assert result.promotions > 0  # it is no gate that never opens
        assert result.rejections > 0
    else:
        assert result.rate <= policy.alpha
    check_armed(result, policy)


def test_two_evaluations_of_one_model_differ_by_the_noise_of_its_engine() -> None:
    first, second = answered(0.7, 400, seed=1), answered(0.7, 400, seed=2)
    result = self_test(
        make_pairs(first, second, LABELS), Policy(alpha=0.1), noise=TWO_EVALUATIONS, histories=600
    )  # fmt: skip
    assert result.noise == "two evaluations"
    assert 0.04 < result.rate < 0.135
    same = self_test(itself(400), Policy(alpha=0.1), noise=TWO_EVALUATIONS, histories=20)
    assert (same.promotions, same.rejections) == (0, 0)  # without noise nothing tells two runs apart


def test_two_evaluations_are_exchanged_group_by_group() -> None:
    first, second = (answered(0.6, 300, seed=seed, per_group=5) for seed in (1, 2))
    result = self_test(
        make_pairs(first, second, LABELS), Policy(alpha=0.1), noise=TWO_EVALUATIONS, histories=200
    )  # fmt: skip
    assert result.rate < 0.16


def test_over_many_looks_the_levels_of_the_policy_are_spent() -> None:
    shared = self_test(itself(300), Policy(alpha=0.2), noise=RESAMPLED, histories=200, looks=6)
    assert shared.looks == 6
    assert shared.rate < 0.2
    off = Policy(alpha=0.2, looks=LookPolicy.OFF)
    loose = self_test(itself(300), off, noise=RESAMPLED, histories=200, looks=6)
    assert loose.rate > 0.35  # six chances of nearly one in five each
    assert loose.low > 0.2
    assert may_be_armed(loose, off)  # it promised nothing over several looks
    assert not may_be_armed(loose, Policy(alpha=0.2))


def test_only_the_deciding_requirement_is_tried() -> None:
    plain = self_test(itself(), Policy(), noise=RESAMPLED, histories=100)
    guarded = Policy(
        guards=(MetricGuard(floor=0.999), MetricGuard(suite="none there", margin=0.1)), max_cost_ratio=1e-6
    )
    assert self_test(itself(), guarded, noise=RESAMPLED, histories=100) == plain


def test_to_be_cheaper_is_tried_on_candidates_that_are_not() -> None:
    cheaper = Policy(objective=Objective.NON_INFERIOR_AND_CHEAPER, margin=0.1, min_saving=0.1)
    result = self_test(itself(), cheaper, noise=RESAMPLED, histories=25)
    assert result.promotions <= 4
    check_armed(result, cheaper)
    with pytest.raises(NotComparableError, match="says its cost"):
        self_test(itself(), cheaper.model_copy(update={"saving_in": Expense.COST}), noise=RESAMPLED, histories=2)


def test_not_to_be_worse_is_no_promise_that_equals_would_break() -> None:
    equals = Policy(objective=Objective.NON_INFERIOR, margin=0.1)
    check_armed(self_test(itself(), equals, noise=RESAMPLED, histories=100), equals)


def test_the_same_outcomes_give_the_same_self_test() -> None:
    first = self_test(itself(), Policy(), noise=RESAMPLED, histories=50)
    assert self_test(itself(), Policy(), noise=RESAMPLED, histories=50) == first


def test_fewer_histories_are_judged_where_each_is_dear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "HISTORIES", 7)
    monkeypatch.setattr(selftest, "HISTORIES_DEAR", 3)
    assert self_test(itself(50), Policy(), noise=RESAMPLED).histories == 7
    assert self_test(itself(50, per_group=2), Policy(), noise=RESAMPLED).histories == 3
    assert self_test(itself(50), Policy(metric=MACRO_F1), noise=RESAMPLED).histories == 3


def test_a_metric_that_is_not_there_is_named() -> None:
    with pytest.raises(NotComparableError, match="no polite"):
        self_test(itself(), Policy(metric="polite"), noise=RESAMPLED)


# -- made-up candidates ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_group", [None, 4])
def test_a_made_up_candidate_is_no_better_over_all_items(per_group: int | None) -> None:
    """Before the golden set is drawn anew, every count of the candidate is that of the baseline."""
    pairs = itself(240, per_group=per_group)

    class Everything:
        """Draws each group once, in order; all else at random."""

        def __init__(self) -> None:
            self.rng = np.random.default_rng(3)

        def integers(self, low: int, high: int, size: int) -> np.ndarray[Any, Any]:
            return np.arange(size)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.rng, name)

    members = [np.flatnonzero(pairs.groups == code) for code in range(pairs.group_count)]
    made = _no_better(pairs, members, RESAMPLED, Everything())  # type: ignore[arg-type]
    before, after = made.scores["exact_match"]
    assert (before != after).sum() > 5
    assert before.sum() == after.sum()
    for label in range(3):
        of_class = made.targets == label
        assert sorted(made.answers[0][of_class]) == sorted(made.answers[1][of_class])
    assert made.expenses["latency_ms"][0].sum() == pytest.approx(made.expenses["latency_ms"][1].sum())
    assert made.group_count == pairs.group_count


def test_groups_are_drawn_whole_and_count_as_often_as_they_are_drawn() -> None:
    pairs = itself(60, per_group=3)
    members = [np.flatnonzero(pairs.groups == code) for code in range(20)]
    made = _no_better(pairs, members, RESAMPLED, np.random.default_rng(1))
    assert (made.n, made.group_count) == (60, 20)
    assert np.bincount(made.groups).tolist() == [3] * 20


# -- broken gates ---------------------------------------------------------------------------------------------------


def break_by(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate whose p-values are so many times too small, and whose bounds are drawn accordingly."""
    test, bounds = PairedShares.p_above, PairedShares.interval

    def too_small(self: PairedShares, limit: float, level: float) -> float:
        return test(self, limit, min(0.5, factor * level)) / factor

    def too_narrow(self: PairedShares, low_level: float, high_level: float) -> Any:
        return bounds(self, min(0.5, factor * low_level), min(0.5, factor * high_level))

    monkeypatch.setattr(PairedShares, "p_above", too_small)
    monkeypatch.setattr(PairedShares, "interval", too_narrow)


@pytest.mark.parametrize(("factor", "histories"), [(2, 800), (4, 300)])
def test_p_values_that_are_too_small_are_caught(monkeypatch: pytest.MonkeyPatch, factor: float, histories: int) -> None:
    pairs, policy = itself(3000, accuracy=0.6), Policy()
    sound = self_test(pairs, policy, noise=RESAMPLED, histories=histories)
    check_armed(sound, policy)
    break_by(factor, monkeypatch)
    broken = self_test(pairs, policy, noise=RESAMPLED, histories=histories)
    assert broken.rate > 1.4 * sound.rate
    assert not may_be_armed(broken, policy)
    with pytest.raises(SpecError) as refused:
        check_armed(broken, policy)
    rate, low, high = (f"{100 * share:.1f} %" for share in (broken.rate, broken.low, broken.high))
    assert str(refused.value).startswith(
        f"This policy cannot be armed: it promoted {broken.promotions:,} of {histories} made-up histories of "
        f"candidates that are no better ({rate}, 99 % interval {low} to {high}), and it promises at most 5 %."
    )
    assert refused.value.where == "policy"
    assert "larger golden set" in refused.value.fix


def test_a_gate_that_takes_groups_for_items_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs of a chatty model: within a conversation all eight answers go the same way."""
    rng = np.random.default_rng(5)
    runs = [scored(np.repeat(rng.random(50) < 0.6, 8).astype(float)) for _ in range(2)]
    group = [f"g{number // 8}" for number in range(400)]
    together = [[one.model_copy(update={"group": name}) for one, name in zip(run, group, strict=True)] for run in runs]
    pairs = make_pairs(together[0], together[1], ())
    sound = self_test(pairs, Policy(), noise=TWO_EVALUATIONS, histories=150)
    check_armed(sound, Policy())

    asked: Callable[..., Any] = ask_all

    def blind(made: Pairs, *rest: Any) -> Any:
        return asked(made.take(np.arange(made.n), groups=np.arange(made.n)), *rest)

    monkeypatch.setattr("tasks.gate.selftest.ask_all", blind)
    broken = self_test(pairs, Policy(), noise=TWO_EVALUATIONS, histories=150)
    assert broken.rate > 0.2
    with pytest.raises(SpecError, match="cannot be armed"):
        check_armed(broken, Policy())
