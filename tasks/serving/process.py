"""A process of its own that outlives the one that started it, and how it is found again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil
from pydantic import ValidationError

from tasks.contracts.spec import Frozen

# The process writes down who it is before it becomes the engine, so a host that is killed at any moment loses none:
# either the file is there, or the process sees that the record names another run by now, and ends. The record is
# written before this file is looked for, and this file before the record is read, so one of both sees the other.
_BECOMES_ENGINE = """
import json, os, sys, psutil
record, file, run, *command = sys.argv[1:]
me = psutil.Process()
while True:  # see _after_boot
    boot, started = psutil.boot_time(), me.create_time()
    if psutil.boot_time() == boot:
        break
with open(file + ".part", "w") as out:
    json.dump({"run": run, "pid": me.pid, "after_boot": started - boot}, out)
    out.flush()
    os.fsync(out.fileno())
os.replace(file + ".part", file)
with open(record) as written:
    if json.load(written)["run"] != run:
        sys.exit("another run was started in the meantime")
os.execvp(command[0], command)
"""
_KILL_SECONDS = 10.0
_SAME = 0.1  # seconds; the kernel counts starts in hundredths


class ProcessMark(Frozen):
    """Which process a run is.

    Attributes:
        run: which start of the engine it is.
        pid: number of the process, and of its session.
        after_boot: seconds from the machine's start to its own. Unlike the time of day, this is the same after the
            clock was set.
    """

    run: str
    pid: int
    after_boot: float


class EngineProcess:
    """An engine's process and all that it started, which share a session."""

    def __init__(self, pid: int, after_boot: float, child: subprocess.Popen[bytes] | None = None) -> None:
        """Know a process; `child` is it, where this very process is its parent."""
        self.pid = pid
        self._after_boot = after_boot
        self._child = child

    @classmethod
    def start(
        cls, command: Sequence[str], environment: Mapping[str, str], *, run: str, record: Path, mark: Path, log: Path
    ) -> Self:
        """Start a command in a session of its own.

        Args:
            command: program and arguments.
            environment: all of its variables.
            run: which start this is.
            record: JSON file with a field `run`; naming another run there stops this one before it begins.
            mark: file in which the process writes who it is.
            log: file for what it says; made anew.
        """
        with log.open("wb") as out:
            child = subprocess.Popen(
                [sys.executable, "-c", _BECOMES_ENGINE, str(record), str(mark), run, *command],
                env=dict(environment),
                cwd="/",  # it must not hold the folder that this process was started in
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return cls(child.pid, _after_boot(psutil.Process(child.pid)), child)

    @classmethod
    def find(cls, mark: Path) -> Self | None:
        """The process that wrote `mark`, or what is left of its session; None where nothing of it runs."""
        try:
            found = ProcessMark.model_validate_json(mark.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValidationError):  # never started, or killed while it wrote
            return None
        process = cls(found.pid, found.after_boot)
        return process if any(process._members()) else None

    def ended(self) -> str | None:
        """How it ended, in words; None while it runs."""
        if self._child is not None:
            status = self._child.poll()
            if status is None:
                return None
            return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        return None if self._is_leader_alive() else "nobody saw how"

    def terminate(self) -> None:
        """Ask it to end. What it started is its own to end."""
        if self.ended() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)

    def wait(self, seconds: float) -> bool:
        """Whether it ends within this time."""
        deadline = time.monotonic() + seconds
        while self.ended() is None:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.02)
        return True

    def kill(self) -> None:
        """End it and all that it started, at once; it is gone when this returns, unless the kernel holds it."""
        deadline = time.monotonic() + _KILL_SECONDS
        while True:
            left = list(self._members())
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            if self._child is not None:
                self._child.poll()  # takes its exit status, else it stays as a zombie
            if not left or time.monotonic() > deadline:
                return
            time.sleep(0.02)

    def memory_bytes(self) -> int:
        """Resident memory of it and all that it started; pages that they share are counted for each."""
        total = 0
        for process in self._members():
            with suppress(psutil.NoSuchProcess):
                total += int(process.memory_info().rss)
        return total

    def _members(self) -> Iterator[psutil.Process]:
        """Living processes of the session. The kernel gives a session's number to no new process while one is left."""
        if self._leader_is_stranger():
            return
        for pid in psutil.pids():
            try:
                if os.getsid(pid) == self.pid and (process := psutil.Process(pid)).status() != psutil.STATUS_ZOMBIE:
                    yield process
            except (ProcessLookupError, PermissionError, psutil.NoSuchProcess):
                continue

    def _leader_is_stranger(self) -> bool:
        try:
            return abs(_after_boot(psutil.Process(self.pid)) - self._after_boot) > _SAME
        except psutil.NoSuchProcess:
            return False

    def _is_leader_alive(self) -> bool:
        try:
            found = psutil.Process(self.pid)
            return abs(_after_boot(found) - self._after_boot) <= _SAME and found.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def _after_boot(process: psutil.Process) -> float:
    """Seconds from the machine's start to the process's.

    The kernel tells the machine's start in whole seconds of the time of day, and psutil adds it to what it knows of the
    process. A clock that is set between two readings would move this by a second or more, and the process would be
    taken for a stranger: so both readings have to be of the same clock.
    """
    while True:
        boot, started = float(psutil.boot_time()), float(process.create_time())
        if psutil.boot_time() == boot:
            return started - boot


def end_of_log(log: Path, lines: int = 30) -> str:
    """The last lines of a log, indented; what cannot be read as text is replaced."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 64_000))
            tail = file.read().decode(errors="replace").splitlines()[-lines:]
    except FileNotFoundError:
        return "    (no log)"
    return "\n".join(f"    {line}" for line in tail) or "    (nothing)"
