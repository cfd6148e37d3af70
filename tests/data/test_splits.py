"""Train and dev: by time, with a cap on what a model wrote, and classes evened out."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.contracts.errors import DataError
from tasks.contracts.rows import Message, Row, write_rows
from tasks.contracts.spec import Balance, CurateSpec, SplitBy
from tasks.data.similar import Banding
from tasks.data.splits import balance, label_drift, split
from tasks.data.table import RowTable, build_table
from tests.data.toy_data import CLASSIFY, LABELS, sentence


def table_of(folder: Path, rows: Sequence[Row]) -> RowTable:
    write_rows(folder / "rows.jsonl", rows)
    return build_table(folder / "rows.jsonl", CLASSIFY, Banding.for_threshold(0.8), None, folder)


def made(count: int, **more: Any) -> list[Row]:
    """Rows that all differ; `more` gives a field's value by the row's number."""
    draw = random.Random(4)
    return [
        Row(
            f"r{n}",
            n + 1,
            (Message("user", sentence(draw)),),
            LABELS[n % 2],
            **{name: value(n) for name, value in more.items()},
        )
        for n in range(count)
    ]


def spec(**knobs: Any) -> CurateSpec:
    return CurateSpec(**knobs)


def test_by_time_dev_is_the_newest_rows(tmp_path: Path) -> None:
    rows = made(100, time=lambda n: f"2026-{1 + n % 12:02d}-{1 + n % 28:02d}T00:00:00Z")
    table = table_of(tmp_path, rows)
    parts = split(table, range(100), [], spec(split=SplitBy.TIME, dev_share=0.2))
    assert (len(parts.train), len(parts.dev), parts.left) == (80, 20, [])
    newest = max(table.times[parts.train])
    assert min(table.times[parts.dev]) >= newest
    assert {table.ids[at] for at in parts.dev} == {
        row.id for row in sorted(rows, key=lambda row: row.time or "")[-20:]
    } or min(table.times[parts.dev]) == newest  # rows of the same day are told apart by their content


def test_by_time_a_group_goes_with_its_newest_row(tmp_path: Path) -> None:
    rows = made(
        40,
        time=lambda n: f"2026-01-{1 + n // 2:02d}T00:00:00Z",
        group=lambda n: "old and new" if n in (0, 39) else None,
    )
    table = table_of(tmp_path, rows)
    parts = split(table, range(40), [], spec(split=SplitBy.TIME, dev_share=0.1))
    assert {"r0", "r39"} <= {table.ids[at] for at in parts.dev}


def test_by_time_every_row_needs_one(tmp_path: Path) -> None:
    rows = made(20, time=lambda n: None if n == 3 else "2026-01-01T00:00:00Z")
    with pytest.raises(DataError, match="1 rows have none") as caught:
        split(table_of(tmp_path, rows), range(20), [], spec(split=SplitBy.TIME))
    assert "data.time_field" in caught.value.fix


def test_what_a_model_wrote_is_capped_and_never_in_dev(tmp_path: Path) -> None:
    rows = made(200, synthetic=lambda n: n < 120)
    table = table_of(tmp_path, rows)
    parts = split(table, range(200), [], spec(max_synthetic_share=0.25, dev_share=0.1))
    assert not table.synthetic[parts.dev].any()
    assert len(parts.dev) == 8  # a tenth of the 80 real rows
    written = int(table.synthetic[parts.train].sum())
    assert (len(parts.train), written) == (96, 24)
    assert written / len(parts.train) == 0.25
    assert {one.reason for one in parts.left} == {"over_synthetic_share"}
    assert len(parts.left) == 96
    everything = split(table, range(200), [], spec(max_synthetic_share=1.0))
    assert int(table.synthetic[everything.train].sum()) == 120
    none = split(table, range(200), [], spec(max_synthetic_share=0.0))
    assert not table.synthetic[none.train].any()


def test_rows_that_a_model_wrote_alone_give_no_dev(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="all 20 rows were written by a model"):
        split(table_of(tmp_path, made(20, synthetic=lambda n: True)), range(20), [], spec())


CLASSES = np.array([0] * 60 + [1] * 20 + [2] * 3, dtype=np.int32)
NAMES = ["large", "middle", "small"]


@pytest.mark.parametrize(
    ("choice", "limit", "rows", "weights"),
    [
        (Balance.NONE, 5, (60, 20, 3), (1.0, 1.0, 1.0)),
        (Balance.OVERSAMPLE, 5, (60, 60, 15), (1.0, 1.0, 1.0)),
        (Balance.OVERSAMPLE, 2, (60, 40, 6), (1.0, 1.0, 1.0)),
        (Balance.WEIGHT, 5, (60, 20, 3), (83 / 135, 3 * 83 / 135, 5 * 83 / 135)),
        (Balance.WEIGHT, 2, (60, 20, 3), (83 / 106, 2 * 83 / 106, 2 * 83 / 106)),
    ],
)
def test_classes_are_evened_out_up_to_a_limit(
    choice: Balance, limit: int, rows: tuple[int, ...], weights: tuple[float, ...]
) -> None:
    found = balance(CLASSES, NAMES, np.ones(83), spec(balance=choice, max_repeats=limit))
    assert tuple(int(found.repeats[code == CLASSES].sum()) for code in range(3)) == rows
    assert tuple(float(found.weights[code == CLASSES][0]) for code in range(3)) == pytest.approx(weights)
    assert [found.effect[name]["rows"] for name in NAMES] == [60, 20, 3]
    assert [found.effect[name]["rows_after"] for name in NAMES] == [*rows]
    assert [found.effect[name]["weight"] for name in NAMES] == pytest.approx(weights, abs=1e-4)


def test_a_class_is_repeated_evenly() -> None:
    classes = np.array([0] * 10 + [1] * 4, dtype=np.int32)
    found = balance(classes, ["a", "b"], np.ones(14), spec(balance=Balance.OVERSAMPLE))
    assert found.repeats[classes == 1].tolist() == [3, 3, 2, 2]


@settings(deadline=None)
@given(
    classes=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    choice=st.sampled_from(Balance),
    limit=st.integers(2, 10),
    seed=st.integers(0, 1000),
)
def test_weights_have_a_mean_of_one_over_the_rows_of_the_file(
    classes: list[int], choice: Balance, limit: int, seed: int
) -> None:
    codes = np.array(classes, dtype=np.int32)
    given_weights = np.random.default_rng(seed).uniform(0.1, 5.0, len(codes))
    found = balance(codes, list("abcde"), given_weights, spec(balance=choice, max_repeats=limit))
    assert (found.weights * found.repeats).sum() / found.repeats.sum() == pytest.approx(1.0)
    assert found.weights.min() > 0
    assert 1 <= found.repeats.min() <= found.repeats.max() <= limit
    assert sum(effect["rows"] for effect in found.effect.values()) == len(codes)


@pytest.mark.parametrize(
    ("rows", "items", "drift"),
    [
        ({"a": 50, "b": 50}, {"a": 5, "b": 5}, 0.0),
        ({"a": 75, "b": 25}, {"a": 5, "b": 5}, 0.25),
        ({"a": 10}, {"b": 10}, 1.0),
        ({"a": 60, "b": 40}, {"a": 40, "b": 40, "c": 20}, 0.2),
        ({}, {"a": 1}, 0.0),
        ({"a": 1}, {}, 0.0),
    ],
)
def test_label_drift_is_the_total_variation_distance(rows: dict[str, int], items: dict[str, int], drift: float) -> None:
    assert label_drift(rows, items) == pytest.approx(drift)
    assert label_drift(items, rows) == pytest.approx(drift)


def test_the_order_of_rows_in_the_file_does_not_matter(tmp_path: Path) -> None:
    rows = made(120, group=lambda n: f"g{n // 3}" if n % 2 else None, synthetic=lambda n: n % 5 == 0)
    sides = []
    for name, order in (("one", rows), ("other", rows[::-1])):
        (tmp_path / name).mkdir()
        table = table_of(tmp_path / name, order)
        parts = split(table, range(120), [], spec(max_train_rows=60))
        sides.append([[table.ids[at] for at in side] for side in (parts.train, parts.dev)])
    assert sides[0] == sides[1]
    assert Counter(len(side) for side in sides[0]) == Counter(len(side) for side in sides[1])
