"""Read JSONL, CSV, Parquet and `datasets` folders into the one shape that rows have here.

JSONL and CSV are read line by line, Parquet and `datasets` folders batch by batch, so memory does not grow with the
number of rows. A source that cannot be read stops the run and names file and line. A row that can be read but not
used (no text, wrong type) goes on to `unreadable.jsonl`, for the validation to count and quarantine.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

from tasks.contracts.errors import DataError
from tasks.contracts.progress import Progress, ProgressListener, ignore_progress
from tasks.contracts.rows import Message, Role, Row, canonical_json
from tasks.contracts.spec import DataFormat, DataSpec, TaskKind
from tasks.store import digest_file, digest_folder

ROWS = "rows.jsonl"
UNREADABLE = "unreadable.jsonl"

_MAX_LINE_BYTES = 64 * 2**20  # no row of a narrow task is that long; a file without line breaks is
_BATCH_ROWS = 1_000
_REPORT_EVERY = 5_000
_ROLES = frozenset(get_args(Role))
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_ENDINGS = {
    ".jsonl": DataFormat.JSONL,
    ".ndjson": DataFormat.JSONL,
    ".csv": DataFormat.CSV,
    ".parquet": DataFormat.PARQUET,
}


class Ingested(NamedTuple):
    """How many rows a source gave: usable ones, and ones that cannot be used."""

    rows: int
    unreadable: int


class _Record(NamedTuple):
    """A row as its source has it; `line` is its 1-based line, or row number where there are no lines."""

    line: int
    values: dict[str, Any]


def source_format(data: DataSpec) -> DataFormat:
    """How the source is written, by the spec or by its ending.

    Raises:
        DataError: there is no such file or folder, or its ending says nothing.
    """
    path = Path(data.source)
    if not path.exists():
        raise DataError(
            "The data source does not exist.",
            where=data.source,
            fix="correct `data.source`; relative paths count from the YAML file",
        )
    if data.format is not DataFormat.AUTO:
        if path.is_dir() != (data.format is DataFormat.DATASET):
            kind = "folder" if path.is_dir() else "file"
            raise DataError(
                f"The data source is a {kind}, but `data.format` is {data.format.value}.",
                where=data.source,
                fix="name a folder for `dataset` and a file for the other formats, or set `data.format: auto`",
            )
        return data.format
    if path.is_dir():
        return DataFormat.DATASET
    found = _ENDINGS.get(path.suffix.lower())
    if found is None:
        raise DataError(
            f"The ending {path.suffix!r} does not say how the source is written.",
            where=data.source,
            fix="set `data.format` to jsonl, csv, parquet or dataset",
        )
    return found


def digest_source(data: DataSpec) -> str:
    """sha256 of the source's bytes.

    Raises:
        DataError: it does not exist, its format is unknown, it is empty, or it may not be read.
    """
    written_as = source_format(data)
    path = Path(data.source)
    try:
        if written_as is DataFormat.DATASET:
            return digest_folder(path)
        if path.stat().st_size == 0:
            raise _no_rows(path, "is empty")
        return digest_file(path)
    except OSError as error:
        raise _cannot_read(path, error) from error


def ingest(data: DataSpec, kind: TaskKind, folder: Path, listener: ProgressListener = ignore_progress) -> Ingested:
    """Write the source's rows to `rows.jsonl` and the ones that cannot be used to `unreadable.jsonl`.

    A line of `unreadable.jsonl` is `{"line", "id", "reasons", "record"}`. Blank lines of JSONL and CSV hold no row.
    A row without an id gets `sha-` and the first 16 digits of its content's sha256, so the same content has the same
    id in every file.

    Raises:
        DataError: the source is missing, empty, not text in UTF-8, not well-formed (with the line), or lacks a column.
    """
    path = Path(data.source)
    written_as = source_format(data)
    columns = _Columns(data)
    rows = unreadable = 0
    total = path.stat().st_size if path.is_file() else 0
    with (
        (folder / ROWS).open("w", encoding="utf-8", newline="\n") as good,
        # Half a surrogate pair has no UTF-8; written as the escape `\udXXX` it is valid JSON again.
        (folder / UNREADABLE).open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as bad,
    ):
        for record, position in _read(path, written_as, columns):
            columns.see(record)
            row, reasons = _to_row(record, data, kind)
            if row is not None:
                good.write(row.to_json() + "\n")
                rows += 1
            else:
                entry = {
                    "line": record.line,
                    "id": _id_or_content(record, data),
                    "reasons": reasons,
                    "record": record.values,
                }
                bad.write(json.dumps(entry, ensure_ascii=False, default=str) + "\n")
                unreadable += 1
            if (rows + unreadable) % _REPORT_EVERY == 0:
                if written_as in (DataFormat.JSONL, DataFormat.CSV):
                    listener(Progress(position / 2**20, total / 2**20, "MB", f"{rows + unreadable:,} rows"))
                else:
                    listener(Progress(rows + unreadable, position, "rows"))
    if rows + unreadable == 0:
        raise _no_rows(path, "holds no rows")
    columns.check(path)
    listener(Progress(rows + unreadable, rows + unreadable, "rows"))
    return Ingested(rows, unreadable)


# -- columns ------------------------------------------------------------------------------------------------------


class _Columns:
    """Which columns the spec names and which ones the source has; says which are missing from every row."""

    def __init__(self, data: DataSpec) -> None:
        named = {"group_field": data.group_field, "slice_field": data.slice_field}
        if data.messages_field is not None:
            named["messages_field"] = data.messages_field
        else:
            named |= {"text_field": data.text_field, "target_field": data.target_field}
        if data.id_field != DataSpec.model_fields["id_field"].default:  # a source need not have ids, unless asked to
            named["id_field"] = data.id_field
        self._named = {field: column for field, column in named.items() if column is not None}
        self._seen: dict[str, None] = {}
        self.wanted = [*self._named.values(), *([data.id_field] if data.id_field else [])]

    def see(self, record: _Record) -> None:
        self._seen.update(dict.fromkeys(record.values))

    def check(self, path: Path) -> None:
        for field, column in sorted(self._named.items()):
            if column not in self._seen:
                raise DataError(
                    f"No row has the column {column!r} that `data.{field}` names. "
                    f"There are: {', '.join(map(repr, self._seen)) or 'none'}.",
                    where=f"{path}, column {column!r}",
                    fix=f"set `data.{field}` to one of the columns that are there",
                )


# -- formats ------------------------------------------------------------------------------------------------------


def _read(path: Path, written_as: DataFormat, columns: _Columns) -> Iterator[tuple[_Record, int]]:
    """Records, each with how far the source is read (bytes for text files, all rows for the others)."""
    try:
        match written_as:
            case DataFormat.CSV:
                yield from _read_csv(path)
            case DataFormat.PARQUET:
                yield from _read_parquet(path, columns)
            case DataFormat.DATASET:
                yield from _read_dataset(path, columns)
            case _:
                yield from _read_jsonl(path)
    except OSError as error:
        raise _cannot_read(path, error) from error


def _text_lines(path: Path) -> Iterator[tuple[int, str, int]]:
    """Lines with their 1-based number and the position behind them in bytes; line breaks are kept."""
    with path.open("rb") as file:
        number = position = 0
        while line := file.readline(_MAX_LINE_BYTES + 1):
            number += 1
            position += len(line)
            if len(line) > _MAX_LINE_BYTES:
                raise DataError(
                    f"A line is longer than {_MAX_LINE_BYTES // 2**20} MB.",
                    where=f"{path}:{number}",
                    fix="write one row a line; if the line is one row, it is too long for this tool",
                )
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"The file is not UTF-8: byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line.",
                    where=f"{path}:{number}",
                    fix="save it as UTF-8, for example `iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW` "
                    "(with the encoding that it really has)",
                ) from error
            yield number, text, position


def _read_jsonl(path: Path) -> Iterator[tuple[_Record, int]]:
    for number, line, position in _text_lines(path):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:  # nested too deep is a RecursionError
            raise DataError(
                f"A line is not valid JSON: {error}.",
                where=f"{path}:{number}",
                fix="correct the line; JSON Lines has one whole JSON object on each line",
            ) from error
        if not isinstance(values, dict):
            raise DataError(
                f"A line holds {_name(values)}, not a JSON object.",
                where=f"{path}:{number}",
                fix='write each row as an object, such as {"text": "...", "label": "..."}',
            )
        yield _Record(number, values), position


def _read_csv(path: Path) -> Iterator[tuple[_Record, int]]:
    position = 0

    def lines() -> Iterator[str]:
        nonlocal position
        for _, line, position in _text_lines(path):  # noqa: B007  `position` is read by the outer function
            yield line

    # The csv module's limit of 128 KB a field is process-wide; the line reader's own limit is the one that counts.
    csv.field_size_limit(_MAX_LINE_BYTES)
    reader = csv.reader(lines(), strict=True)
    header: list[str] | None = None
    while True:
        start = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"The CSV cannot be read: {error}.",
                where=f"{path}:{start}",
                fix='put fields with commas, quotes or line breaks in double quotes and write a quote inside as ""',
            ) from error
        if not cells:
            continue
        if header is None:
            header = cells
            repeated = sorted({name for name in header if header.count(name) > 1})
            if repeated:
                raise DataError(
                    f"The CSV header names a column twice: {', '.join(map(repr, repeated))}.",
                    where=f"{path}:{start}",
                    fix="give each column a name of its own",
                )
            continue
        if len(cells) != len(header):
            raise DataError(
                f"A CSV row has {len(cells)} columns, the header has {len(header)}.",
                where=f"{path}:{start}",
                fix="correct the row; a comma inside a field needs double quotes around the field",
            )
        yield _Record(start, dict(zip(header, cells, strict=True))), position


def _read_parquet(path: Path, columns: _Columns) -> Iterator[tuple[_Record, int]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            present = [name for name in columns.wanted if name in names]
            total = file.metadata.num_rows
            if total:
                columns.see(_Record(0, dict.fromkeys(names)))
            number = 0
            # An empty selection would give batches without rows, and the missing columns are told of afterwards.
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=present or None):
                for values in batch.to_pylist():
                    number += 1
                    yield _Record(number, values), total
    except pa.ArrowException as error:
        raise DataError(
            f"The Parquet file cannot be read: {error}.",
            where=str(path),
            fix="write the file again; it is cut short, damaged, or no Parquet",
        ) from error


def _read_dataset(path: Path, columns: _Columns) -> Iterator[tuple[_Record, int]]:
    if (path / "dataset_dict.json").exists():
        splits = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
        raise DataError(
            f"The folder holds several splits: {', '.join(splits)}.",
            where=str(path),
            fix=f"name one of them in `data.source`, such as {path / splits[0] if splits else path}",
        )
    import pyarrow as pa
    from datasets import ClassLabel, load_from_disk

    try:
        dataset = load_from_disk(str(path))
        present = [name for name in columns.wanted if name in dataset.column_names]
        total = len(dataset)
        if total:
            columns.see(_Record(0, dict.fromkeys(dataset.column_names)))
        coded = {name: dataset.features[name] for name in present if isinstance(dataset.features[name], ClassLabel)}
        number = 0
        chosen = dataset.select_columns(present) if present else dataset
        for batch in chosen.with_format("arrow").iter(batch_size=_BATCH_ROWS):
            for values in batch.to_pylist():
                for name, feature in coded.items():  # a ClassLabel is kept as a number; -1 is "no label"
                    code = values[name]
                    values[name] = feature.int2str(code) if code is not None and code >= 0 else None
                number += 1
                yield _Record(number, values), total
    except (FileNotFoundError, pa.ArrowException, ValueError, KeyError) as error:
        raise DataError(
            f"The folder is no readable dataset: {error}.",
            where=str(path),
            fix="save it again with `Dataset.save_to_disk`",
        ) from error


# -- one row ------------------------------------------------------------------------------------------------------


class _UnusableError(Exception):
    """Why a field cannot be used."""


def _to_row(record: _Record, data: DataSpec, kind: TaskKind) -> tuple[Row | None, list[str]]:
    """The row, or None and every reason why there is none."""
    reasons: list[str] = []

    def attempt(read: Any, *args: Any) -> Any:
        try:
            return read(*args)
        except _UnusableError as why:
            reasons.append(str(why))
            return None

    messages: tuple[Message, ...] | None
    target: str | None
    if data.messages_field is not None:
        turns = attempt(_conversation, record, data.messages_field)
        messages, answer = turns if turns is not None else (None, None)
        target = None if answer is None else attempt(_as_target, answer, kind, "the last assistant turn")
    else:
        assert data.text_field is not None  # noqa: S101  the spec refuses anything else
        assert data.target_field is not None  # noqa: S101
        text = attempt(_text, record, data.text_field)
        messages = None if text is None else (Message("user", text),)
        raw = attempt(_present, record, data.target_field)
        target = None if raw is None else attempt(_as_target, raw, kind, data.target_field)
    group = attempt(_name_of, record, data.group_field)
    slice_ = attempt(_name_of, record, data.slice_field)
    row_id = attempt(_name_of, record, data.id_field)
    if reasons or messages is None or target is None:
        return None, reasons
    if not row_id:
        content = json.dumps([[m.as_chat() for m in messages], target, group, slice_], ensure_ascii=False)
        row_id = _content_id(content)
    return Row(row_id, record.line, messages, target, group, slice_), []


def _id_or_content(record: _Record, data: DataSpec) -> str:
    try:
        row_id = _name_of(record, data.id_field)
    except _UnusableError:
        row_id = None
    return row_id or _content_id(json.dumps(record.values, sort_keys=True, default=str))


def _content_id(content: str) -> str:
    return "sha-" + hashlib.sha256(content.encode("utf-8")).hexdigest()[:16]


def _present(record: _Record, field: str) -> Any:
    if field not in record.values:
        raise _UnusableError(f"{field} is missing")
    if record.values[field] is None:
        raise _UnusableError(f"{field} is null")
    return record.values[field]


def _text(record: _Record, field: str) -> str:
    value = _present(record, field)
    if not isinstance(value, str):
        raise _UnusableError(f"{field} is {_name(value)}, not text")
    return _whole(value, field)


def _name_of(record: _Record, field: str | None) -> str | None:
    value = record.values.get(field) if field is not None else None
    if value is None or value == "":
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise _UnusableError(f"{field} is {_name(value)}, not text or a whole number")
    return _whole(value, str(field))


def _as_target(value: Any, kind: TaskKind, field: str) -> str:
    if kind is not TaskKind.EXTRACT:
        if not isinstance(value, str):
            raise _UnusableError(f"{field} is {_name(value)}, not text")
        return _whole(value, field)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise _UnusableError(f"{field} is not valid JSON: {error}") from error
    try:
        return _whole(canonical_json(value), field)
    except ValueError as error:
        raise _UnusableError(f"{field} holds NaN or Infinity, which JSON does not have") from error
    except TypeError as error:
        raise _UnusableError(f"{field} holds a value that JSON does not have: {error}") from error


def _conversation(record: _Record, field: str) -> tuple[tuple[Message, ...], str]:
    """The turns before the last assistant turn, and that turn."""
    turns = _present(record, field)
    if isinstance(turns, str):  # CSV has no lists
        try:
            turns = json.loads(turns)
        except (ValueError, RecursionError) as error:
            raise _UnusableError(f"{field} is not valid JSON: {error}") from error
    if not isinstance(turns, list):
        raise _UnusableError(f"{field} is {_name(turns)}, not a list of turns")
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise _UnusableError(f"{field}: turn {number} is {_name(turn)}, not an object with role and content")
        role: Any = turn.get("role")
        content = turn.get("content")
        if not isinstance(role, str) or role not in _ROLES:
            raise _UnusableError(f"{field}: turn {number} has the role {role!r}; there are {', '.join(sorted(_ROLES))}")
        if not isinstance(content, str):
            raise _UnusableError(f"{field}: the content of turn {number} is {_name(content)}, not text")
        messages.append(Message(cast(Role, role), _whole(content, f"{field}: turn {number}")))
    if not messages or messages[-1].role != "assistant":
        raise _UnusableError(f"{field} does not end with an assistant turn, so there is no answer to learn")
    if len(messages) == 1:
        raise _UnusableError(f"{field} has no turn before the answer")
    return tuple(messages[:-1]), messages[-1].content


def _whole(text: str, field: str) -> str:
    found = _SURROGATE.search(text)
    if found:
        at = found.start() + 1
        raise _UnusableError(f"{field} holds half a surrogate pair at character {at}, which UTF-8 cannot write")
    return text


def _name(value: Any) -> str:
    """What a value is, in words."""
    names = {dict: "an object", list: "a list", bool: "true or false", int: "a number", float: "a number", str: "text"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


# -- errors -------------------------------------------------------------------------------------------------------


def _no_rows(path: Path, what: str) -> DataError:
    return DataError(
        f"The data source {what}.", where=str(path), fix="check how it was written; it must hold at least one row"
    )


def _cannot_read(path: Path, error: OSError) -> DataError:
    return DataError(
        f"The data source cannot be read: {error.strerror or error}.",
        where=str(error.filename or path),
        fix="check that it exists and that this user may read it",
    )
