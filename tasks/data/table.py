"""All rows of a dataset as a table of small numbers, and each row itself where it lies in its file.

What curating compares rows by takes about half a kilobyte a row, however long the rows are: the texts stay on disk,
and so do the shingles of each text.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from tasks.contracts.rows import Row
from tasks.contracts.spec import TaskSpec
from tasks.data.draw import content_hash, stratum
from tasks.data.parallel import Lines, map_batches, processes_for, read_lines
from tasks.data.similar import (
    NGRAM_WORDS,
    Banding,
    Shingles,
    Sketch,
    WordHasher,
    concatenate,
    hash64,
    ngrams,
    normalise,
    sketch,
    words_of,
)

NOTHING = np.int32(-1)  # no group, no source
NO_TIME = np.iinfo(np.int64).min


class GoldenRuns(NamedTuple):
    """The long runs of words of the golden items, sorted, and the item that each is from."""

    hashes: NDArray[np.uint64]
    owners: NDArray[np.int64]


class _Part(NamedTuple):
    """The columns of a batch of rows."""

    ids: list[str]
    strata: list[str]
    groups: list[str | None]
    sources: list[str | None]
    times: list[str | None]
    lengths: NDArray[np.int32]
    lines: NDArray[np.int32]
    content: NDArray[np.uint64]
    targets: NDArray[np.uint64]
    synthetic: NDArray[np.bool_]
    run_hits: NDArray[np.int32]
    run_owners: NDArray[np.int64]
    sketch: Sketch


@dataclass(frozen=True)
class RowTable:
    """n rows in the order of their content's hashes, so that nothing depends on the order of the file.

    Attributes:
        path: the file of rows.
        offsets, lengths: where each row lies in it, in bytes; shape [n], like all others.
        ids: their ids.
        lines: their lines in the source.
        content: sha256 of what the row shows and asks for, big-endian, shape [n, 4].
        targets: hash of the answer.
        strata: the stratum, an index into `stratum_names`.
        groups: the group, an index into `group_names`; `NOTHING` for none.
        sources: where the row came from, an index into `source_names`; `NOTHING` for none.
        times: microseconds since 1970; `NO_TIME` for none.
        synthetic: whether a model wrote it.
        run_hits, run_owners: how many long runs of words it shares with golden items, and the first such item.
        sketch: what texts are compared by, without the shingles.
        shingles: those, on disk.
    """

    path: Path
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int32]
    ids: list[str]
    lines: NDArray[np.int32]
    content: NDArray[np.uint64]
    targets: NDArray[np.uint64]
    strata: NDArray[np.int32]
    stratum_names: list[str]
    groups: NDArray[np.int32]
    group_names: list[str]
    sources: NDArray[np.int32]
    source_names: list[str]
    times: NDArray[np.int64]
    synthetic: NDArray[np.bool_]
    run_hits: NDArray[np.int32]
    run_owners: NDArray[np.int64]
    sketch: Sketch
    shingles: Shingles

    def __len__(self) -> int:
        return len(self.lengths)

    def content_hash(self, position: int) -> str:
        """sha256 of a row's content, in hex."""
        return self.content[position].astype(">u8").tobytes().hex()

    def reader(self) -> RowReader:
        """Opens the file of rows."""
        return RowReader(self)


class RowReader:
    """The rows themselves, by their position in the table. Close it, or use it as a context manager."""

    def __init__(self, table: RowTable) -> None:
        self._table = table
        self._file = os.open(table.path, os.O_RDONLY)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)

    def line(self, position: int) -> bytes:
        """The row as it is written, with its line break."""
        table = self._table
        return os.pread(self._file, int(table.lengths[position]), int(table.offsets[position]))

    def row(self, position: int) -> Row:
        """The row."""
        return Row.from_json(self.line(position))

    def texts(self, positions: Sequence[int] | NDArray[np.int64]) -> Iterator[str]:
        """What the rows show, one after the other."""
        for position in positions:
            yield self.row(int(position)).text


class ShingleFile:
    """Shingles of many texts in a temporary file, which is gone when it is closed."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  lives as long as the table
        self._count = 0

    def append(self, shingles: NDArray[np.uint32]) -> None:
        """Write those of the next texts."""
        self._file.write(shingles.tobytes())
        self._count += len(shingles)

    def finish(self) -> Callable[[int, int], NDArray[np.uint32]]:
        """A function that reads hashes number `start` up to `stop`."""
        self._file.flush()

        def read(start: int, stop: int) -> NDArray[np.uint32]:
            return np.frombuffer(os.pread(self._file.fileno(), 4 * (stop - start), 4 * start), dtype=np.uint32)

        return read


def build_table(
    path: Path,
    task: TaskSpec,
    banding: Banding,
    golden: GoldenRuns | None,
    folder: Path,
    progress: Callable[[int], None] = lambda rows: None,
) -> RowTable:
    """Read all rows once, in several processes where that is worth it.

    Args:
        path: rows as `Row.to_json` writes them.
        task: says what a row's stratum is.
        banding: the similarity that near-duplicates have.
        golden: long runs to look for.
        folder: for a temporary file of shingles.
        progress: called with the number of rows read so far.
    """
    make_work = partial(_Reader, task, banding, golden)
    parts: list[_Part] = []
    shingles = ShingleFile(folder)
    read = 0
    for part in map_batches(make_work, read_lines(path), processes_for(path.stat().st_size)):
        shingles.append(part.sketch.shingles)
        parts.append(part._replace(sketch=part.sketch._replace(shingles=part.sketch.shingles[:0])))
        read += len(part.ids)
        progress(read)
    if not parts:  # an empty file is a table without rows
        parts.append(make_work()(Lines(0, 0, [])))
    return _ordered(path, parts, shingles)


class _Reader:
    """Turns lines into columns; made once in each process."""

    def __init__(self, task: TaskSpec, banding: Banding, golden: GoldenRuns | None) -> None:
        self._task = task
        self._banding = banding
        self._golden = golden
        self._hasher = WordHasher()

    def __call__(self, batch: Lines) -> _Part:
        rows = [Row.from_json(line) for line in batch.lines]
        normalised = [normalise(row.text) for row in rows]
        words = words_of(normalised, self._hasher)
        hits = np.zeros(len(rows), dtype=np.int32)
        owners = np.full(len(rows), NOTHING, dtype=np.int64)
        if self._golden is not None and len(self._golden.hashes):
            runs, of_row = ngrams(words, NGRAM_WORDS)
            at = np.minimum(np.searchsorted(self._golden.hashes, runs), len(self._golden.hashes) - 1)
            found = np.flatnonzero(self._golden.hashes[at] == runs)
            # A run that stands twice in a row counts once.
            pairs = np.unique(np.stack((of_row[found], at[found]), axis=1), axis=0)
            np.add.at(hits, pairs[:, 0], 1)
            owners[pairs[::-1, 0]] = self._golden.owners[pairs[::-1, 1]]  # the first run of a row is written last
        hashes = b"".join(bytes.fromhex(content_hash(row)) for row in rows)
        return _Part(
            ids=[row.id for row in rows],
            strata=[stratum(row, self._task) for row in rows],
            groups=[row.group for row in rows],
            sources=[row.source for row in rows],
            times=[row.time for row in rows],
            lengths=np.array([len(line) for line in batch.lines], dtype=np.int32),
            lines=np.array([row.line for row in rows], dtype=np.int32),
            content=np.frombuffer(hashes, dtype=">u8").astype(np.uint64).reshape(len(rows), 4),
            targets=np.array([hash64(row.target) for row in rows], dtype=np.uint64),
            synthetic=np.array([row.synthetic for row in rows], dtype=np.bool_),
            run_hits=hits,
            run_owners=owners,
            sketch=sketch(normalised, words, self._banding),
        )


class _Codes:
    """Numbers for names, in the order in which they come."""

    def __init__(self) -> None:
        self.names: dict[str, int] = {}

    def encode(self, values: Sequence[str | None]) -> NDArray[np.int32]:
        names = self.names
        return np.array(
            [NOTHING if value is None else names.setdefault(value, len(names)) for value in values], dtype=np.int32
        )


def _ordered(path: Path, parts: Sequence[_Part], shingles: ShingleFile) -> RowTable:
    strata, groups, sources = _Codes(), _Codes(), _Codes()
    lengths = _joined([part.lengths for part in parts], np.int32)
    texts = concatenate([part.sketch for part in parts])
    table = RowTable(
        path=path,
        offsets=np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))[:-1],
        lengths=lengths,
        ids=[row_id for part in parts for row_id in part.ids],
        lines=_joined([part.lines for part in parts], np.int32),
        content=np.concatenate([part.content for part in parts]),
        targets=_joined([part.targets for part in parts], np.uint64),
        strata=_joined([strata.encode(part.strata) for part in parts], np.int32),
        stratum_names=list(strata.names),
        groups=_joined([groups.encode(part.groups) for part in parts], np.int32),
        group_names=list(groups.names),
        sources=_joined([sources.encode(part.sources) for part in parts], np.int32),
        source_names=list(sources.names),
        times=_joined([_times(part.times) for part in parts], np.int64),
        synthetic=_joined([part.synthetic for part in parts], np.bool_),
        run_hits=_joined([part.run_hits for part in parts], np.int32),
        run_owners=_joined([part.run_owners for part in parts], np.int64),
        sketch=texts,
        shingles=Shingles(texts.sizes, shingles.finish()),
    )
    return _take(table, _canonical_order(table))


def _joined(arrays: Sequence[NDArray[Any]], dtype: Any) -> NDArray[Any]:
    return np.concatenate([np.empty(0, dtype=dtype), *arrays]).astype(dtype, copy=False)


def _times(texts: Sequence[str | None]) -> NDArray[np.int64]:
    """Microseconds since 1970 of ISO texts in UTC."""
    if not any(texts):
        return np.full(len(texts), NO_TIME, dtype=np.int64)
    return np.array(
        [
            NO_TIME
            if text is None
            else int(np.datetime64(text.removesuffix("Z").removesuffix("+00:00"), "us").astype(np.int64))
            for text in texts
        ],
        dtype=np.int64,
    )


def _canonical_order(table: RowTable) -> NDArray[np.int64]:
    """By content, then id, then line."""
    content = table.content
    order = np.lexsort((content[:, 3], content[:, 2], content[:, 1], content[:, 0]))
    same = np.flatnonzero((content[order[1:]] == content[order[:-1]]).all(axis=1))
    start = 0
    while start < len(same):  # few rows are wholly the same, so these alone are put in order by id and line
        stop = start + 1
        while stop < len(same) and same[stop] == same[stop - 1] + 1:
            stop += 1
        run = slice(int(same[start]), int(same[stop - 1]) + 2)
        order[run] = sorted(order[run].tolist(), key=lambda index: (table.ids[index], int(table.lines[index])))
        start = stop
    return order


def _take(table: RowTable, order: NDArray[np.int64]) -> RowTable:
    changed: dict[str, Any] = {
        field.name: getattr(table, field.name)[order]
        for field in fields(table)
        if isinstance(getattr(table, field.name), np.ndarray)
    }
    texts = table.sketch
    changed["ids"] = [table.ids[index] for index in order.tolist()]
    changed["sketch"] = texts.take(order)
    changed["shingles"] = table.shingles.in_order(order)
    return replace(table, **changed)
