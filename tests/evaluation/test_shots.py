"""Worked examples for the few-shot prompt."""

from __future__ import annotations

import random

from tasks.contracts.rows import Message, Row
from tasks.contracts.spec import TaskSpec
from tasks.evaluation.shots import choose_shots

CLASSIFY = TaskSpec(kind="classify", instruction="Which?", labels=("card", "loan"))
EXTRACT = TaskSpec(
    kind="extract", instruction="Read.", json_schema={"type": "object", "properties": {"amount": {}, "currency": {}}}
)


def row(name: str, text: str, target: str) -> Row:
    return Row(name, 1, (Message("user", text),), target)


def test_examples_alternate_between_labels_however_rare_one_is() -> None:
    rows = [row(f"c{n}", "word " * (n + 1), "card") for n in range(50)] + [
        row("l0", "one loan", "loan"),
        row("l1", "two", "loan"),
    ]
    assert [shot.assistant for shot in choose_shots(rows, CLASSIFY, 6)] == [
        "card",
        "loan",
        "card",
        "loan",
        "card",
        "card",
    ]


def test_examples_are_short_but_not_the_shortest() -> None:
    rows = [row(f"c{n}", "x" * n, "card") for n in range(1, 102)]
    (shot,) = choose_shots(rows, CLASSIFY, 1)
    assert len(shot.user) == 26


def test_the_order_of_the_file_plays_no_part() -> None:
    rows = [row(f"c{n}", f"text {n % 7} " * 3, ("card", "loan")[n % 2]) for n in range(40)]
    shuffled = random.Random(3).sample(rows, len(rows))
    assert choose_shots(rows, CLASSIFY, 8) == choose_shots(shuffled, CLASSIFY, 8)


def test_json_examples_cover_kinds_of_answers_and_shapes_of_texts() -> None:
    rows = [row(f"a{n}", f"{n},99 €", f'{{"amount": {n}.99, "currency": "€"}}') for n in range(10, 30)]
    rows += [row("b", "USD 1.299", '{"amount": 1.299, "currency": "USD"}')]
    rows += [row("n", "free", '{"amount": null, "currency": null}')]
    shots = choose_shots(rows, EXTRACT, 3)
    assert {shot.user for shot in shots} >= {"USD 1.299", "free"}


def test_rows_of_several_turns_are_no_examples() -> None:
    turns = Row("m", 1, (Message("user", "a"), Message("assistant", "b"), Message("user", "c")), "card")
    assert choose_shots([turns], CLASSIFY, 4) == ()


def test_there_are_no_more_examples_than_rows() -> None:
    assert len(choose_shots([row("a", "text", "card")], CLASSIFY, 8)) == 1
