"""The suites: which expectations they hold for which task, and that each one can fail."""

from __future__ import annotations

import os
from typing import Any

import pandas as pd
import pytest

from expectations import golden_items, training_rows
from tasks.contracts.rows import Message, Row
from tasks.contracts.spec import DataSpec, TaskKind, TaskSpec
from tasks.data.facts import RowChecks, facts_of
from tasks.data.golden_slices import origin_problem
from tasks.data.suites import SuiteResult, run_suite
from tasks.data.validate import with_repeated_ids

CLASSIFY = TaskSpec(kind=TaskKind.CLASSIFY, instruction="i", labels=("a", "b"))
EXTRACT = TaskSpec(kind=TaskKind.EXTRACT, instruction="i", json_schema={"type": "object"})
CHAT = TaskSpec(kind=TaskKind.CHAT, instruction="i")
DATA = DataSpec(source="x", max_characters=1234)
COMMON = {
    "unreadable",
    "id_missing",
    "id_repeated",
    "text_blank",
    "text_too_long",
    "target_blank",
    "text_damaged",
    "target_damaged",
    "chat_roles",
    "hidden_character",
    "template_token",
    "secret",
    "personal_data",
}
FREE = COMMON | {"injection"}  # where the answer is more than one of a few labels


@pytest.mark.parametrize(
    ("task", "codes"),
    [(CLASSIFY, COMMON | {"label_unknown"}), (EXTRACT, FREE | {"schema"}), (CHAT, FREE)],
)
def test_each_kind_of_task_has_its_expectations(task: TaskSpec, codes: set[str]) -> None:
    suite = training_rows.build_suite(task, DATA)
    assert {expectation.meta["code"] for expectation in suite.expectations} == codes
    golden = golden_items.build_suite(task, DATA, min_items=3)
    extra = {"label_without_item"} if task.kind is TaskKind.CLASSIFY else set()
    assert {expectation.meta["code"] for expectation in golden.expectations} == codes | extra | {
        "text_repeated",
        "few_items",
    }


def test_the_limit_is_that_of_the_spec() -> None:
    suite = training_rows.build_suite(CLASSIFY, DATA)
    (limit,) = [each for each in suite.expectations if each.meta["code"] == "text_too_long"]
    assert limit.max_value == 1234
    assert "1,234" in limit.meta["reason"]


def golden(*targets: str, texts: tuple[str, ...] = (), min_items: int = 1) -> SuiteResult:
    texts = texts or tuple(f"text {n}" for n in range(len(targets)))
    rows = [
        Row(f"r{n}", n, (Message("user", text),), target)
        for n, (text, target) in enumerate(zip(texts, targets, strict=True))
    ]
    frame = with_repeated_ids(pd.DataFrame(facts_of(rows, RowChecks(CLASSIFY, DATA))))
    return run_suite(golden_items.build_suite(CLASSIFY, DATA, min_items=min_items), frame)


def test_a_good_golden_set_meets_its_suite() -> None:
    found = golden("a", "b", "a")
    assert (found.by_row, found.of_set) == ({}, [])
    assert all(outcome.success for outcome in found.outcomes)


@pytest.mark.parametrize(
    ("found", "of_set"),
    [
        (("a", "a"), ["no item has the label 'b'"]),
        (("a", "b"), []),
    ],
)
def test_each_label_has_an_item(found: tuple[str, ...], of_set: list[str]) -> None:
    assert golden(*found).of_set == of_set


def test_there_are_enough_items() -> None:
    assert golden("a", "b", min_items=3).of_set == ["the golden set has 2 items, at least 3 are needed"]


def test_no_text_is_asked_twice() -> None:
    found = golden("a", "b", "a", texts=("One  text", "other", "one text"))
    text = "another golden item has the same text"
    assert {row: [why.text for why in all_] for row, all_ in found.by_row.items()} == {0: [text], 2: [text]}


def test_an_item_that_was_made_has_its_original_beside_it() -> None:
    rows = [
        Row("r0", 1, (Message("user", "one"),), "a", "item r0", "typical"),
        Row("r0~noise", 2, (Message("user", "onr"),), "a", "item r0", "typed_noise"),
        Row("r1~noise", 3, (Message("user", "twp"),), "b", "item r1", "typed_noise"),
    ]
    frame = with_repeated_ids(pd.DataFrame(facts_of(rows, RowChecks(CLASSIFY, DATA))))
    by_id = {row.id: row for row in rows}
    frame = frame.assign(origin_problem=pd.Series([origin_problem(row, by_id) for row in rows], dtype=object))
    found = run_suite(golden_items.build_suite(CLASSIFY, DATA, min_items=1, made=True), frame)
    assert {row: [reason[:2] for reason in reasons] for row, reasons in found.by_row.items()} == {
        2: [("origin", "is made from an item that is not in the set")]
    }
    plain = golden_items.build_suite(CLASSIFY, DATA, min_items=1)  # as before there were slices
    assert "origin" not in {expectation.meta["code"] for expectation in plain.expectations}


def test_a_missing_id_and_an_unreadable_row_are_found() -> None:
    rows: list[dict[str, Any]] = list(
        facts_of([Row("r", 1, (Message("user", "t"),), "a")] * 2, RowChecks(CLASSIFY, DATA))
    )
    rows[0]["id"] = None
    rows[1]["unreadable"] = "text is null"
    found = run_suite(training_rows.build_suite(CLASSIFY, DATA), with_repeated_ids(pd.DataFrame(rows)))
    assert {row: [reason[:2] for reason in reasons] for row, reasons in found.by_row.items()} == {
        0: [("id_missing", "id is missing")],
        1: [("unreadable", "text is null")],
    }


def test_the_suites_call_no_one() -> None:
    assert os.environ["GX_ANALYTICS_ENABLED"] == "false"
