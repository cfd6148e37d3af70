"""Every answer that was paid for, kept before it is used, so that no run pays for it again."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import orjson

from tasks.contracts.errors import StoreError
from tasks.data.synthesis.purse import Cost

JOURNAL = "answers.jsonl"


class Reply(NamedTuple):
    """What the teacher answered.

    Attributes:
        content: the text of its answer; "" where it wrote none.
        finish: why it ended, as the server says ("stop", "length"), or "".
        prompt_tokens: tokens of the prompt.
        completion_tokens: tokens of the answer.
        measured: whether the server counted the tokens; else they are the most that it can have been.
    """

    content: str
    finish: str
    prompt_tokens: int
    completion_tokens: int
    measured: bool


class Journal:
    """Replies by the digest of their request, in one file that only grows; one process at a time writes it.

    In memory a reply takes its digest and its place in the file, whatever its length.

    Attributes:
        lost: what this run was charged, or may have been, for attempts that brought nothing.
    """

    def __init__(self, folder: Path, run: str) -> None:
        """Open the journal of a folder, or begin it.

        Args:
            folder: where it lies.
            run: what is charged for what is lost; runs with the same name go on from each other.

        Raises:
            StoreError: another process writes it, or a line of it cannot be read.
        """
        self._path = folder / JOURNAL
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        self._places: dict[str, tuple[int, int]] = {}
        self._run = run
        self.lost = Cost()
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._file)
            raise StoreError(
                "Another run is asking the same teacher for the same task.",
                where=str(self._path),
                fix="wait until it has ended; what it pays for is then reused",
            ) from error
        try:
            self._end = self._load()
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)  # and with it the lock

    def find(self, digest: str) -> Reply | None:
        """The reply to a request, if it was paid for before."""
        place = self._places.get(digest)
        if place is None:
            return None
        record = orjson.loads(os.pread(self._file, place[1], place[0]))
        return Reply(*(record[name] for name in Reply._fields))

    def keep(self, digest: str, reply: Reply) -> None:
        """Write a reply to the disk; only then may it be used."""
        self._places[digest] = self._append({"digest": digest, **reply._asdict()})

    def keep_loss(self, cost: Cost) -> None:
        """Write down what was or may have been charged for nothing."""
        self._append({"run": self._run, "lost": [*cost]})
        self.lost = self.lost.plus(cost)

    def _append(self, record: dict[str, Any]) -> tuple[int, int]:
        line = orjson.dumps(record) + b"\n"
        try:
            left = line
            while left:
                left = left[os.write(self._file, left) :]
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, self._end)  # half a line would spoil the next one
            raise StoreError(
                f"The journal of paid answers cannot be written: {error.strerror or error}",
                where=str(self._path),
                fix="free space or allow writing, then run again; the answers in it are kept",
            ) from error
        place = (self._end, len(line))
        self._end += len(line)
        return place

    def _load(self) -> int:
        """Learn what is there; return where the file ends."""
        end = 0
        with self._path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):  # the machine went down while it was written
                    os.ftruncate(self._file, end)
                    break
                try:
                    record = orjson.loads(line)
                    if "lost" in record:
                        if record["run"] == self._run:
                            self.lost = self.lost.plus(Cost(*record["lost"]))
                    else:
                        _ = [record[name] for name in Reply._fields]
                        self._places[record["digest"]] = (end, len(line))
                except (ValueError, KeyError, TypeError) as error:
                    raise StoreError(
                        "A line of the journal of paid answers cannot be read.",
                        where=f"{self._path}:{number}",
                        fix="take out that line; the answer that it held is asked for again",
                    ) from error
                end += len(line)
        return end
