"""What of the data is new since earlier data: rows by their content, answers by their text, and where each row went."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_BATCH_ROWS = 65_536
_Counts = NDArray[np.int64]


class Move(NamedTuple):
    """How many rows that are in both went to another place: a split, or the reason why they left."""

    before: str
    now: str
    rows: int


@dataclass(frozen=True)
class Changes:
    """Earlier data against today's, as multisets of rows.

    `before` is `same + rewritten + relabelled + gone`, and `now` is `same + rewritten + relabelled + new`.

    Attributes:
        before: rows then.
        now: rows today.
        same: rows with the same content.
        rewritten: rows with the same text and answer, written otherwise (case, spaces), or of another group or slice.
        relabelled: rows whose text has another answer today.
        new: rows whose text was not there.
        gone: rows whose text is there no more.
        moved: of the same rows, those that went to another place, the most frequent first.
        outcomes: rows by where they went, then and today.
    """

    before: int
    now: int
    same: int
    rewritten: int
    relabelled: int
    new: int
    gone: int
    moved: tuple[Move, ...]
    outcomes: Mapping[str, tuple[int, int]]

    def sentence(self) -> str:
        """The changes in a few words: "+120 −3, 2 relabelled"."""
        if not (self.new or self.gone or self.rewritten or self.relabelled):
            return "the same rows"
        words = [f"+{self.new:,} −{self.gone:,}"]
        words += [f"{self.relabelled:,} relabelled"] if self.relabelled else []
        words += [f"{self.rewritten:,} rewritten"] if self.rewritten else []
        return ", ".join(words)


def compare_rows(before: Path, now: Path) -> Changes:
    """Compare two files that `tasks.data.content` wrote.

    Memory holds 44 bytes of each row, and as much again several times over for a moment.

    A row that stands there several times counts as often. Where fewer of a text's rows have another answer today than
    the text has rows, as many as can be paired off are relabelled, and the rest are new or gone.
    """
    names: dict[str, int] = {}
    left, right = _read(before, names), _read(now, names)
    listed = sorted(names)  # what is left of one content is paired off in this order, not in that of the rows
    code_of = np.array([listed.index(name) for name in names], dtype=np.int32)
    left, right = (side._replace(outcomes=code_of[side.outcomes]) for side in (left, right))
    ids, count = _number(left.content, right.content)
    ids_left, ids_right = ids[: len(left.targets)], ids[len(left.targets) :]
    in_left, in_right = np.bincount(ids_left, minlength=count), np.bincount(ids_right, minlength=count)
    common = np.minimum(in_left, in_right)
    rewritten, relabelled = _pair_by_text(left, right, ids, in_left - common, in_right - common)
    same = int(common.sum())
    paired = same + rewritten + relabelled
    totals = [np.bincount(side.outcomes, minlength=len(names)).tolist() for side in (left, right)]
    return Changes(
        before=len(ids_left),
        now=len(ids_right),
        same=same,
        rewritten=rewritten,
        relabelled=relabelled,
        new=len(ids_right) - paired,
        gone=len(ids_left) - paired,
        moved=_moves((ids_left, left.outcomes), (ids_right, right.outcomes), listed),
        outcomes={name: (totals[0][code], totals[1][code]) for code, name in enumerate(listed)},
    )


class _Rows(NamedTuple):
    """Columns of n rows: content and text of shape [n, 2], hash of the answer and code of the outcome of shape [n]."""

    content: NDArray[np.uint64]
    text: NDArray[np.uint64]
    targets: NDArray[np.uint64]
    outcomes: NDArray[np.int32]


def _read(path: Path, names: dict[str, int]) -> _Rows:
    """The columns; outcomes are given codes in `names`, which grows."""
    import pyarrow.parquet as pq

    parts = [_Rows(_empty(2), _empty(2), _empty(1).reshape(-1), np.empty(0, dtype=np.int32))]
    with pq.ParquetFile(path, read_dictionary=["outcome"]) as file:
        for batch in file.iter_batches(_BATCH_ROWS, columns=["content", "text", "target", "outcome"]):
            outcome = batch.column("outcome")
            codes = np.array([names.setdefault(name, len(names)) for name in outcome.dictionary.to_pylist()], np.int32)
            parts.append(
                _Rows(
                    _digests(batch.column("content")),
                    _digests(batch.column("text")),
                    batch.column("target").to_numpy(),
                    codes[outcome.indices.to_numpy()],
                )
            )
    return _Rows(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _empty(width: int) -> NDArray[np.uint64]:
    return np.empty((0, width), dtype=np.uint64)


def _digests(column: object) -> NDArray[np.uint64]:
    """16 bytes a row as two numbers."""
    import pyarrow as pa

    assert isinstance(column, pa.FixedSizeBinaryArray)  # noqa: S101  the file's schema says so
    data = np.frombuffer(column.buffers()[1], dtype=np.uint64).reshape(-1, 2)
    return data[column.offset : column.offset + len(column)]


def _number(*keys: NDArray[np.uint64]) -> tuple[_Counts, int]:
    """A number for each different key of shape [n, 2], over all arrays one behind the other; and how many there are."""
    both = np.concatenate(keys)
    order = np.lexsort((both[:, 1], both[:, 0]))
    ids = np.empty(len(both), dtype=np.int64)
    ids[order] = _runs(both[order])
    return ids, int(ids.max(initial=-1)) + 1


def _runs(rows: NDArray[np.uint64]) -> _Counts:
    """For each of sorted rows how many different ones came before."""
    new = np.zeros(len(rows), dtype=np.int64)
    new[1:] = (rows[1:] != rows[:-1]).any(axis=1)
    return np.cumsum(new)


def _pair_by_text(left: _Rows, right: _Rows, ids: _Counts, over_left: _Counts, over_right: _Counts) -> tuple[int, int]:
    """Of the rows that only one side has, how many differ in nothing that matters, and how many in their answer.

    `ids` is the content of each row, of both sides; `over_left` and `over_right` say for each content how many rows
    more this side has than the other.
    """
    differ = np.flatnonzero(over_left + over_right)
    if not len(differ):
        return 0, 0
    first = np.empty(len(over_left), dtype=np.int64)
    first[ids[::-1]] = np.arange(len(ids))[::-1]  # any row of a content will do: all have the same text and answer
    rows = first[differ]
    texts = np.concatenate((left.text, right.text))[rows]
    targets = np.concatenate((left.targets, right.targets))[rows]
    text_of, text_count = _number(texts)
    answer_of, answer_count = _number(np.stack((text_of.astype(np.uint64), targets), axis=1))

    def sums(groups: _Counts, counts: _Counts, number: int) -> _Counts:
        return np.bincount(groups, weights=counts, minlength=number).astype(np.int64)

    before, now = over_left[differ], over_right[differ]
    rewritten = np.minimum(sums(answer_of, before, answer_count), sums(answer_of, now, answer_count))
    text_of_answer = np.empty(answer_count, dtype=np.int64)
    text_of_answer[answer_of] = text_of
    used = sums(text_of_answer, rewritten, text_count)
    relabelled = np.minimum(sums(text_of, before, text_count), sums(text_of, now, text_count)) - used
    return int(rewritten.sum()), int(relabelled.sum())


def _moves(
    left: tuple[_Counts, NDArray[np.int32]], right: tuple[_Counts, NDArray[np.int32]], names: list[str]
) -> tuple[Move, ...]:
    """Rows of the same content with other outcomes; a content's outcomes that are on both sides are paired first."""
    width = max(1, len(names))
    sides = [np.sort(ids * width + outcomes) for ids, outcomes in (left, right)]
    rest = [_unmatched(*sides), _unmatched(*sides[::-1])]
    contents = [keys // width for keys in rest]
    paired = [
        keys[_ranks(mine) < np.searchsorted(other, mine, "right") - np.searchsorted(other, mine, "left")] % width
        for keys, mine, other in zip(rest, contents, contents[::-1], strict=True)
    ]
    pairs, counts = np.unique(paired[0] * width + paired[1], return_counts=True)
    moves = [
        Move(names[pair // width], names[pair % width], count)
        for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True)
    ]
    return tuple(sorted(moves, key=lambda move: (-move.rows, move.before, move.now)))


def _unmatched(keys: _Counts, others: _Counts) -> _Counts:
    """The sorted keys, each as often as it is there more often than in the others."""
    there = np.searchsorted(others, keys, "right") - np.searchsorted(others, keys, "left")
    return keys[_ranks(keys) >= there]


def _ranks(keys: _Counts) -> _Counts:
    """For each of sorted keys how many of the same came before."""
    return np.arange(len(keys)) - np.searchsorted(keys, keys, "left")
