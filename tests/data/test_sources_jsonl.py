"""JSON Lines: the fast parser gives what Python's own gives, whatever JSON may hold."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.contracts.spec import DataSpec
from tasks.data.sources.jsonl import read_jsonl
from tasks.data.sources.opening import Part
from tasks.data.sources.record import Columns

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=2**62, max_value=2**70)
    | st.floats(allow_subnormal=False)  # a library built with -ffast-math may have switched them off in this process
    | st.text()
    | st.from_regex(r"[0-9]{15,25}", fullmatch=True)
    | st.text(st.characters(categories=["Cs", "Ll"]), max_size=5)  # half surrogate pairs
)
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)


def read(lines: bytes) -> list[tuple[int, dict[str, Any]]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.jsonl")
        path.write_bytes(lines)
        part = Part(LocalFileSystem(), str(path), path.name, str(path), len(lines), None)
        digests: dict[str, str] = {}
        found = [(record.line, record.values) for record, _ in read_jsonl(part, Columns(DataSpec(source="x")), digests)]
        assert [*digests] == ["x.jsonl"]
        return found


@settings(max_examples=100, deadline=None)
@given(st.lists(st.dictionaries(st.text(), VALUES, max_size=4), min_size=1, max_size=3), st.booleans())
def test_every_object_is_read_as_python_reads_it(objects: list[dict[str, Any]], escaped: bool) -> None:
    lines = [json.dumps(each, ensure_ascii=escaped).encode(errors="replace") for each in objects]
    wanted = [(number, json.loads(line)) for number, line in enumerate(lines, start=1)]
    assert repr(read(b"\n".join(lines))) == repr(wanted)  # as text NaN equals NaN, and 1 is not 1.0


@pytest.mark.parametrize(
    "line",
    [
        b'{"n": 18446744073709551616}',
        b'{"n": -9223372036854775809}',
        b'{"n": [100000000000000000000, 1e400, -1e400, NaN, -0.0, 1E2]}',
        b'{"n": 1, "n": 2}',
        b'{"\\ud83d": "\\ud83d\\ude00 \\ude00"}',
        b'\xef\xbb\xbf{"n": 0.1234567890123456789}',
        b' {"n": 1}\t\r',
    ],
)
def test_what_parsers_differ_on(line: bytes) -> None:
    assert repr(read(line)) == repr([(1, json.loads(line.decode("utf-8-sig")))])


def test_blank_lines_are_counted() -> None:
    assert read(b'\n \xc2\xa0\n{"n": 1}\r\n\r\n{"n": 2}') == [(3, {"n": 1}), (5, {"n": 2})]
