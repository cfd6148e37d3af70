"""What we expect of a golden set: each item as good as a training row, and the set as a whole fit to judge by.

Beside the columns of `expectations.training_rows` the frame has `text_identity`, the hash of the normalised input, and,
where items were made from others, `origin_problem`: what is wrong between an item and its original; null for none.
"""

from __future__ import annotations

from typing import Any

import great_expectations as gx
from great_expectations import expectations as gxe

from expectations.training_rows import reason, row_expectations
from tasks.contracts.spec import DataSpec, TaskKind, TaskSpec


def build_suite(task: TaskSpec, data: DataSpec, *, min_items: int, made: bool = False) -> Any:
    """The suite `golden_items`; `min_items` is how many items there have to be, `made` whether some were made."""
    expectations = [
        *row_expectations(task, data),
        gxe.ExpectColumnValuesToBeUnique(
            column="text_identity",
            meta=reason("text_repeated", "another golden item has the same text"),
            notes="No input is asked twice.",
        ),
        gxe.ExpectTableRowCountToBeBetween(
            min_value=min_items,
            meta=reason("few_items", f"the golden set has {{value:,}} items, at least {min_items:,} are needed"),
            notes="Enough items to tell two models apart.",
        ),
    ]
    if made:
        expectations.append(
            gxe.ExpectColumnValuesToBeNull(
                column="origin_problem",
                meta=reason("origin", "{value}"),
                notes="An item that was made has its original in the set, with the same answer, in the same group.",
            )
        )
    if task.kind is TaskKind.CLASSIFY:
        expectations.append(
            gxe.ExpectColumnDistinctValuesToContainSet(
                column="target",
                value_set=list(task.labels),
                meta=reason("label_without_item", "no item has the label {value}"),
                notes="Each label of the task is asked for at least once.",
            )
        )
    return gx.ExpectationSuite(name="golden_items", expectations=expectations)
