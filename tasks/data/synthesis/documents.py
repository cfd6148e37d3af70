"""Source documents: read one after the other, long ones in parts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tasks.contracts.errors import DataError
from tasks.contracts.synthesis import DocumentsSpec
from tasks.store import digest_file, digest_folder

_TEXTS = (".txt", ".md")
_LINES = (".jsonl", ".ndjson")


class Document(NamedTuple):
    """A document, or a part of a long one.

    Attributes:
        id: of the whole document.
        part: number of the part, from 1.
        text: what it says.
    """

    id: str
    part: int
    text: str


def digest_documents(spec: DocumentsSpec) -> str:
    """sha256 over the names and bytes of the documents.

    Raises:
        DataError: there are none, or they cannot be read.
    """
    path = Path(spec.path)
    files = _files(path)
    try:
        return digest_file(files[0]) if path.is_file() else digest_folder(path)
    except OSError as error:
        raise _cannot_read(path, error) from error


def read_documents(spec: DocumentsSpec) -> Iterator[Document]:
    """The documents in the order of their names, each in parts of at most `max_characters`; empty ones are left out.

    Raises:
        DataError: a file cannot be read, is of another kind, or a line of it holds no text.
    """
    path = Path(spec.path)
    root = path if path.is_dir() else path.parent
    for file in _files(path):
        name = file.relative_to(root).as_posix()
        try:
            if file.suffix.lower() in _TEXTS:
                yield from _parts(name, file.read_text(encoding="utf-8-sig"), spec.max_characters)
                continue
            with file.open(encoding="utf-8-sig") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        document_id, text = _record(line, spec, f"{file}:{number}", f"{name}:{number}")
                        yield from _parts(document_id, text, spec.max_characters)
        except UnicodeDecodeError as error:
            raise DataError(
                f"A document is not UTF-8: {error.reason}.", where=str(file), fix="save it as UTF-8"
            ) from error
        except OSError as error:
            raise _cannot_read(file, error) from error


def part_text(text: str, longest: int) -> list[str]:
    """The text in parts of at most `longest` characters, cut between paragraphs, else lines, words, or anywhere."""
    parts: list[str] = []
    left = text.strip()
    while len(left) > longest:
        window = left[: longest + 1]
        cut = next((at for mark in ("\n\n", "\n", " ") if (at := window.rfind(mark)) > longest // 2), longest)
        parts.append(left[:cut].rstrip())
        left = left[cut:].lstrip()
    return [part for part in (*parts, left) if part]


def _parts(document_id: str, text: str, longest: int) -> Iterator[Document]:
    for number, part in enumerate(part_text(text, longest), start=1):
        yield Document(document_id, number, part)


def _record(line: str, spec: DocumentsSpec, where: str, otherwise: str) -> tuple[str, str]:
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"A line is not valid JSON: {error}.", where=where, fix="correct the line") from error
    text = record.get(spec.text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise DataError(
            f"A document has no text in the column {spec.text_field!r}.",
            where=where,
            fix="set `documents.text_field` to the column with the text, or correct the line",
        )
    document_id = record.get(spec.id_field)
    return (str(document_id) if isinstance(document_id, str | int) and document_id != "" else otherwise), text


def _files(path: Path) -> list[Path]:
    """The files, by name; hidden ones are none of them."""
    if not path.exists():
        raise DataError(
            "The documents do not exist.",
            where=str(path),
            fix="correct `documents.path`; relative paths count from the YAML file",
        )
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if _is_shown(file, path))
    for file in files:
        if file.suffix.lower() not in (*_TEXTS, *_LINES):
            raise DataError(
                f"The ending {file.suffix!r} is none of {', '.join((*_TEXTS, *_LINES))}.",
                where=str(file),
                fix="write the document as text, or keep it elsewhere",
            )
    if not files:
        raise DataError("The folder of documents is empty.", where=str(path), fix="put .txt, .md or .jsonl files there")
    return files


def _is_shown(file: Path, root: Path) -> bool:
    return file.is_file() and not any(part.startswith(".") for part in file.relative_to(root).parts)


def _cannot_read(path: Path, error: OSError) -> DataError:
    return DataError(
        f"The documents cannot be read: {error.strerror or error}.",
        where=str(error.filename or path),
        fix="check that they exist and that this user may read them",
    )
