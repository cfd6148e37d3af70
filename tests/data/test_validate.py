"""Parting good rows from bad ones: each reason, the limit, and what lies beside the rows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tasks.contracts.errors import DataError, SpecError
from tasks.contracts.rows import Message, Row, read_rows
from tasks.contracts.spec import DataSpec, TaskKind, TaskSpec
from tasks.data.ingest import ingest
from tasks.data.validate import Validated, schema_check, validate
from tests.data.toy_data import CHAT, CLASSIFY, EXTRACT, read_lines, rows, write_lines


def check(folder: Path, records: list[Any], task: TaskSpec = CLASSIFY, **data: Any) -> Validated:
    """Ingest and validate; the results lie in `folder / "valid"`."""
    spec = DataSpec(**({"source": str(write_lines(folder / "rows.jsonl", records)), "max_invalid_share": 0.9} | data))
    for name in ("raw", "valid", "kept"):
        (folder / name).mkdir()
    ingest(spec, task.kind, folder / "raw")
    return validate(folder / "raw", task, spec, folder / "valid", lambda: folder / "kept")


GOOD = {"id": "good", "text": "a fine text", "label": "billing"}


BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "blank": ({"text": " \n", "label": "billing"}, ["text is blank"]),
    "long": ({"text": "x" * 101, "label": "billing"}, ["text has 101 characters, the limit is 100"]),
    "no target": ({"text": "t", "label": " "}, ["target is blank", "label ' ' is none of the task's labels"]),
    "label": ({"text": "t", "label": "Billing"}, ["label 'Billing' is none of the task's labels"]),
    "lost": (
        {"text": "caf\ufffd", "label": "billing"},
        ["text is damaged: replacement character (U+FFFD) at character 4"],
    ),
    "control": (
        {"text": "it\x92s", "label": "billing"},
        ["text is damaged: a control character (U+0092) at character 3"],
    ),
    "target control": (
        {"text": "t", "label": "bill\x00ing"},
        [
            "target is damaged: a control character (U+0000) at character 5",
            "label 'bill\\x00ing' is none of the task's labels",
        ],
    ),
    "null": ({"text": None, "label": "billing"}, ["text is null"]),
    "types": ({"text": 7, "label": None}, ["text is a number, not text", "label is null"]),
    "megabyte": ({"text": "x" * 2**20, "label": "billing"}, ["text has 1,048,576 characters, the limit is 100"]),
}


def test_each_bad_row_is_quarantined_with_every_reason(tmp_path: Path) -> None:
    records = [GOOD, *({"id": name} | record for name, (record, _) in BAD.items())]
    counts = check(tmp_path, records, max_characters=100, max_invalid_share=0.95)
    assert counts == (
        1,
        len(BAD),
        {
            "label_unknown": 3,
            "text_too_long": 2,
            "text_damaged": 2,
            "text_blank": 1,
            "target_blank": 1,
            "target_damaged": 1,
            "text is null": 1,
            "text is a number, not text": 1,
            "label is null": 1,
        },
    )
    found = {entry["id"]: entry for entry in read_lines(tmp_path / "valid/quarantine.jsonl")}
    assert {name: sorted(entry["reasons"]) for name, entry in found.items()} == {
        name: sorted(reasons) for name, (_, reasons) in BAD.items()
    }
    for line, (name, (record, _)) in enumerate(BAD.items(), start=2):
        assert found[name]["line"] == line
        kept = found[name]["record"]
        assert (kept["messages"][0]["content"] if "messages" in kept else kept["text"]) == record["text"]
    assert [row.id for row in read_rows(tmp_path / "valid/rows.jsonl")] == ["good"]


def test_white_space_of_texts_is_no_damage(tmp_path: Path) -> None:
    assert check(tmp_path, [{"text": "tab\t line\r\n 5 € 😀", "label": "billing"}]) == (1, 0, {})


def test_a_target_has_to_fit_the_schema(tmp_path: Path) -> None:
    targets = [{"amount": 5}, {}, {"amount": "5"}, {"amount": 5, "more": 1}]
    records = [{"text": f"t{n}", "label": target} for n, target in enumerate(targets)]
    assert check(tmp_path, records, EXTRACT) == (1, 3, {"schema": 3})
    assert [entry["reasons"] for entry in read_lines(tmp_path / "valid/quarantine.jsonl")] == [
        ["target does not fit the schema: 'amount' is a required property (at $)"],
        ["target does not fit the schema: '5' is not of type 'number' (at $.amount)"],
        [
            "target does not fit the schema: Additional properties are not allowed ('more' was unexpected) (at $)",
        ],
    ]


def test_a_schema_that_is_none_is_refused() -> None:
    task = TaskSpec(kind=TaskKind.EXTRACT, instruction="i", json_schema={"type": "float"})
    with pytest.raises(SpecError) as caught:
        schema_check(task)
    assert "'float' is not valid" in caught.value.what
    assert caught.value.where == "task.json_schema, at $.type"


ROLES = {
    "user": None,
    "system user": None,
    "user assistant user": None,
    "user assistant tool tool": None,
    "assistant user": "chat turn 1 is assistant at the start",
    "user user": "chat turn 2 is user after user",
    "user system user": "chat turn 2 is system after user",
    "system": "the chat turn before the answer is system, not user",
    "user assistant": "the chat turn before the answer is assistant, not user",
}


def test_chat_roles_come_in_order(tmp_path: Path) -> None:
    records = [
        {"id": roles, "messages": [{"role": role, "content": f"turn {n}"} for n, role in enumerate(roles.split())]}
        for roles in ROLES
    ]
    for record in records:
        record["messages"].append({"role": "assistant", "content": "the answer"})
    assert check(tmp_path, records, CHAT, messages_field="messages") == (4, 5, {"chat_roles": 5})
    found = {entry["id"]: entry["reasons"] for entry in read_lines(tmp_path / "valid/quarantine.jsonl")}
    assert found == {roles: [problem] for roles, problem in ROLES.items() if problem is not None}


def test_an_id_names_one_row(tmp_path: Path) -> None:
    records = [
        {"id": "same", "text": "one", "label": "billing"},
        {"id": "same", "text": "two", "label": "billing"},
        {"id": "twice", "text": "three", "label": "billing"},
        {"id": "twice", "text": "three", "label": "billing"},  # a repetition: curating removes it
        {"id": "same", "text": "one", "label": "billing"},
    ]
    assert check(tmp_path, records) == (2, 3, {"id_repeated": 3})
    assert [entry["line"] for entry in read_lines(tmp_path / "valid/quarantine.jsonl")] == [1, 2, 5]
    assert read_lines(tmp_path / "valid/quarantine.jsonl")[0]["reasons"] == ["id 'same' names several rows that differ"]


def test_an_unreadable_row_is_held_to_the_other_expectations_too(tmp_path: Path) -> None:
    records = [GOOD, {"id": "x", "text": None, "label": "billing"}, {"id": "x", "text": "t", "label": "support"}]
    check(tmp_path, records)
    by_line = {entry["line"]: entry["reasons"] for entry in read_lines(tmp_path / "valid/quarantine.jsonl")}
    assert by_line == {
        2: ["text is null", "id 'x' names several rows that differ"],
        3: ["id 'x' names several rows that differ"],
    }


def test_too_many_bad_rows_stop_the_run_and_stay_to_be_read(tmp_path: Path) -> None:
    records = [*rows(8), {"id": "x", "text": "t", "label": "sales"}, {"id": "y", "text": None, "label": "billing"}]
    with pytest.raises(DataError) as caught:
        check(tmp_path, records, max_invalid_share=0.1)
    error = caught.value
    assert error.what == ("2 of 10 rows are invalid (20.0%), the limit is 10.0%: 1 × label_unknown; 1 × text is null.")
    assert error.where is not None
    assert str(tmp_path / "kept/quarantine.jsonl") in error.where
    assert [entry["id"] for entry in read_lines(tmp_path / "kept/quarantine.jsonl")] == ["x", "y"]
    assert (tmp_path / "kept/data_docs/index.html").is_file()


def test_bad_rows_up_to_the_limit_are_left_out(tmp_path: Path) -> None:
    records = [*rows(9), {"id": "x", "text": "t", "label": "sales"}]
    assert check(tmp_path, records, max_invalid_share=0.1) == (9, 1, {"label_unknown": 1})
    assert not list((tmp_path / "kept").iterdir())


def test_no_good_row_at_all_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1 of 1 rows are invalid"):
        check(tmp_path, [{"text": None, "label": "billing"}], max_invalid_share=1.0)


def test_suite_result_and_data_docs_lie_beside_the_rows(tmp_path: Path) -> None:
    check(tmp_path, [*rows(5), {"id": "x", "text": "secret text", "label": "sales"}])
    valid = tmp_path / "valid"
    suite = json.loads((valid / "suite.json").read_text())
    assert suite["name"] == "training_rows"
    result = json.loads((valid / "result.json").read_text())
    assert result["success"] is False
    assert result["statistics"]["unsuccessful_expectations"] == 1
    pages = list((valid / "data_docs").rglob("*.html"))
    assert valid / "data_docs/index.html" in pages
    assert any("sales" in page.read_text() for page in pages)
    machine = re.compile(rf"{re.escape(str(tmp_path))}|/tmp/|/home/|/root/")
    assert not [
        page for page in [*pages, valid / "suite.json", valid / "result.json"] if machine.search(page.read_text())
    ]
    assert not [page for page in pages if "secret text" in page.read_text()]


def test_rows_are_passed_on_byte_by_byte(tmp_path: Path) -> None:
    check(tmp_path, [*rows(5), {"id": "x", "text": "😀 é", "label": "support"}])
    assert (tmp_path / "valid/rows.jsonl").read_bytes() == (tmp_path / "raw/rows.jsonl").read_bytes()
    assert list(read_rows(tmp_path / "valid/rows.jsonl"))[-1] == Row("x", 6, (Message("user", "😀 é"),), "support")


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    check(tmp_path, rows(5))
    assert capfd.readouterr() == ("", "")
