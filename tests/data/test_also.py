"""`data.also`: further files of rows count in digest, rows and reuse, and one that is not there yet has no rows."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tasks.contracts.errors import DataError
from tasks.contracts.references import RawDatasetRef
from tasks.contracts.rows import read_rows
from tasks.contracts.spec import DataFormat, DataSpec, ExecutionSpec, GoldenSpec, RetrainSpec, TaskKind
from tasks.data import steps
from tasks.data.ingest import ROWS, UNREADABLE, digest_source, ingest, missing_also
from tests.data.toy_data import CLASSIFY, read_lines, rows, write_lines

MORE = [
    {"id": "review-1", "text": "my card was lost", "label": "billing"},
    {"id": "review-2", "text": "it does not start", "label": "support"},
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "rows.jsonl", rows(4))


def read(data: DataSpec, folder: Path) -> list[Any]:
    folder.mkdir()
    ingest(data, TaskKind.CLASSIFY, folder, expected_digest=digest_source(data))
    return list(read_rows(folder / ROWS))


def test_rows_come_after_the_sources_and_say_where_they_are_from(source: Path, tmp_path: Path) -> None:
    also = write_lines(tmp_path / "reviewed.jsonl", MORE)
    found = read(DataSpec(source=str(source), also=(str(also),)), tmp_path / "out")
    assert [(one.id, one.source, one.line) for one in found] == [
        ("r0000", None, 1), ("r0001", None, 2), ("r0002", None, 3), ("r0003", None, 4),
        ("review-1", "reviewed.jsonl", 1), ("review-2", "reviewed.jsonl", 2),
    ]  # fmt: skip


@pytest.mark.parametrize("written_as", ["csv", "label_studio", "folder"])
def test_the_source_may_be_of_another_format(tmp_path: Path, written_as: str) -> None:
    also = write_lines(tmp_path / "reviewed.jsonl", MORE)
    if written_as == "csv":
        path = tmp_path / "rows.csv"
        path.write_text("id,text,label\na,hello,billing\n")
    elif written_as == "folder":
        path = tmp_path / "parts"
        path.mkdir()
        write_lines(path / "reviewed.jsonl", [{"id": "a", "text": "hello", "label": "billing"}])  # the same name
    else:
        path = tmp_path / "export.json"
        result = {"from_name": "label", "to_name": "text", "type": "choices", "value": {"choices": ["billing"]}}
        task = {"id": 1, "data": {"id": "a", "text": "hello"}, "annotations": [{"id": 1, "result": [result]}]}
        path.write_text(json.dumps([task]))
    data = DataSpec(source=str(path), also=(str(also),))
    found = read(data, tmp_path / "out")
    assert [(one.target, one.messages[0].content) for one in found] == [
        ("billing", "hello"), ("billing", "my card was lost"), ("support", "it does not start"),
    ]  # fmt: skip


def test_a_file_that_is_not_there_or_empty_changes_nothing(source: Path, tmp_path: Path) -> None:
    alone = DataSpec(source=str(source))
    absent = DataSpec(source=str(source), also=(str(tmp_path / "later.jsonl"),))
    assert missing_also(absent) == absent.also
    assert digest_source(absent) == digest_source(alone)
    assert len(read(absent, tmp_path / "absent")) == 4
    (tmp_path / "later.jsonl").touch()
    assert missing_also(absent) == ()
    assert digest_source(absent) == digest_source(alone)
    assert len(read(absent, tmp_path / "empty")) == 4


def test_the_digest_is_of_what_the_files_hold_not_of_where_they_lie(source: Path, tmp_path: Path) -> None:
    one, two = write_lines(tmp_path / "one.jsonl", MORE[:1]), write_lines(tmp_path / "two.jsonl", MORE[1:])

    def digest(*also: Path) -> str:
        return digest_source(DataSpec(source=str(source), also=tuple(map(str, also))))

    (tmp_path / "elsewhere").mkdir()
    moved = write_lines(tmp_path / "elsewhere" / "moved.jsonl", MORE[:1])
    assert digest(one) == digest(moved) == digest(tmp_path / "missing.jsonl", one)
    assert len({digest(), digest(one), digest(two), digest(one, two), digest(two, one)}) == 5
    before = digest(one)
    write_lines(one, MORE)
    assert digest(one) != before


def test_compressed_files_are_read_too(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "reviewed.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(MORE[0]).encode()))
    assert read(DataSpec(source=str(source), also=(str(path),)), tmp_path / "out")[-1].id == "review-1"


def test_what_cannot_be_used_is_kept_with_its_file(source: Path, tmp_path: Path) -> None:
    also = write_lines(tmp_path / "reviewed.jsonl", [*MORE, {"id": "x", "text": None, "label": "billing"}])
    read(DataSpec(source=str(source), also=(str(also),)), tmp_path / "out")
    (bad,) = read_lines(tmp_path / "out" / UNREADABLE)
    assert (bad["source"], bad["line"], bad["reasons"]) == ("reviewed.jsonl", 3, ["text is null"])


def test_a_column_that_is_missing_is_said_with_its_file(source: Path, tmp_path: Path) -> None:
    also = write_lines(tmp_path / "reviewed.jsonl", [{"id": "x", "body": "hello", "label": "billing"}])
    with pytest.raises(DataError, match="No row has the column 'text'") as error:
        read(DataSpec(source=str(source), also=(str(also),)), tmp_path / "out")
    assert str(also) in str(error.value.where)


def test_rows_that_would_be_read_twice_are_refused(source: Path, tmp_path: Path) -> None:
    for data in (
        DataSpec(source=str(source), also=(str(source),)),
        DataSpec(source=str(tmp_path), format=DataFormat.JSONL, also=(str(source),)),
        DataSpec(source=str(source), also=(str(write_lines(tmp_path / "x.jsonl", MORE)),) * 2),
    ):
        with pytest.raises(DataError, match="read twice"):
            digest_source(data)


def test_a_folder_is_no_file(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no file"):
        digest_source(DataSpec(source=str(source), also=(str(tmp_path),)))


def test_a_file_that_changes_while_it_is_read_is_refused(source: Path, tmp_path: Path) -> None:
    also = write_lines(tmp_path / "reviewed.jsonl", MORE)
    data = DataSpec(source=str(source), also=(str(also),))
    before = digest_source(data)
    write_lines(also, MORE[:1])
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="changed between"):
        ingest(data, TaskKind.CLASSIFY, tmp_path / "out", expected_digest=before)


def test_a_training_reads_anew_what_reviews_have_added(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(steps, "say", lambda step, text: said.append(text))

    def ingested(*also: str) -> RawDatasetRef:
        return steps.ingest_dataset.fn(
            RetrainSpec(
                name="tickets", task=CLASSIFY, data=DataSpec(source=str(source), also=also),
                golden=GoldenSpec(path=str(tmp_path / "golden")), base_model="unused",
                execution=ExecutionSpec(store=str(tmp_path / "store")),
            )
        )  # fmt: skip

    alone, later = ingested(), str(tmp_path / "later.jsonl")
    assert said == []
    absent = ingested(later)
    assert said == [f"{later} of `data.also` is not there yet, so it has no rows"]
    assert (absent.fingerprint, absent.reused) == (alone.fingerprint, True)  # nothing is done twice
    write_lines(Path(later), MORE)
    more = ingested(later)
    assert (alone.rows, more.rows, more.reused) == (4, 6, False)
    assert ingested(later).reused
    assert len(said) == 1
