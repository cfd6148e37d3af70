"""Rows that repeat or contradict each other."""

from __future__ import annotations

import random

import pytest

from tasks.contracts.rows import Message, Row
from tasks.contracts.spec import TaskSpec
from tasks.data.duplicates import Duplicates, find_duplicate_rows
from tests.data.toy_data import CHAT, CLASSIFY, EXTRACT, sentence

LONG = sentence(random.Random(1), 40)
OTHER = sentence(random.Random(2), 40)


def find(rows: list[tuple[str, str]], task: TaskSpec = CLASSIFY) -> Duplicates:
    made = [Row(f"r{n}", n + 1, (Message("user", text),), target) for n, (text, target) in enumerate(rows)]
    return find_duplicate_rows(made, task, 0.8)


@pytest.mark.parametrize(
    ("rows", "task", "kept", "reasons"),
    [
        ([(LONG, "a"), (OTHER, "b")], CLASSIFY, 2, []),
        ([("Short one", "a"), (" short  ONE", "a")], CLASSIFY, 1, ["exact_duplicate"]),
        ([("Short one", "a"), ("short one", "b")], CLASSIFY, 0, ["conflicting_labels"] * 2),
        ([("Short one", "a"), ("short one", "b")], EXTRACT, 0, ["conflicting_labels"] * 2),
        ([("Short one", "a"), ("short one", "b")], CHAT, 1, ["exact_duplicate"]),
        ([("Short one", "a"), ("Short one!", "b")], CLASSIFY, 2, []),
        ([(LONG, "a"), (LONG + " more", "a")], CLASSIFY, 1, ["near_duplicate"]),
        ([(LONG, "a"), (LONG + " more", "b")], CLASSIFY, 0, ["conflicting_labels"] * 2),
        ([(LONG, "a"), (LONG, "a"), (LONG + " more", "b")], CLASSIFY, 0, ["conflicting_labels"] * 3),
        ([(LONG, "a"), (LONG, "a"), (LONG + " more", "a")], CLASSIFY, 1, ["exact_duplicate", "near_duplicate"]),
        ([(LONG, "1"), (LONG + " more", "2")], EXTRACT, 2, []),
        ([(LONG, "1"), (LONG + " more", "1"), (LONG + " other", "2")], EXTRACT, 2, ["near_duplicate"]),
    ],
)
def test_what_stays_and_why_the_rest_goes(
    rows: list[tuple[str, str]], task: TaskSpec, kept: int, reasons: list[str]
) -> None:
    found = find(rows, task)
    assert len(found.kept) == kept
    assert sorted(one.reason for one in found.removed) == reasons
    assert sorted([*found.kept, *(one.position for one in found.removed)]) == list(range(len(rows)))


def test_each_removal_names_the_row_that_it_is_about() -> None:
    found = find([(LONG, "a"), (LONG, "a")])
    (removed,) = found.removed
    assert removed.detail == f"same text as r{found.kept[0]}"
    assert found.clusters == [(2, found.kept[0])]
    found = find([(LONG, "a"), (LONG + " more", "b")])
    assert [one.detail for one in found.removed] == ["'a' here, 'b' in r1", "'b' here, 'a' in r0"]


def test_rows_that_stay_beside_a_near_duplicate_are_linked() -> None:
    found = find([(LONG, "1"), (OTHER, "3"), (LONG + " more", "2")], EXTRACT)
    assert [set(link) for link in found.links] == [{0, 2}]


def test_the_order_of_rows_does_not_matter() -> None:
    draw = random.Random(9)
    rows = [(sentence(draw, 30), draw.choice("ab")) for _ in range(60)]
    rows += [(text + " more", target) for text, target in rows[:20]] + [(text, "a") for text, _ in rows[10:30]]
    first = find(rows)
    stays = {rows[index] for index in first.kept}
    assert 0 < len(stays) < len(rows)
    for _ in range(3):
        shuffled = draw.sample(rows, len(rows))
        assert {shuffled[index] for index in find(shuffled).kept} == stays
