"""What was paid for is there again after anything that can end a process."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from tasks.contracts.errors import StoreError
from tasks.data.synthesis.journal import JOURNAL, Journal, Reply
from tasks.data.synthesis.purse import Cost

ONE = Reply("one\n\u2028", "stop", 10, 2, True)
TWO = Reply("", "length", 11, 64, False)


def test_replies_are_found_again(tmp_path: Path) -> None:
    with Journal(tmp_path, "run") as journal:
        assert journal.find("a") is None
        journal.keep("a", ONE)
        journal.keep("b", TWO)
        assert (journal.find("a"), journal.find("b")) == (ONE, TWO)
    with Journal(tmp_path, "other") as journal:
        assert (journal.find("a"), journal.find("b"), journal.find("c")) == (ONE, TWO, None)
        journal.keep("c", ONE)
    with Journal(tmp_path, "run") as journal:
        assert journal.find("c") == ONE


def test_losses_are_charged_to_the_run_that_had_them(tmp_path: Path) -> None:
    with Journal(tmp_path, "run") as journal:
        journal.keep_loss(Cost(1, 100, 10))
        journal.keep("a", ONE)
        journal.keep_loss(Cost(1, 50, 10))
        assert journal.lost == Cost(2, 150, 20)
    with Journal(tmp_path, "run") as journal:
        assert journal.lost == Cost(2, 150, 20)
    with Journal(tmp_path, "other") as journal:
        assert journal.lost == Cost()


def test_half_a_line_is_what_a_crash_leaves_and_is_taken_off(tmp_path: Path) -> None:
    with Journal(tmp_path, "run") as journal:
        journal.keep("a", ONE)
        journal.keep("b", TWO)
    path = tmp_path / JOURNAL
    path.write_bytes(path.read_bytes()[:-7])
    with Journal(tmp_path, "run") as journal:
        assert (journal.find("a"), journal.find("b")) == (ONE, None)
        journal.keep("b", TWO)
    with Journal(tmp_path, "run") as journal:
        assert (journal.find("a"), journal.find("b")) == (ONE, TWO)


@pytest.mark.parametrize("line", [b"{}\n", b"[1]\n", b'{"digest": "x"}\n', b'{"run": "run", "lost": 3}\n', b"\xff\n"])
def test_a_damaged_line_is_named(tmp_path: Path, line: bytes) -> None:
    with Journal(tmp_path, "run") as journal:
        journal.keep("a", ONE)
    with (tmp_path / JOURNAL).open("ab") as out:
        out.write(line)
    with pytest.raises(StoreError, match="cannot be read") as caught:
        Journal(tmp_path, "run")
    assert caught.value.where == f"{tmp_path / JOURNAL}:2"


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with Journal(tmp_path, "run"), pytest.raises(StoreError, match="Another run"):
        Journal(tmp_path, "run")
    with Journal(tmp_path, "run") as journal:
        assert journal.find("a") is None


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    with Journal(tmp_path, "run") as journal:
        journal.keep("a", ONE)

        def full(file: int, data: Any) -> int:
            write(file, data[:5])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patched:
            patched.setattr(os, "write", full)
            with pytest.raises(StoreError, match="No space left"):
                journal.keep("b", TWO)
        assert journal.find("b") is None
        journal.keep("c", TWO)
    with Journal(tmp_path, "run") as journal:
        assert (journal.find("a"), journal.find("b"), journal.find("c")) == (ONE, None, TWO)


def test_nobody_else_may_read_it(tmp_path: Path) -> None:
    with Journal(tmp_path, "run"):
        assert (tmp_path / JOURNAL).stat().st_mode & 0o077 == 0
