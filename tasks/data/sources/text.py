"""Lines of a text file in UTF-8, without ever holding more than one."""

from __future__ import annotations

import io
from collections.abc import Iterator

from tasks.contracts.errors import DataError
from tasks.data.sources import record


def byte_lines(stream: io.BufferedReader, shown: str) -> Iterator[tuple[int, bytes]]:
    """Lines with their 1-based number; line breaks are kept.

    Raises:
        DataError: a line is longer than `record.MAX_ROW_BYTES`; no more than that is read of it.
    """
    longest = record.MAX_ROW_BYTES
    number = 0
    while line := stream.readline(longest + 1):
        number += 1
        if len(line) > longest:
            raise too_long("line", f"{shown}:{number}")
        yield number, line


def decode_line(line: bytes, number: int, shown: str) -> str:
    """The text of a line; a byte order mark at the start of the file is left out.

    Raises:
        DataError: it is not UTF-8.
    """
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(line[error.start], f"byte {error.start + 1} of the line", f"{shown}:{number}") from error


def not_utf8(byte: int, place: str, where: str) -> DataError:
    """The error that a file in another encoding gives."""
    return DataError(
        f"The file is not UTF-8: byte 0x{byte:02x} at {place}.",
        where=where,
        fix="save it as UTF-8, for example `iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW` "
        "(with the encoding that it really has)",
    )


def too_long(noun: str, where: str) -> DataError:
    """The error that a row gives which would fill the memory."""
    return DataError(
        f"A {noun} is longer than {record.MAX_ROW_BYTES // 2**20} MB.",
        where=where,
        fix="write one row a line; if it is one row, it is too long for this tool",
    )
