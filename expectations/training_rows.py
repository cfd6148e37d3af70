"""What we expect of each row that a model may learn from.

The suite looks at a frame of facts about the rows, one line a row, and not at the rows themselves: the facts are small
whatever the rows' length, and the Data Docs show no one's text. Columns (`null` where a fact does not apply):

| column | holds |
|---|---|
| `row` | index of the row, to find it again |
| `unreadable` | why the row could not be used at all; null for a usable row |
| `id` | the row's id |
| `id_of_distinct_row` | the id, null for a repetition of a row with the same id and content |
| `text_characters`, `text_visible_characters` | length of the input, and without white space |
| `target`, `target_visible_characters` | the answer wanted (classify only), and its length without white space |
| `text_damage`, `target_damage` | the first character that a wrong encoding leaves behind, and where |
| `schema_problem` | why the answer does not fit the JSON Schema (extract only) |
| `role_problem` | what is wrong with the order of the chat turns |
"""

from __future__ import annotations

from typing import Any

import great_expectations as gx
from great_expectations import expectations as gxe

from tasks.contracts.spec import DataSpec, TaskKind, TaskSpec


def reason(code: str, text: str) -> dict[str, str]:
    """The meta data of an expectation: a code to count by, and what a failing row is told; `{value}` is its value."""
    return {"code": code, "reason": text}


def row_expectations(task: TaskSpec, data: DataSpec) -> list[Any]:
    """The expectations that every single row has to meet."""
    limit = data.max_characters
    expectations = [
        gxe.ExpectColumnValuesToBeNull(
            column="unreadable",
            meta=reason("unreadable", "{value}"),
            notes="Every row has its fields, of the right type.",
        ),
        gxe.ExpectColumnValuesToNotBeNull(
            column="id", meta=reason("id_missing", "id is missing"), notes="Every row has an id."
        ),
        gxe.ExpectColumnValuesToBeUnique(
            column="id_of_distinct_row",
            meta=reason("id_repeated", "id {value!r} names several rows that differ"),
            notes="An id names one row. Repetitions of a whole row are removed later.",
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="text_visible_characters",
            min_value=1,
            meta=reason("text_blank", "text is blank"),
            notes="The input says something.",
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="text_characters",
            max_value=limit,
            meta=reason("text_too_long", f"text has {{value:,}} characters, the limit is {limit:,}"),
            notes="The input is no longer than `data.max_characters`.",
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="target_visible_characters",
            min_value=1,
            meta=reason("target_blank", "target is blank"),
            notes="There is an answer.",
        ),
        gxe.ExpectColumnValuesToBeNull(
            column="text_damage",
            meta=reason("text_damaged", "text is damaged: {value}"),
            notes="The input has no trace of a wrong encoding.",
        ),
        gxe.ExpectColumnValuesToBeNull(
            column="target_damage",
            meta=reason("target_damaged", "target is damaged: {value}"),
            notes="The answer has no trace of a wrong encoding.",
        ),
        gxe.ExpectColumnValuesToBeNull(
            column="role_problem",
            meta=reason("chat_roles", "{value}"),
            notes="A system turn comes first or not at all, then user and assistant take turns; the answer follows.",
        ),
    ]
    if task.kind is TaskKind.CLASSIFY:
        expectations.append(
            gxe.ExpectColumnValuesToBeInSet(
                column="target",
                value_set=list(task.labels),
                meta=reason("label_unknown", "label {value!r} is none of the task's labels"),
                notes="Each label is one of `task.labels`.",
            )
        )
    if task.kind is TaskKind.EXTRACT:
        expectations.append(
            gxe.ExpectColumnValuesToBeNull(
                column="schema_problem",
                meta=reason("schema", "target does not fit the schema: {value}"),
                notes="Each answer fits `task.json_schema`.",
            )
        )
    return expectations


def build_suite(task: TaskSpec, data: DataSpec) -> Any:
    """The suite `training_rows`."""
    return gx.ExpectationSuite(name="training_rows", expectations=row_expectations(task, data))
