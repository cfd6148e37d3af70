"""Scales, curves, funnels and matrices, by tables."""

from __future__ import annotations

import math

import pytest

from tasks.contracts.references import ItemOutcome
from tasks.contracts.spec import TaskKind
from tasks.report.views import (
    NO_CLASS,
    CurvePoint,
    Funnel,
    changes,
    confusion,
    curves,
    funnel_steps,
    scale,
)
from tests.report.example import LABELS, outcome, outcomes


@pytest.mark.parametrize(
    ("values", "low", "high", "step"),
    [
        ([0.0, 0.37], 0.0, 0.4, 0.1),
        ([-0.03, 0.094], -0.05, 0.1, 0.025),
        ([0.0, 0.0], 0.0, 0.2, 0.2),
        ([0, 180], 0, 200, 50),
        ([2.0, 2.0], 2.0, 2.5, 0.5),
    ],
)
def test_scales_have_round_ends(values: list[float], low: float, high: float, step: float) -> None:
    found = scale(values)
    assert (found.low, found.high, found.step) == pytest.approx((low, high, step))
    assert found.at(found.low) == 0
    assert found.at(found.high) == 100
    assert found.values()[-1] == pytest.approx(found.high)


def test_curves_place_both_losses_on_one_scale() -> None:
    found = curves(
        [CurvePoint(10, 2.0), CurvePoint(20, 1.0), CurvePoint(20, None, 0.5), CurvePoint(20, None, None, 1e-4)]
    )
    assert found is not None
    assert found.loss == "50.0,0.0 100.0,50.0"
    assert found.dev_line == "100.0,75.0"
    assert found.best == (100.0, 75.0, "0.500 at step 20")
    assert found.learning_rate == "100.0,0.0"


def test_curves_leave_out_what_is_not_finite_and_say_when_nothing_is_left() -> None:
    found = curves([CurvePoint(1, math.inf), CurvePoint(2, 1.0)])
    assert found is not None
    assert found.loss == "100.0,0.0"
    assert curves([CurvePoint(1, math.nan)]) is None
    assert curves([]) is None


def test_the_funnel_adds_up() -> None:
    steps = funnel_steps(Funnel(100, 10, {}, [], {"near_duplicate": 20, "golden_item": 5}, train=40, dev=5))
    assert [(step.name, step.kept, step.taken) for step in steps] == [
        ("Rows read", 100, 0),
        ("Quarantined", 90, 10),
        ("Near duplicate", 70, 20),
        ("Golden item", 65, 5),
        ("Not drawn", 45, 20),
    ]
    assert (steps[2].kept_width, steps[2].taken_width) == (70, 20)


def test_confusion_counts_pairs_and_keeps_answers_that_are_no_class() -> None:
    items = [
        outcome(1, "a", "a", ""),
        outcome(2, "a", "b", ""),
        outcome(3, "b", "what?", ""),
        outcome(4, "a", " a\n", ""),
    ]
    found = confusion(items, ["b", "a"])
    assert found.answers == ["a", "b", NO_CLASS]
    assert [(target, total, [cell.items for cell in cells]) for target, total, cells in found.rows] == [
        ("a", 3, [2, 1, 0]),
        ("b", 1, [0, 0, 1]),
    ]


def test_many_classes_give_the_most_frequent_mistakes() -> None:
    labels = [f"l{number}" for number in range(30)]
    items = [outcome(number, "l1", "l2", "") for number in range(3)] + [outcome(9, "l4", "l5", "")]
    found = confusion(items, labels)
    assert found.rows == []
    assert found.mistakes == [("l1", "l2", 3), ("l4", "l5", 1)]


def test_changes_add_up_to_all_items() -> None:
    before, after = outcomes(200, 0.5, 1, TaskKind.CLASSIFY), outcomes(200, 0.6, 2, TaskKind.CLASSIFY)
    found = changes(before, list(reversed(after)), "exact_match")
    assert sum(count for _, count in found.same) + len(found.gained) + len(found.lost) == 200
    assert [name for name, _ in found.same] == ["right in both", "wrong in both"]
    assert found.words == ("from wrong to right", "from right to wrong")
    assert all(item.after == item.target != item.before for item in found.gained)
    assert all(item.before == item.target != item.after for item in found.lost)
    assert [item.target for item in found.gained] == sorted(item.target for item in found.gained)
    assert set(LABELS) >= {item.target for item in found.lost}


def graded(number: int, score: float, **more: str) -> ItemOutcome:
    scores = {"exact_match": float(score == 1.0), "valid_output": 1.0, "field_match": score}
    return outcome(number, "wanted", f"scores {score}", "", scores, **more)


def test_graded_scores_are_told_with_the_largest_loss_first() -> None:
    before = [graded(1, 0.5), graded(2, 1.0, slice="phone", group="g7"), graded(3, 0.75), graded(4, 0.5)]
    after = [graded(1, 1.0), graded(2, 0.25), graded(3, 0.5), graded(4, 0.5)]
    found = changes(before, after, "field_match")
    assert [(item.id, item.before_score, item.after_score) for item in found.lost] == [
        ("c00002", "1.00", "0.25"),
        ("c00003", "0.75", "0.50"),
    ]
    assert [item.id for item in found.gained] == ["c00001"]
    assert found.lost[0].tied_to == "slice phone, group g7"
    assert found.same == [("score the same in both", 1)]
    assert found.words == ("score higher in the candidate", "score lower in the candidate")


def test_macro_f1_counts_items_by_right_and_wrong() -> None:
    before, after = outcomes(100, 0.5, 1, TaskKind.CLASSIFY), outcomes(100, 0.6, 2, TaskKind.CLASSIFY)
    assert changes(before, after, "macro_f1") == changes(before, after, "exact_match")


def test_another_metric_of_right_or_wrong_is_not_called_right() -> None:
    before, after = (
        [outcome(1, "a", "", ""), outcome(2, "a", "b", "")],
        [outcome(1, "a", "b", ""), outcome(2, "a", "b", "")],
    )
    found = changes(before, after, "valid_output")
    assert [item.id for item in found.gained] == ["c00001"]
    assert found.gained[0].before_score == ""
    assert found.same == [("score 1 in both", 1), ("score 0 in both", 0)]
