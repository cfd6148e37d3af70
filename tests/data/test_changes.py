"""What is new since earlier data: counted by hand, by brute force, and over a million rows."""

from __future__ import annotations

import hashlib
import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks.data.changes import Changes, Move, compare_rows

# (what is written, its normalised text, the answer, where the row went)
Made = tuple[str, str, str, str]


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:16]


def write(path: Path, rows: Sequence[Made], row_group: int = 3) -> Path:
    binary = pa.binary(16)
    table = pa.table(
        {
            "content": pa.array([digest(f"{written}|{answer}") for written, _, answer, _ in rows], binary),
            "text": pa.array([digest(text) for _, text, _, _ in rows], binary),
            "target": pa.array([int.from_bytes(digest(answer)[:8], "little") for _, _, answer, _ in rows], pa.uint64()),
            "outcome": pa.array([outcome for *_, outcome in rows], pa.string()).dictionary_encode(),
        }
    )
    pq.write_table(table, path, row_group_size=row_group)
    return path


def compared(tmp_path: Path, before: Sequence[Made], now: Sequence[Made]) -> Changes:
    return compare_rows(write(tmp_path / "before.parquet", before), write(tmp_path / "now.parquet", now))


def row(text: str, answer: str = "x", outcome: str = "train", written: str | None = None) -> Made:
    return (written or text, text, answer, outcome)


CASES = [
    ("nothing changed", [row("a"), row("b")], [row("b"), row("a")], (2, 0, 0, 0, 0), []),
    ("all is new", [], [row("a"), row("b")], (0, 0, 0, 2, 0), []),
    ("all is gone", [row("a")], [], (0, 0, 0, 0, 1), []),
    ("another answer", [row("a", "x"), row("b")], [row("a", "y"), row("b")], (1, 0, 1, 0, 0), []),
    ("another answer beside the first", [row("a", "x")], [row("a", "x"), row("a", "y")], (1, 0, 0, 1, 0), []),
    ("written otherwise", [row("a")], [row("a", written="A!")], (0, 1, 0, 0, 0), []),
    (
        "written otherwise, and another answer",
        [row("a", "x"), row("a", "x", written="A!")],
        [row("a", "x", written="A?"), row("a", "y", written="A!")],
        (0, 1, 1, 0, 0),
        [],
    ),
    ("two became one", [row("a"), row("a", outcome="exact_duplicate")], [row("a")], (1, 0, 0, 0, 1), []),
    ("one became three", [row("a")], [row("a")] * 3, (1, 0, 0, 2, 0), []),
    ("one of two relabelled", [row("a", "x"), row("a", "x")], [row("a", "y")], (0, 0, 1, 0, 1), []),
    (
        "to another side",
        [row("a", outcome="train"), row("b", outcome="train"), row("c", outcome="dev"), row("d", outcome="train")],
        [row("a", outcome="dev"), row("b", outcome="near_duplicate"), row("c", outcome="train"), row("d")],
        (4, 0, 0, 0, 0),
        [Move("dev", "train", 1), Move("train", "dev", 1), Move("train", "near_duplicate", 1)],
    ),
    (
        "the order of repetitions is no move",
        [row("a", outcome="train"), row("a", outcome="exact_duplicate")],
        [row("a", outcome="exact_duplicate"), row("a", outcome="train")],
        (2, 0, 0, 0, 0),
        [],
    ),
    (
        "of three, one moved",
        [row("a", outcome="dev"), row("a", outcome="exact_duplicate"), row("a", outcome="exact_duplicate")],
        [row("a", outcome="exact_duplicate"), row("a", outcome="train"), row("a", outcome="exact_duplicate")],
        (3, 0, 0, 0, 0),
        [Move("dev", "train", 1)],
    ),
]


@pytest.mark.parametrize(("before", "now", "counts", "moved"), [case[1:] for case in CASES], ids=[c[0] for c in CASES])
def test_by_hand(
    tmp_path: Path, before: list[Made], now: list[Made], counts: tuple[int, ...], moved: list[Move]
) -> None:
    found = compared(tmp_path, before, now)
    assert (found.same, found.rewritten, found.relabelled, found.new, found.gone) == counts
    assert list(found.moved) == moved
    assert (found.before, found.now) == (len(before), len(now))


def test_outcomes_of_both(tmp_path: Path) -> None:
    found = compared(tmp_path, [row("a"), row("b"), row("c", outcome="dev")], [row("a"), row("d", outcome="suspect")])
    assert found.outcomes == {"dev": (1, 0), "suspect": (0, 1), "train": (2, 1)}


def test_in_words(tmp_path: Path) -> None:
    before = [row("a", "x"), row("b"), row("c"), row("d")]
    now = [row("a", "y"), row("b", written="B"), row("d"), row("e"), row("f")]
    assert compared(tmp_path, before, now).sentence() == "+2 −1, 1 relabelled, 1 rewritten"
    assert compared(tmp_path, before, before).sentence() == "the same rows"


def slowly(before: Sequence[Made], now: Sequence[Made]) -> tuple[int, int, int, int, int, Counter[tuple[str, str]]]:
    """The same, a row at a time."""
    left, right = list(before), list(now)
    same = 0
    moved: Counter[tuple[str, str]] = Counter()

    def strike(alike: list[int]) -> int:
        """Pair off rows that are alike in these parts."""
        found = 0
        for one in list(left):
            match = next((two for two in right if all(one[part] == two[part] for part in alike)), None)
            if match is not None:
                left.remove(one)
                right.remove(match)
                found += 1
                if alike == [0, 1, 2]:
                    moved[one[3], match[3]] += 1
        return found

    same = strike([0, 1, 2, 3])
    left.sort(key=lambda one: one[3])
    right.sort(key=lambda one: one[3])
    same += strike([0, 1, 2])
    rewritten = strike([1, 2])
    relabelled = strike([1])
    return same, rewritten, relabelled, len(right), len(left), moved


MADE = st.lists(
    st.tuples(
        st.sampled_from(["a", "A", "b", "B"]), st.sampled_from("xyz"), st.sampled_from(["train", "dev", "near"])
    ).map(lambda made: row(made[0].lower(), made[1], made[2], written=made[0])),
    max_size=14,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(MADE, MADE)
def test_by_brute_force(tmp_path: Path, before: list[Made], now: list[Made]) -> None:
    found = compared(tmp_path, before, now)
    same, rewritten, relabelled, new, gone, moved = slowly(before, now)
    assert (found.same, found.rewritten, found.relabelled, found.new, found.gone) == (
        same, rewritten, relabelled, new, gone,
    )  # fmt: skip
    assert found.before == same + rewritten + relabelled + gone
    assert found.now == same + rewritten + relabelled + new
    assert {(move.before, move.now): move.rows for move in found.moved} == moved


def test_the_order_of_rows_changes_nothing(tmp_path: Path) -> None:
    draw = random.Random(3)
    before = [row(f"t{draw.randrange(30)}", draw.choice("xy"), draw.choice(["train", "dev"])) for _ in range(60)]
    now = [row(f"t{draw.randrange(30)}", draw.choice("xy"), draw.choice(["train", "near"])) for _ in range(50)]
    first = compared(tmp_path, before, now)
    draw.shuffle(before)
    draw.shuffle(now)
    shuffled = compared(tmp_path, before, now)
    assert shuffled == first
    assert first.moved


@pytest.mark.slow
def test_a_million_rows(tmp_path: Path) -> None:
    """Measured: 2 s and 0.3 GB on one core; the limit leaves room for a busy machine."""
    draw = np.random.default_rng(1)
    digests = draw.bytes(16 * 1_100_000)

    def save(name: str, start: int, stop: int, *, relabelled: int) -> Path:
        rows = stop - start
        column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), rows, [None, pa.py_buffer(digests)], -1, start)
        targets = np.zeros(rows, dtype=np.uint64)
        targets[:relabelled] = 1
        content = np.frombuffer(digests, dtype=np.uint64).reshape(-1, 2)[start:stop].copy()
        content[:, 0] ^= targets
        other = pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), rows, [None, pa.py_buffer(content.tobytes())])
        outcome = pa.DictionaryArray.from_arrays(np.zeros(rows, dtype=np.int32), ["train"])
        pq.write_table(
            pa.table({"content": other, "text": column, "target": targets, "outcome": outcome}), tmp_path / name
        )
        return tmp_path / name

    before = save("before.parquet", 0, 1_000_000, relabelled=0)
    now = save("now.parquet", 100_000, 1_100_000, relabelled=25_000)
    start = time.monotonic()
    found = compare_rows(before, now)
    assert time.monotonic() - start < 60
    assert (found.same, found.relabelled, found.new, found.gone) == (875_000, 25_000, 100_000, 100_000)
