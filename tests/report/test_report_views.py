"""Scales, curves, funnels and matrices, by tables."""

from __future__ import annotations

import math

import pytest

from tasks.contracts.numbers import metric_name, p_words, percent, points
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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (percent(0.785), "78.5 %"),
        (percent(331 / 400), "82.8 %"),  # 82.75: halves go up, as people round
        (points(121 / 400), "+30.3"),
        (points(-0.02), "−2.0"),
        (points(0.0), "0.0"),
        (points(-0.0001), "0.0"),
        (p_words(0.00001), "p < 0.0001"),
        (p_words(0.0031), "p = 0.0031"),
        (p_words(0.5), "p = 0.500"),
        (metric_name("field:amount"), "Field: amount"),
        (metric_name("schema_valid"), "Schema valid"),
    ],
)
def test_numbers_read_as_people_write_them(text: str, expected: str) -> None:
    assert text == expected


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
    assert found.both_right + found.both_wrong + len(found.gained) + len(found.lost) == 200
    assert all(item.after == item.target != item.before for item in found.gained)
    assert all(item.before == item.target != item.after for item in found.lost)
    assert [item.target for item in found.gained] == sorted(item.target for item in found.gained)
    assert set(LABELS) >= {item.target for item in found.lost}
