"""Read a source of rows into the one shape that rows have here.

Sources are JSON Lines, CSV, Parquet, Label Studio exports, folders of such parts, and folders saved by `datasets`, on
this machine or at any fsspec URI. All are read piece by piece, so memory does not grow with the number of rows. What
cannot be read stops the run and names file and line. A row that can be read but not used (no text, wrong type) goes on
to `unreadable.jsonl`, for the validation to count and quarantine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from tasks.contracts.errors import DataError
from tasks.contracts.progress import Progress, ProgressListener, ignore_progress
from tasks.contracts.spec import DataFormat, DataSpec, TaskKind
from tasks.data.sources.arrow import read_parquet, read_saved
from tasks.data.sources.fields import RowMaker
from tasks.data.sources.jsonl import read_jsonl
from tasks.data.sources.label_studio import read_label_studio
from tasks.data.sources.opening import Part
from tasks.data.sources.parts import (
    Source,
    digest_of,
    digest_part,
    find_also,
    find_source,
    join_also,
    join_digests,
    missing_also,
    no_rows,
)
from tasks.data.sources.record import Columns, Record, is_deep, name_value
from tasks.data.sources.table import read_csv

__all__ = ["ROWS", "UNREADABLE", "Ingested", "digest_source", "ingest", "missing_also", "source_format"]

ROWS = "rows.jsonl"
UNREADABLE = "unreadable.jsonl"

_REPORT_EVERY = 5_000


class Ingested(NamedTuple):
    """How many rows a source gave: usable ones, and ones that cannot be used."""

    rows: int
    unreadable: int


def source_format(data: DataSpec) -> DataFormat:
    """How the source is written, by the spec or by its ending.

    Raises:
        DataError: there is no such file or folder, it cannot be reached, or nothing says how it is written.
    """
    return find_source(data).format


def digest_source(data: DataSpec) -> str:
    """sha256 of the source's bytes; of a folder over the names and bytes of its parts; `data.also` counts where it has
    rows.

    Raises:
        DataError: it does not exist, its format is unknown, it is empty, or it may not be read.
    """
    source = find_source(data)
    return join_also(digest_of(source), [digest_part(part) for part in find_also(data, source)])


def ingest(
    data: DataSpec,
    kind: TaskKind,
    folder: Path,
    listener: ProgressListener = ignore_progress,
    expected_digest: str | None = None,
) -> Ingested:
    """Write the source's rows to `rows.jsonl` and the ones that cannot be used to `unreadable.jsonl`.

    A line of `unreadable.jsonl` is `{"line", "id", "reasons", "record"}`, and `"source"` where there are several parts.
    Blank lines of JSONL and CSV hold no row. A row without an id gets `sha-` and the first 16 digits of its content's
    sha256, so the same content has the same id in every file. A row of a folder of parts has its part's name as its
    source, unless `data.source_field` says another. Files of `data.also` are read like further parts, after the source;
    one that is not there has no rows.

    Args:
        data: where the rows are.
        kind: what the answers are.
        folder: where the two files are written.
        listener: is told how far it is.
        expected_digest: what `digest_source` gave. The bytes are hashed as they are read, so rows of other bytes are
            never taken for those of this digest; None does not compare.

    Raises:
        DataError: the source is missing, empty, not text in UTF-8, not well-formed (with the line), lacks a column,
            or changed since its digest was taken.
    """
    source = find_source(data)
    columns = Columns(data)
    maker = RowMaker(data, kind)
    also = find_also(data, source)
    digests: dict[str, str] = {}
    digests_also: list[str] = []
    rows = unreadable = 0
    size = source.size + sum(part.size for part in also)
    with (
        (folder / ROWS).open("w", encoding="utf-8", newline="\n") as good,
        # Half a surrogate pair has no UTF-8; written as the escape `\udXXX` it is valid JSON again.
        (folder / UNREADABLE).open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as bad,
    ):
        read = chain(_read(source, data, kind, columns, digests), _read_also(also, source.size, columns, digests_also))
        for record, part, position in read:
            row, reasons = maker.make(record, part)
            if row is not None:
                good.write(row.to_json() + "\n")
                rows += 1
            else:
                bad.write(_to_entry(record, part, maker.name_unusable(record), reasons) + "\n")
                unreadable += 1
            if (rows + unreadable) % _REPORT_EVERY == 0:
                listener(Progress(position / 2**20, max(size, position) / 2**20, "MB", f"{rows + unreadable:,} rows"))
    if expected_digest is not None and join_also(join_digests(source, digests), digests_also) != expected_digest:
        raise DataError(
            "The data source changed between the taking of its digest and the end of its reading.",
            where=data.source,
            fix="run again when nothing writes to it any more",
        )
    if rows + unreadable == 0:
        raise no_rows(source.uri, "holds no rows")
    columns.end(source.uri)
    listener(Progress(rows + unreadable, rows + unreadable, "rows"))
    return Ingested(rows, unreadable)


def _to_entry(record: Record, part: str | None, row_id: str, reasons: list[str]) -> str:
    """A line of `unreadable.jsonl`."""
    entry = {"line": record.line, "id": row_id, "reasons": reasons}
    if part is not None:
        entry["source"] = part
    kept = record.values if record.original is None else record.original
    try:
        text = json.dumps(entry | {"record": kept}, ensure_ascii=False, default=str)
        if not is_deep(kept, text):
            return text
    except RecursionError:
        pass
    # Whoever reads the file would fail at the depth, with as little as this to say of it.
    return json.dumps(entry | {"record": f"{name_value(kept)}, nested too deep to be kept"}, ensure_ascii=False)


def _read(
    source: Source, data: DataSpec, kind: TaskKind, columns: Columns, digests: dict[str, str]
) -> Iterator[tuple[Record, str | None, int]]:
    """Records, each with the name of its part (None where it says nothing) and how many bytes are read."""
    if source.format is DataFormat.DATASET:
        for record, position in read_saved(source, columns, digests):
            yield record, None, position
        columns.end_part(source.uri, has_header=True)
        return
    has_header = source.format in (DataFormat.CSV, DataFormat.PARQUET)
    before = 0
    for part in source.parts:
        columns.start_part()
        name = part.name if source.several else None
        empty = True
        for record, position in _read_part(part, source.format, data, kind, columns, digests):
            empty = False
            yield record, name, before + position
        if not empty:  # Spark writes parts without rows too
            columns.end_part(part.shown, has_header=has_header)
        before += part.size


def _read_also(
    parts: Sequence[Part], before: int, columns: Columns, digests: list[str]
) -> Iterator[tuple[Record, str | None, int]]:
    """Records of further files, which stand alone as rows of JSON Lines do; their digests are added."""
    for part in parts:
        columns.start_part()
        found: dict[str, str] = {}
        empty = True
        for record, position in read_jsonl(part, columns, found):
            empty = False
            yield record, part.name, before + position
        if not empty:
            columns.end_part(part.shown, has_header=False)
        digests.append(found[part.name])
        before += part.size


def _read_part(
    part: Part, written_as: DataFormat, data: DataSpec, kind: TaskKind, columns: Columns, digests: dict[str, str]
) -> Iterator[tuple[Record, int]]:
    match written_as:
        case DataFormat.CSV:
            return read_csv(part, columns, digests)
        case DataFormat.PARQUET:
            return read_parquet(part, columns, digests)
        case DataFormat.LABEL_STUDIO:
            return read_label_studio(part, data, kind, columns, digests)
        case _:
            return read_jsonl(part, columns, digests)
