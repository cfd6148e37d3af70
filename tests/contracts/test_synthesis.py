"""What a specification of synthesis refuses before anything is asked."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from tasks.contracts.spec import TaskKind
from tasks.contracts.synthesis import SynthesizeSpec

CLASSIFY = {"kind": "classify", "instruction": "Which team?", "labels": ["billing", "support"]}
EXTRACT = {"kind": "extract", "instruction": "Write JSON.", "json_schema": {"type": "object"}}
GOOD: dict[str, Any] = {
    "name": "toy",
    "task": CLASSIFY,
    "data": {"source": "rows.jsonl"},
    "golden": {"path": "golden"},
    "teacher": {"url": "http://127.0.0.1:8000/v1", "model": "big"},
    "fill": [{"label": "billing", "rows": 3}],
}
IN_SLICES = {"source": "rows.jsonl", "slice_field": "channel"}


def test_a_good_one_can_be_read_and_written() -> None:
    spec = SynthesizeSpec.model_validate(GOOD)
    assert SynthesizeSpec.model_validate_json(spec.model_dump_json()) == spec
    assert spec.evaluation().task == spec.reading().task == spec.task
    assert spec.reading().data == spec.data


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"fill": []}, "nothing is asked for"),
        ({"budget": {"money": 3.0}}, "budget.money needs `price`"),
        ({"teacher": {"url": "http://me:secret@host/v1", "model": "big"}}, "kept in the clear"),
        ({"teacher": {"url": "https://host/v1?key=secret", "model": "big"}}, "kept in the clear"),
        ({"teacher": {"url": "ftp://host", "model": "big"}}, "should match pattern"),
        ({"teacher": {"url": "http://host", "model": "big", "key": "sk"}}, "Extra inputs are not permitted"),
        ({"fill": [{"rows": 3}]}, "name a label, a slice, or both"),
        ({"fill": [{"label": "sales", "rows": 3}]}, "labels that the task does not have: sales"),
        ({"fill": [{"label": "billing", "looks_like": "billing", "rows": 3}]}, "another one"),
        ({"fill": [{"slice": "mail", "looks_like": "billing", "rows": 3}], "data": IN_SLICES}, "another one"),
        ({"fill": [{"label": "billing", "looks_like": "sales", "rows": 3}]}, "does not have: sales"),
        ({"fill": [{"slice": "mail", "rows": 3}]}, "data.slice_field"),
        ({"fill_slices_to": 3}, "data.slice_field"),
        ({"documents": {"path": "docs"}}, "documents are for extract and chat"),
        ({"task": EXTRACT}, "fill.label needs data.label_field"),
        ({"task": EXTRACT, "fill": [], "fill_classes_to": 3}, "fill_classes_to needs data.label_field"),
        ({"data": {"source": "x", "text_field": "source"}}, r"synthetic rows need for themselves \(source\)"),
        ({"data": {"source": "x", "source_field": "synthetic"}}, r"need for themselves \(synthetic\)"),
    ],
    ids=str,
)
def test_what_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SynthesizeSpec.model_validate(GOOD | changed)


@pytest.mark.parametrize(
    "changed",
    [
        {"fill": [{"slice": "mail", "rows": 3}], "data": IN_SLICES},
        {"task": EXTRACT, "fill": [], "documents": {"path": "docs"}},
        {"task": EXTRACT, "data": {"source": "x", "label_field": "kind"}, "fill_classes_to": 10},
        {"data": {"source": "x", "source_field": "source"}},
    ],
    ids=str,
)
def test_what_is_taken(changed: dict[str, Any]) -> None:
    assert SynthesizeSpec.model_validate(GOOD | changed).task.kind in TaskKind
