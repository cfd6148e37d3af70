"""The fingerprint of a recipe and the digest of bytes."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tasks.contracts.spec import Policy, TaskKind
from tasks.store import canonical, digest_bytes, digest_file, digest_folder, fingerprint


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"b": 1, "a": [1, 2.5, None, True]}, '{"a":[1,2.5,null,true],"b":1}'),
        ((1, 2), "[1,2]"),
        ("ü€", '"ü€"'),
        (TaskKind.CLASSIFY, '"classify"'),
        (Policy(), canonical(Policy().model_dump(mode="json"))),
        ({"kind": TaskKind.EXTRACT}, '{"kind":"extract"}'),
    ],
)
def test_one_text_for_one_value(value: Any, text: str) -> None:
    assert canonical(value) == text


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"x": {1, 2}}, "value.x: a set"),
        ({"x": [Path("a")]}, r"value.x\[0\]: a PosixPath"),
        ({"x": float("nan")}, "value.x: nan"),
        ({"x": float("inf")}, "value.x: inf"),
        ({1: "x"}, "keys must be strings"),
        (b"x", "value: a bytes"),
        ({"x": object()}, "value.x: a object"),
        ({"x": datetime(2026, 1, 1)}, "value.x: a datetime"),
    ],
)
def test_what_has_no_text_is_refused_by_name(value: Any, where: str) -> None:
    with pytest.raises(TypeError, match=where):
        canonical(value)


def test_fingerprint_follows_the_recipe() -> None:
    base = fingerprint("train", 1, {"lr": 0.1, "seed": 1}, {"data": "d" * 64})
    assert base == fingerprint("train", 1, {"seed": 1, "lr": 0.1}, {"data": "d" * 64})
    others = {
        fingerprint("eval", 1, {"lr": 0.1, "seed": 1}, {"data": "d" * 64}),
        fingerprint("train", 2, {"lr": 0.1, "seed": 1}, {"data": "d" * 64}),
        fingerprint("train", 1, {"lr": 0.2, "seed": 1}, {"data": "d" * 64}),
        fingerprint("train", 1, {"lr": 0.1}, {"data": "d" * 64}),
        fingerprint("train", 1, {"lr": 0.1, "seed": 1}, {"data": "e" * 64}),
        fingerprint("train", 1, {"lr": 0.1, "seed": 1}, {"rows": "d" * 64}),
        fingerprint("train", 1, {"lr": 0.1, "seed": 1}, {}),
    }
    assert base not in others
    assert len(others) == 7


def test_fingerprint_is_the_same_in_every_process() -> None:
    code = "from tasks.store import fingerprint; print(fingerprint('s', 1, {'b': [1.5], 'a': 'ü'}, {'x': 'y'}))"
    seen = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert seen == {fingerprint("s", 1, {"a": "ü", "b": [1.5]}, {"x": "y"})}


def test_digest_of_a_folder_is_names_and_bytes(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        (folder / "sub").mkdir(parents=True)
        (folder / "sub" / "a").write_bytes(b"a")
        (folder / "b").write_bytes(b"b")
    assert digest_file(one / "b") == digest_bytes(b"b") == hashlib.sha256(b"b").hexdigest()
    digest = digest_folder(one)
    assert digest_folder(two) == digest
    (two / "b").rename(two / "c")
    assert digest_folder(two) != digest
    (two / "c").rename(two / "b")
    assert digest_folder(two) == digest
    (two / "b").write_bytes(b"B")
    assert digest_folder(two) != digest
