"""CSV: a header, then rows; the delimiter is the one for which the header has the columns that are needed."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from tasks.contracts.errors import DataError
from tasks.data.sources import record
from tasks.data.sources.opening import Part, open_part
from tasks.data.sources.record import Columns, Record, count_noun
from tasks.data.sources.text import byte_lines, decode_line

_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_LONGEST_BROKEN_HEADER = 2**14  # characters up to which a quote in the header may be open
_QUOTING = 'put fields with delimiters, quotes or line breaks in double quotes and write a quote inside as ""'


class _Header(NamedTuple):
    names: list[str]
    delimiter: str


@contextmanager
def _long_fields() -> Iterator[None]:
    """The csv module's limit of 128 KB a field is process-wide: here our own on rows counts, elsewhere the old one."""
    usual = csv.field_size_limit(record.MAX_ROW_BYTES)
    try:
        yield
    finally:
        csv.field_size_limit(usual)


def read_csv(part: Part, columns: Columns, digests: dict[str, str]) -> Iterator[tuple[Record, int]]:
    """Records, each with how many bytes of the part are read. Rows without a cell are blank lines.

    Raises:
        DataError: it cannot be read, or a row is too long, not UTF-8, or has more or fewer cells than the header.
    """
    position = 0
    with open_part(part, digests) as (stream, raw), _long_fields():
        last = ""

        def lines() -> Iterator[str]:
            nonlocal position, last
            for number, line in byte_lines(stream, part.shown):
                position = raw.position if part.compression else position + len(line)
                last = decode_line(line, number, part.shown)
                yield last

        source = lines()
        header, text, blank = _read_header(source, columns, part.shown)
        if header is None:
            return
        _check_header(header.names, f"{part.shown}:{blank + 1}")
        before = blank + max(1, text.count("\n"))  # lines up to the first row
        names = dict.fromkeys(header.names).keys()
        reader = csv.reader(source, delimiter=header.delimiter, strict=True)
        while True:
            start = before + reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise _cannot_split(error, f"{part.shown}:{start}") from error
            if not cells:
                continue
            if len(cells) != len(header.names):
                raise _wrong_length(cells, header, last, f"{part.shown}:{start}")
            columns.see(names)
            yield Record(start, dict(zip(header.names, cells, strict=True))), position


def _read_header(lines: Iterator[str], columns: Columns, shown: str) -> tuple[_Header | None, str, int]:
    """The header, its text, and the number of blank lines before it; no header where there are only blank lines."""
    blank = 0
    text = ""
    for line in lines:
        text += line
        if not text.strip("\r\n"):
            blank += 1
            text = ""
        elif text.count('"') % 2 == 0 or len(text) > _LONGEST_BROKEN_HEADER:  # else a line break within quotes
            break
    if not text:
        return None, text, blank
    found: list[_Header] = []
    problem: csv.Error | str = "the quotes of the header do not match"
    for delimiter in _DELIMITERS:
        try:
            rows = list(csv.reader(io.StringIO(text, newline="\n"), delimiter=delimiter, strict=True))
        except csv.Error as error:
            problem = error
            continue
        if len(rows) == 1:
            found.append(_Header(rows[0], delimiter))
    if not found:
        raise _cannot_split(problem, f"{shown}:{blank + 1}")
    fitting = [header for header in found if set(columns.needed) <= set(header.names)]
    if fitting:
        return fitting[0], text, blank
    # None fits, and which column is missing is told of later: the one with most columns lists them best.
    return max(found, key=lambda header: len(header.names)), text, blank


def _check_header(names: list[str], where: str) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(
            f"The CSV header names a column twice: {', '.join(map(repr, repeated))}.",
            where=where,
            fix="give each column a name of its own",
        )


def _cannot_split(error: csv.Error | str, where: str) -> DataError:
    return DataError(f"The CSV cannot be read: {error}.", where=where, fix=_QUOTING)


def _wrong_length(cells: list[str], header: _Header, last_line: str, where: str) -> DataError:
    """The error of a row with too many or too few cells; says so if another delimiter would fit it."""
    wanted = len(header.names)
    also = ""
    for delimiter, name in _DELIMITERS.items():
        if delimiter != header.delimiter and wanted > 1 and last_line.count(delimiter) == wanted - 1:
            also = f" Its delimiters seem to be {name}, those of the header are {_DELIMITERS[header.delimiter]}."
            break
    return DataError(
        f"A CSV row has {count_noun(len(cells), 'column')}, the header has {wanted}.{also}",
        where=where,
        fix=_QUOTING,
    )
