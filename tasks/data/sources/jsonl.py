"""JSON Lines: one object a line; blank lines hold no row."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import orjson

from tasks.contracts.errors import DataError
from tasks.data.sources.opening import Part, open_part
from tasks.data.sources.record import Columns, Record, name_value
from tasks.data.sources.text import byte_lines, decode_line

# orjson makes a float of a whole number that does not fit into 64 bits, wherever it stands in one of the other types.
_LONG_NUMBER = re.compile(rb"[0-9]{19}")
_NO_FLOATS = frozenset({str, int, bool, type(None)})


def read_jsonl(part: Part, columns: Columns, digests: dict[str, str]) -> Iterator[tuple[Record, int]]:
    """Records, each with how many bytes of the part are read.

    Raises:
        DataError: it cannot be read, or a line is too long, not UTF-8, or no JSON object.
    """
    with open_part(part, digests) as (stream, raw):
        compressed = part.compression is not None
        position = 0
        for number, line in byte_lines(stream, part.shown):
            position = raw.position if compressed else position + len(line)
            try:
                values = orjson.loads(line)
            except orjson.JSONDecodeError:
                values = None  # it refuses some of what Python reads, such as NaN and half a surrogate pair
            if type(values) is not dict or (
                not _NO_FLOATS.issuperset(map(type, values.values())) and _LONG_NUMBER.search(line)
            ):
                values = _read_slowly(line, number, part.shown)
                if values is None:
                    continue
            columns.see(values.keys())
            yield Record(number, values), position


def _read_slowly(line: bytes, number: int, shown: str) -> dict[str, Any] | None:
    """The object of a line as the standard library reads it, None of a blank line."""
    text = decode_line(line, number, shown)
    if not text.strip():
        return None
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:  # nested too deep is a RecursionError
        raise DataError(
            f"A line is not valid JSON: {error}.",
            where=f"{shown}:{number}",
            fix="correct the line; JSON Lines has one whole JSON object on each line",
        ) from error
    if not isinstance(values, dict):
        raise DataError(
            f"A line holds {name_value(values)}, not a JSON object.",
            where=f"{shown}:{number}",
            fix='write each row as an object, such as {"text": "...", "label": "..."}',
        )
    return values
