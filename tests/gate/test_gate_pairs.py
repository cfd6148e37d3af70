"""Outcomes side by side: which items belong together, which classes there are, and what follows for every method."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from tasks.contracts.errors import NotComparableError
from tasks.contracts.references import ItemOutcome
from tasks.contracts.spec import MACRO_F1
from tasks.gate.effects import (
    BCA,
    BCA_FLIPS,
    BCA_SWAPS,
    CLOPPER_PEARSON,
    MCNEMAR,
    Effect,
    difference_of,
    display_intervals,
    expense_ratio,
    value_of,
)
from tasks.gate.pairs import NO_CLASS, Pairs, make_pairs
from tasks.gate.statistics import exact_p, score_interval
from tests.gate.made_up import LABELS, item, labelled, scored, sides, with_column

LEVEL = 0.05


def paired(before: list[ItemOutcome], after: list[ItemOutcome], labels: tuple[str, ...] = ()) -> Pairs:
    return make_pairs(before, after, labels)


def all_bounds(effect: Effect, limit: float = 0.0) -> tuple[float, ...]:
    p_values = (effect.p_above(limit, LEVEL), effect.p_below(limit, LEVEL))
    return (effect.estimate, *effect.interval(LEVEL, LEVEL), *p_values)


# -- arrays ---------------------------------------------------------------------------------------------------------


def test_pairs_hold_both_sides_in_one_order() -> None:
    before = labelled(["cat", "dog", "cat"], [" cat\n", "bird", "dog"], group=["a", None, "a"], slice=["x", None, "y"])
    after = labelled(["cat", "dog", "cat"], ["cat", "dog", ""], group=["a", None, "a"], slice=["x", None, "y"])
    pairs = paired(before, after, LABELS)
    assert [side.tolist() for side in pairs.answers] == [[0, NO_CLASS, 1], [0, 1, NO_CLASS]]
    assert pairs.targets.tolist() == [0, 1, 0]
    assert (pairs.groups.tolist(), pairs.group_count, pairs.grouped) == ([0, 1, 0], 2, True)
    assert (pairs.slice_names(), pairs.metrics) == (["x", "y"], ["exact_match", "valid_output", MACRO_F1])
    assert [side.tolist() for side in pairs.scores["exact_match"]] == [[0.0, 0.0, 0.0], [1.0, 1.0, 0.0]]


def test_items_without_a_group_stand_alone_beside_those_with_one() -> None:
    before = scored([0, 1, 0, 1], group=[None, "a", None, "a"])
    assert paired(before, before).groups.tolist() == [0, 1, 2, 1]
    assert not paired(scored([0, 1], group=["a", "b"]), scored([0, 1], group=["a", "b"])).grouped


def test_a_slice_keeps_its_items_groups_and_classes() -> None:
    columns: dict[str, Any] = {"group": ["a", "a", "b", "b"], "slice": ["x", "y", "y", "y"]}
    pairs = paired(scored([0, 1, 1, 0], **columns), scored([1, 1, 0, 1], **columns), LABELS)
    part = pairs.of_slice("y")
    assert (part.n, part.group_count, part.groups.tolist(), part.classes) == (3, 2, [0, 1, 1], LABELS)
    assert [side.tolist() for side in part.scores["exact_match"]] == [[1.0, 1.0, 0.0], [1.0, 0.0, 1.0]]


def test_other_items_are_taken_as_often_as_they_are_named() -> None:
    before, after = sides(1, 1, 1, 0)
    pairs = paired(with_column(before, slice=["x", "y", "z"]), with_column(after, slice=["x", "y", "z"]), LABELS)
    taken = pairs.take(np.array([2, 2, 0]), np.array([0, 1, 2]))
    assert (taken.slices, taken.groups.tolist()) == (["z", "z", "x"], [1, 1, 0])
    assert [side.tolist() for side in taken.scores["exact_match"]] == [[1.0, 1.0, 0.0], [1.0, 0.0, 1.0]]
    assert pairs.take(np.array([2, 2, 0]), groups=np.array([7, 3, 7])).groups.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("targets", "before", "after", "classes"),
    [
        (["b", "a", "b", "a"], ["b", "b", "b", "b"], ["a", "a", "a", "a"], ("a", "b")),
        (["b", "a", "b", "a"], ["b", "b", "b", ""], ["", "a", "", "a"], ("a", "b")),  # an empty answer is one
        (["b ", "a", "b", " a"], ["b", "b", "b", "b"], ["a"] * 4, ("a", "b")),
        (["b", "a", "b", "a"], [""] * 4, ["a"] * 4, ()),  # a file of scores alone
        (["b", "a", "b", "a"], ["a"] * 4, [""] * 4, ()),
        (["b", "a", "b", ""], ["a"] * 4, ["a"] * 4, ()),
        (["a", "a", "a", "a"], ["a"] * 4, ["a"] * 4, ()),
        (["a", "b", "c", "a"], ["a"] * 4, ["a"] * 4, ()),  # nearly as many as items: these are no classes
    ],
)
def test_classes_come_from_the_targets_where_there_are_no_labels(
    targets: list[str], before: list[str], after: list[str], classes: tuple[str, ...]
) -> None:
    pairs = paired(labelled(targets, before), labelled(targets, after))
    assert pairs.classes == classes
    assert (MACRO_F1 in pairs.metrics) == bool(classes)
    if classes:
        assert NO_CLASS not in pairs.targets


def test_an_expense_counts_only_where_every_item_has_it() -> None:
    some, zero, all_ = [1.0, None, 2.0], [0.0, 0.0, 0.0], [0.0, 0.5, 2.0]
    for before, after, there in ((all_, all_, True), (all_, some, False), (some, all_, False), (all_, zero, False)):
        pairs = paired(scored([1, 0, 1], cost=before), scored([1, 0, 1], cost=after))
        assert ("cost" in pairs.expenses) is there
    with pytest.raises(NotComparableError, match="Not every item says its cost, which the policy limits") as refused:
        expense_ratio(pairs, "cost", LEVEL, "policy.max_cost_ratio")
    assert refused.value.where == "policy.max_cost_ratio"


def test_a_metric_that_is_not_there_is_named_with_those_that_are() -> None:
    pairs = paired(*sides(3, 1, 2, 2))
    with pytest.raises(NotComparableError, match="no polite, but exact_match, macro_f1, valid_output"):
        difference_of(pairs, "polite", LEVEL)
    bare = paired(scored([0, 1], target=["", ""]), scored([1, 1], target=["", ""]))
    with pytest.raises(NotComparableError, match="no macro_f1, but exact_match, valid_output") as refused:
        value_of(bare, MACRO_F1, 0, LEVEL)
    assert "`target` and `prediction`" in refused.value.fix


# -- which method ---------------------------------------------------------------------------------------------------


def test_the_method_follows_from_the_outcomes_alone() -> None:
    before, after = sides(8, 3, 20, 9)
    alone = paired(before, after, LABELS)
    pair = [f"g{number // 2}" for number in range(40)]
    together = paired(with_column(before, group=pair), with_column(after, group=pair), LABELS)
    one_graded = paired([*before[:-1], scored([0.5])[0]], after, LABELS)
    for pairs, metric, difference, value in (
        (alone, "exact_match", MCNEMAR, CLOPPER_PEARSON),
        (together, "exact_match", BCA_FLIPS, BCA_FLIPS),
        (one_graded, "exact_match", BCA_FLIPS, BCA_FLIPS),
        (alone, MACRO_F1, BCA_SWAPS, BCA),
        (together, MACRO_F1, BCA_SWAPS, BCA),
    ):
        assert difference_of(pairs, metric, LEVEL).method == difference
        assert value_of(pairs, metric, 0, LEVEL).method == value
    assert expense_ratio(alone, "latency_ms", LEVEL, "x").method == BCA_FLIPS


# -- groups ---------------------------------------------------------------------------------------------------------


def repeated(outcomes: list[ItemOutcome], times: int, *, grouped: bool) -> list[ItemOutcome]:
    """Every item so many times under ids of their own, in the item's group (its own, if it stands alone)."""
    return [
        one.model_copy(update={"id": f"{one.id}-{copy}", "group": (one.group or one.id) if grouped else None})
        for one in outcomes
        for copy in range(times)
    ]


@pytest.mark.parametrize("times", [2, 5])
def test_an_item_asked_again_and_again_counts_once(times: int) -> None:
    """Copies of items that stand alone: exactly McNemar's test on the items there were."""
    before, after = sides(30, 14, 60, 26)
    effect = difference_of(
        paired(repeated(before, times, grouped=True), repeated(after, times, grouped=True)), "exact_match", LEVEL
    )
    assert effect.p_above(0.0, LEVEL) == pytest.approx(max(exact_p(30, 14), effect.p_above(0.0, LEVEL)))
    assert effect.quick_above(0.0, LEVEL) == pytest.approx(exact_p(30, 14), rel=1e-9)
    low, high = effect.interval(LEVEL, LEVEL)
    assert (low, high) == pytest.approx(score_interval(30, 14, 130, LEVEL), abs=0.012)

    fooled = difference_of(
        paired(repeated(before, times, grouped=False), repeated(after, times, grouped=False)), "exact_match", LEVEL
    )
    assert fooled.p_above(0.0, LEVEL) == pytest.approx(exact_p(30 * times, 14 * times))
    narrow = fooled.interval(LEVEL, LEVEL)
    assert (narrow.high - narrow.low) == pytest.approx((high - low) / math.sqrt(times), rel=0.08)


@pytest.mark.parametrize("kind", ["right or wrong", "graded", "macro-F1", "latency"])
def test_copies_within_groups_change_neither_p_value_nor_interval(kind: str) -> None:
    rng = np.random.default_rng(2)
    group = [f"g{number}" for number in rng.integers(0, 45, 120)]
    if kind == "graded":
        before, after = scored(rng.random(120), group=group), scored(rng.random(120) ** 0.8, group=group)
    else:
        before, after = sides(28, 14, 50, 28)
        before, after = with_column(before, group=group), with_column(after, group=group)
    if kind == "latency":
        before = with_column(before, latency_ms=np.exp(rng.normal(0.0, 0.5, 120)).tolist())

    def effect(times: int) -> Effect:
        pairs = paired(repeated(before, times, grouped=True), repeated(after, times, grouped=True), LABELS)
        assert (pairs.n, pairs.group_count) == (120 * times, len(set(group)))
        if kind == "latency":
            return expense_ratio(pairs, "latency_ms", LEVEL, "x")
        return difference_of(pairs, MACRO_F1 if kind == "macro-F1" else "exact_match", LEVEL)

    limit = 1.0 if kind == "latency" else 0.0
    once, thrice = effect(1), effect(3)
    assert all_bounds(thrice, limit) == pytest.approx(all_bounds(once, limit), rel=1e-6, abs=1e-9)
    assert thrice.error == pytest.approx(once.error)


# -- which side is which, and in which order ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["right or wrong", "grouped", "graded", "macro-F1", "macro-F1, grouped"])
def test_exchanging_the_sides_mirrors_every_number_to_the_last_bit(kind: str) -> None:
    rng = np.random.default_rng(5)
    before, after = sides(24, 13, 50, 23)
    if kind == "graded":
        before, after = scored(rng.random(110)), scored(rng.random(110))
    if kind.endswith("grouped"):
        group = [f"g{number}" for number in rng.integers(0, 40, 110)]
        before, after = with_column(before, group=group), with_column(after, group=group)
    metric = MACRO_F1 if kind.startswith("macro") else "exact_match"
    there = difference_of(paired(before, after, LABELS), metric, 0.01)
    back = difference_of(paired(after, before, LABELS), metric, 0.01)
    assert there.estimate == -back.estimate != 0
    for levels in ((0.05, 0.05), (0.05, 0.01), (0.01, 0.2)):
        low, high = there.interval(*levels)
        assert (-high, -low) == back.interval(*reversed(levels))
    for limit in (0.0, 0.02, -0.05):
        assert there.p_above(limit, 0.05) == back.p_below(-limit, 0.05)
        assert there.p_below(limit, 0.05) == back.p_above(-limit, 0.05)
        assert there.quick_above(limit, 0.05) == back.quick_below(-limit, 0.05)
        assert there.quick_below(limit, 0.05) == back.quick_above(-limit, 0.05)
    assert (there.error, there.method) == (back.error, back.method)


@pytest.mark.parametrize("metric", ["exact_match", MACRO_F1])
def test_values_are_shown_with_the_side_that_they_belong_to(metric: str) -> None:
    before, after = sides(31, 12, 40, 30)
    for pairs, ahead in ((paired(before, after, LABELS), 1), (paired(after, before, LABELS), 0)):
        shown = display_intervals(pairs, metric, difference_of(pairs, metric, LEVEL), LEVEL)
        assert shown[ahead][0] == pytest.approx(71 / 113, abs=0.005)
        assert shown[1 - ahead][0] == pytest.approx(52 / 113, abs=0.005)
        for side, (value, (low, high)) in enumerate(shown):
            own = value_of(pairs, metric, side, LEVEL)
            assert value == pytest.approx(own.estimate)
            assert (low, high) == pytest.approx(own.interval(LEVEL, LEVEL), abs=0.012)


def test_bounds_stay_where_values_can_be() -> None:
    perfect, wrong = sides(30, 0, 0, 0)[1], sides(30, 0, 0, 0)[0]
    pair = [f"g{number // 2}" for number in range(30)]
    pairs = paired(with_column(wrong, group=pair), with_column(perfect, group=pair), LABELS)
    back = paired(with_column(perfect, group=pair), with_column(wrong, group=pair), LABELS)
    for metric in ("exact_match", MACRO_F1):
        assert difference_of(pairs, metric, LEVEL).interval(LEVEL, LEVEL) == (pytest.approx(0.05 ** (1 / 15)), 1.0)
        assert difference_of(back, metric, LEVEL).interval(LEVEL, LEVEL) == (-1.0, pytest.approx(-(0.05 ** (1 / 15))))
        assert value_of(pairs, metric, 1, LEVEL).interval(LEVEL, LEVEL).high == 1.0
        assert value_of(pairs, metric, 0, LEVEL).interval(LEVEL, LEVEL).low == 0.0
    graded = paired(scored([0.9, 1.0, 1.0] * 4), scored([1.0, 1.0, 0.9] * 4))
    assert value_of(graded, "exact_match", 0, 1e-6).interval(1e-6, 1e-6).high == 1.0
    cheap = paired([item(0, True), item(1, True)], scored([1, 1], latency_ms=[0.1, 30.0]))
    assert expense_ratio(cheap, "latency_ms", 1e-6, "x").interval(1e-6, 1e-6).low == 0.0
