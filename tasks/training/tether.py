"""Ties a process to its parent: `python -m tasks.training.tether PARENT_PID ARGUMENTS…` is `python ARGUMENTS…`, but
ends when the parent ends. Training on, unwatched, would hold the machine.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

TETHERED = "GOLDGATE_TETHERED"  # set for a training that somebody watches; unset when it is started by hand
_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int | None) -> None:
    """Have the kernel kill this process when its parent ends; holds through `exec`. Does nothing outside Linux.

    Args:
        parent: the process id that the parent must have; None for any. Another one means that it is gone already.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        sys.exit("the process that started this one is gone")


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])  # noqa: S606 - the project's own interpreter
