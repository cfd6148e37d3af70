"""Documents: read in order, long ones in parts, nothing left out in silence."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.contracts.errors import DataError
from tasks.contracts.synthesis import DocumentsSpec
from tasks.data.synthesis.documents import Document, digest_documents, part_text, read_documents
from tests.data.toy_data import write_lines


def test_a_folder_of_texts_and_lines(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("\ufeffsecond", encoding="utf-8")
    (tmp_path / "c").mkdir()
    (tmp_path / "c/a.txt").write_text("  third\n")
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / "d.txt").write_text(" \n")  # says nothing
    write_lines(tmp_path / "a.jsonl", [{"id": "x", "text": "first"}, {"text": "also first"}, {"id": 7, "text": "7th"}])
    assert list(read_documents(DocumentsSpec(path=str(tmp_path)))) == [
        Document("x", 1, "first"),
        Document("a.jsonl:2", 1, "also first"),
        Document("7", 1, "7th"),
        Document("b.md", 1, "second"),
        Document("c/a.txt", 1, "third"),
    ]


def test_a_long_document_is_parted_and_nothing_of_it_lost(tmp_path: Path) -> None:
    text = "\n\n".join(f"Paragraph {number}. " + "word " * 30 for number in range(40))
    (tmp_path / "a.txt").write_text(text)
    parts = list(read_documents(DocumentsSpec(path=str(tmp_path), max_characters=500)))
    assert [part.part for part in parts] == list(range(1, len(parts) + 1))
    assert {part.id for part in parts} == {"a.txt"}
    assert all(len(part.text) <= 500 for part in parts)
    assert " ".join(part.text for part in parts).split() == text.split()
    assert all(part.text.startswith("Paragraph") for part in parts)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", []),
        ("short", ["short"]),
        ("aaaa bbbb", ["aaaa", "bbbb"]),
        ("aaaabbbb", ["aaaabb", "bb"]),
        ("aaaa\nb cc", ["aaaa", "b cc"]),
        ("aa\n\n\n\nbb cc", ["aa\n\n\n\n", "bb cc"]),
    ],
)
def test_where_it_is_cut(text: str, parts: list[str]) -> None:
    assert part_text(text, 6) == [part.strip() for part in parts]


@pytest.mark.parametrize(
    ("name", "content", "what", "where"),
    [
        ("a.pdf", b"%PDF", "The ending '.pdf' is none of", "a.pdf"),
        ("a.txt", b"\xff\xfe", "not UTF-8", "a.txt"),
        ("a.jsonl", b'{"text": "x"}\n{', "not valid JSON", "a.jsonl:2"),
        ("a.jsonl", b'{"text": 3}\n', "no text in the column 'text'", "a.jsonl:1"),
        ("a.jsonl", b"[]\n", "no text in the column 'text'", "a.jsonl:1"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, what: str, where: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=what) as caught:
        list(read_documents(DocumentsSpec(path=str(tmp_path))))
    assert caught.value.where == str(tmp_path / where)


def test_no_documents(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="folder of documents is empty"):
        list(read_documents(DocumentsSpec(path=str(tmp_path))))
    with pytest.raises(DataError, match="do not exist"):
        digest_documents(DocumentsSpec(path=str(tmp_path / "nowhere")))


def test_the_digest_goes_by_names_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    spec = DocumentsSpec(path=str(tmp_path))
    before = digest_documents(spec)
    assert digest_documents(spec) == before
    (tmp_path / "a.txt").write_text("two")
    assert digest_documents(spec) != before
    assert digest_documents(DocumentsSpec(path=str(tmp_path / "a.txt"))) != before
