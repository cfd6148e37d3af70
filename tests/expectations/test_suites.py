"""The suites: which expectations they hold for which task, and that each one can fail."""

from __future__ import annotations

import os
from typing import Any

import pandas as pd
import pytest

from expectations import golden_items, training_rows
from tasks.contracts.rows import Message, Row
from tasks.contracts.spec import DataSpec, TaskKind, TaskSpec
from tasks.data.validate import SuiteResult, facts_of, run_suite, with_distinct_ids

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
}


@pytest.mark.parametrize(
    ("task", "codes"),
    [(CLASSIFY, COMMON | {"label_unknown"}), (EXTRACT, COMMON | {"schema"}), (CHAT, COMMON)],
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
    frame = with_distinct_ids(pd.DataFrame(facts_of(rows, CLASSIFY)))
    return run_suite(golden_items.build_suite(CLASSIFY, DATA, min_items=min_items), frame)


def test_a_good_golden_set_meets_its_suite() -> None:
    found = golden("a", "b", "a")
    assert (found.by_row, found.of_set) == ({}, [])
    assert found.result["success"] is True


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


def test_a_missing_id_and_an_unreadable_row_are_found() -> None:
    rows: list[dict[str, Any]] = list(facts_of([Row("r", 1, (Message("user", "t"),), "a")] * 2, CLASSIFY))
    rows[0]["id"] = None
    rows[1]["unreadable"] = "text is null"
    found = run_suite(training_rows.build_suite(CLASSIFY, DATA), with_distinct_ids(pd.DataFrame(rows)))
    assert found.by_row == {0: [("id_missing", "id is missing")], 1: [("unreadable", "text is null")]}


def test_the_suites_call_no_one() -> None:
    assert os.environ["GX_ANALYTICS_ENABLED"] == "false"
