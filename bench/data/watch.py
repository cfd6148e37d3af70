"""Seconds and peak memory of a command and of all that it starts."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

_EVERY = 0.05  # seconds between two looks


class Watched(NamedTuple):
    """What a command took.

    Attributes:
        out: what it printed.
        seconds: from start to end, with start-up and imports.
        peak_mb: the largest sum of resident memory over its processes; pages they share count for each.
        processes: the most there were at a time.
    """

    out: str
    seconds: float
    peak_mb: float
    processes: int


def watch(command: Sequence[str | Path]) -> Watched:
    """Run a command to its end.

    Raises:
        RuntimeError: it failed, with the end of what it said.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        process = subprocess.Popen([str(part) for part in command], stdout=out, stderr=errors, text=True)
        root = psutil.Process(process.pid)
        peak, most = 0, 1
        while process.poll() is None:
            sizes = [_resident(one) for one in [root, *_children(root)]]
            peak, most = max(peak, sum(sizes)), max(most, sum(size > 0 for size in sizes))
            time.sleep(_EVERY)
        seconds = time.perf_counter() - start
        out.seek(0)
        errors.seek(0)
        if process.returncode != 0:
            said = "\n".join(errors.read().splitlines()[-15:])
            raise RuntimeError(f"{' '.join(str(part) for part in command)} ended with {process.returncode}:\n{said}")
        return Watched(out.read(), seconds, peak / 2**20, most)


def _children(root: psutil.Process) -> list[psutil.Process]:
    try:
        return root.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0
