"""Ties a process to its parent: `python -m tasks.training.tether PARENT_PID ARGUMENTS…` is `python ARGUMENTS…`, but
ends when the parent ends. Training on, unwatched, would hold the machine.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

TETHERED = "GOLDGATE_TETHERED"  # set for a training that somebody watches; unset when it is started by hand
_PR_SET_PDEATHSIG = 1
_LOOK_SECONDS = 1.0


def die_with_parent(parent: int | None) -> None:
    """End this process when its parent ends: on Linux by the kernel, through `exec`; elsewhere by looking.

    Args:
        parent: the process id that the parent must have; None for any. Another one means that it is gone already.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        sys.exit("the process that started this one is gone")
    if sys.platform != "linux":  # the thread ends with `exec`; whatever is executed calls this again
        threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])  # noqa: S606 - the project's own interpreter
