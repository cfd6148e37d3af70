"""Rows as columns: the same from one process and from several, in an order that the content decides."""

from __future__ import annotations

import random
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.contracts.rows import Message, Row, write_rows
from tasks.data import parallel
from tasks.data.contamination import index_golden
from tasks.data.draw import content_hash
from tasks.data.similar import NGRAM_WORDS, Banding, Sketch
from tasks.data.table import NO_TIME, NOTHING, RowTable, build_table
from tests.data.toy_data import CLASSIFY, sentence

EIGHTY = Banding.for_threshold(0.8)


def made(count: int) -> list[Row]:
    draw = random.Random(7)
    return [
        Row(
            f"r{n}",
            n + 1,
            (Message("user", sentence(draw, 5 + n % 30)),),
            "billing" if n % 3 else "support",
            group=f"g{n % 7}" if n % 2 else None,
            source="one.jsonl" if n % 5 else None,
            time="2026-11-25T10:00:00Z" if n % 4 else None,
            synthetic=n % 11 == 0,
        )
        for n in range(count)
    ]


def build(path: Path, **more: Any) -> RowTable:
    return build_table(path, CLASSIFY, EIGHTY, more.pop("golden", None), path.parent, **more)


def test_each_row_is_where_the_table_says(tmp_path: Path) -> None:
    rows = made(200)
    write_rows(tmp_path / "rows.jsonl", rows)
    table = build(tmp_path / "rows.jsonl")
    assert len(table) == 200
    hashes = [table.content_hash(at) for at in range(200)]
    assert hashes == sorted(content_hash(row) for row in rows)
    by_id = {row.id: row for row in rows}
    with table.reader() as reader:
        for at in range(200):
            row = reader.row(at)
            assert row == by_id[table.ids[at]]
            assert table.content_hash(at) == content_hash(row)
            assert table.lines[at] == row.line
            assert table.stratum_names[table.strata[at]] == row.target
            assert bool(table.groups[at] == NOTHING) is (row.group is None)
            assert row.group is None or table.group_names[table.groups[at]] == row.group
            assert bool(table.sources[at] == NOTHING) is (row.source is None)
            assert bool(table.times[at] == NO_TIME) is (row.time is None)
            assert table.synthetic[at] == row.synthetic
        assert next(iter(reader.texts([3]))) == reader.row(3).text
    assert table.times[table.times != NO_TIME].tolist()[0] == np.datetime64("2026-11-25T10:00:00", "us").astype(int)


def test_several_processes_make_the_same_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "rows.jsonl", made(5_000))
    alone = build(tmp_path / "rows.jsonl")
    monkeypatch.setattr(parallel, "_WORTH_PROCESSES", 1)
    monkeypatch.setattr(parallel.os, "sched_getaffinity", lambda _: {0, 1})
    heard: list[int] = []
    together = build(tmp_path / "rows.jsonl", progress=heard.append)
    assert heard == [2_000, 4_000, 5_000]
    for field in fields(RowTable):
        one, other = getattr(alone, field.name), getattr(together, field.name)
        if isinstance(one, np.ndarray):
            assert np.array_equal(one, other), field.name
        elif isinstance(one, Sketch):
            assert all(np.array_equal(*columns) for columns in zip(one, other, strict=True))
        elif field.name != "shingles":
            assert one == other, field.name
    assert [alone.shingles.set_of(at) for at in range(50)] == [together.shingles.set_of(at) for at in range(50)]


def test_rows_that_are_wholly_the_same_are_ordered_by_id_and_line(tmp_path: Path) -> None:
    same = [Row(row_id, line, (Message("user", "the same"),), "a") for row_id, line in (("b", 1), ("a", 3), ("a", 2))]
    write_rows(tmp_path / "rows.jsonl", same)
    table = build(tmp_path / "rows.jsonl")
    assert [*zip(table.ids, table.lines.tolist(), strict=True)] == [("a", 2), ("a", 3), ("b", 1)]


def test_shared_long_runs_are_counted_once_each(tmp_path: Path) -> None:
    draw = random.Random(5)
    item = sentence(draw, 20)
    shared = " ".join(item.split()[: NGRAM_WORDS + 2])
    texts = [f"{sentence(draw, 9)} {shared} {sentence(draw, 9)} {shared}", sentence(draw, 60), shared.rsplit(" ", 3)[0]]
    write_rows(
        tmp_path / "rows.jsonl", [Row(f"r{n}", n, (Message("user", text),), "a") for n, text in enumerate(texts)]
    )
    golden = index_golden(
        [Row("x", 1, (Message("user", sentence(draw, 30)),), "a"), Row("g", 2, (Message("user", item),), "a")], EIGHTY
    )
    table = build(tmp_path / "rows.jsonl", golden=golden.runs)
    found = dict(zip(table.ids, table.run_hits.tolist(), strict=True))
    assert found == {"r0": 3, "r1": 0, "r2": 0}
    assert table.run_owners[table.ids.index("r0")] == 1


def test_an_empty_file_makes_an_empty_table(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    assert len(build(tmp_path / "rows.jsonl")) == 0
