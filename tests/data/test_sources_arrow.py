"""Parquet: names of classes, values that cannot be read, files that are damaged, and memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.contracts.errors import DataError
from tasks.contracts.rows import read_rows
from tasks.contracts.spec import DataSpec, TaskKind
from tasks.data.ingest import digest_source, ingest
from tests.data.toy_data import read_lines, rows


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def targets(data: DataSpec, out: Path) -> list[str]:
    ingest(data, TaskKind.CLASSIFY, out, expected_digest=digest_source(data))
    return [row.target for row in read_rows(out / "rows.jsonl")]


def test_class_numbers_of_datasets_become_their_names(tmp_path: Path, out: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["billing", "support"])})
    records = [{"text": "a", "label": 1}, {"text": "b", "label": 0}, {"text": "c", "label": -1}]
    Dataset.from_list(records, features=features).to_parquet(str(tmp_path / "x.parquet"))
    assert targets(DataSpec(source=str(tmp_path / "x.parquet")), out) == ["support", "billing"]
    assert read_lines(out / "unreadable.jsonl")[0]["reasons"] == ["label is null"]


@pytest.mark.parametrize(
    "metadata", [None, b"{}", b"no json", b'{"info": {"features": {"label": {"dtype": "int64"}}}}']
)
def test_numbers_without_names_stay_numbers(metadata: bytes | None, tmp_path: Path, out: Path) -> None:
    table = pa.table({"text": ["a"], "label": [1]})
    if metadata is not None:
        table = table.replace_schema_metadata({b"huggingface": metadata})
    pq.write_table(table, tmp_path / "x.parquet")
    assert targets(DataSpec(source=str(tmp_path / "x.parquet")), out) == ["1"]


def test_a_class_number_without_a_name(tmp_path: Path, out: Path) -> None:
    about = b'{"info": {"features": {"label": {"names": ["a", "b"], "_type": "ClassLabel"}}}}'
    table = pa.table({"text": ["t", "u"], "label": [1, 2]}).replace_schema_metadata({b"huggingface": about})
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(DataError, match="class number 2 of the column 'label' has no name; there are 2") as caught:
        targets(DataSpec(source=str(tmp_path / "x.parquet")), out)
    assert caught.value.where == f"{tmp_path / 'x.parquet'}, row 2"


@pytest.mark.parametrize(
    ("column", "what"),
    [
        (pa.array([b"ok", b"caf\xe9"]).view(pa.string()), "'utf-8' codec can't decode byte 0xe9"),
        (pa.array([0, 10**15], pa.timestamp("s")), ""),
    ],
)
def test_a_value_that_cannot_be_read_is_named(column: Any, what: str, tmp_path: Path, out: Path) -> None:
    before = [pa.array(["t"] * 1500), pa.array(["a"] * 1500), pa.nulls(1500, column.type)]
    names = ["text", "label", "made"]
    parts = [pa.table(before, names), pa.table([["t", "u"], ["a", "b"], column], names)]
    pq.write_table(pa.concat_tables(parts), tmp_path / "x.parquet")
    with pytest.raises(DataError) as caught:
        targets(DataSpec(source=str(tmp_path / "x.parquet"), slice_field="made"), out)
    assert caught.value.what.startswith(f"The column 'made' holds a value that cannot be read: {what}")
    assert caught.value.where == f"{tmp_path / 'x.parquet'}, row 1502"


@pytest.mark.parametrize("compression", ["snappy", "zstd", "none"])
@pytest.mark.parametrize("fault", ["no footer", "half", "damaged page", "text"])
def test_a_damaged_file(fault: str, compression: str, tmp_path: Path, out: Path) -> None:
    source = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist(rows(3_000)), source, compression=compression, use_dictionary=False)
    whole = source.read_bytes()
    source.write_bytes(
        {
            "no footer": whole[:-20],
            "half": whole[: len(whole) // 2],
            "damaged page": whole[:4] + bytes(64) + whole[68:],
            "text": b"text,label\na,b\n",
        }[fault]
    )
    with pytest.raises(DataError) as caught:
        ingest(DataSpec(source=str(source)), TaskKind.CLASSIFY, out)
    assert caught.value.what.startswith("The Parquet file cannot be read")
    assert caught.value.where == str(source)
    assert "cut short" in caught.value.fix


def test_memory_does_not_grow_with_the_rows_of_a_group(tmp_path: Path, out: Path) -> None:
    """Neither Arrow's memory nor Python's: of a row group of 30 MB no more is held than a few batches."""
    text = [f"{number} " + "word " * 200 for number in range(30_000)]
    table = pa.table({"text": text, "label": ["a"] * len(text)})
    source = tmp_path / "x.parquet"
    pq.write_table(table, source, use_dictionary=False, row_group_size=len(text), compression="none")
    del text, table
    pool = pa.default_memory_pool()
    before, peak = pool.bytes_allocated(), 0

    def watch(_: Any) -> None:
        nonlocal peak
        peak = max(peak, pool.bytes_allocated() - before)

    tracemalloc.start()
    assert ingest(DataSpec(source=str(source)), TaskKind.CLASSIFY, out, watch).rows == 30_000
    traced = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0 < peak < 8 * 2**20
    assert traced < 8 * 2**20
