"""Many training processes for the price of one: imports what a worker imports, then forks one for each order.

`python -m tests.training.nursery` reads orders from standard input, one JSON line each, and answers each with a JSON
line. An order is a list of acts, which one process of its own does one after the other, each training in a process
below it: `{"run": SPEC}`, with what is to happen to it (`Harm`); `{"mount": FOLDER, "bytes": N}`, a disk of that size
that only this order sees; `{"copy": [FROM, TO]}`, out of it; `{"agree": CALLS, "store": FILE}`, see `_agree`. The
answer is the list of exit codes.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import signal
import subprocess
import sys
import traceback
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

_NEW_NAMESPACES = 0x00020000 | 0x10000000  # CLONE_NEWNS | CLONE_NEWUSER
_REMOUNT = 32


@dataclass(frozen=True)
class Harm:
    """What happens at the `call`-th call of the function `at` ("module:name" or "module:Class.name"), before it.

    Attributes:
        kind: "kill" (SIGKILL), "term" (SIGTERM), or "raise", which raises `error` as RuntimeError.
    """

    at: str
    call: int
    kind: str = "kill"
    error: str = ""


class Nursery:
    """The process to give orders to; a context manager."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.training.nursery"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()

    def run(self, spec: Path, *harms: Harm) -> int:
        """Train; the exit code, negative for a signal. Each harm is done to this one process."""
        return self.order({"run": str(spec), "harms": [asdict(harm) for harm in harms]})[0]

    def order(self, *acts: dict[str, Any]) -> list[int]:
        """Do acts in one process; the exit code of each."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(acts), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        assert answer, "the nursery has ended"
        codes: list[int] = json.loads(answer)
        return codes


def _arrange(harm: Harm) -> None:
    module, _, path = harm.at.partition(":")
    *outer, name = path.split(".")
    owner = functools.reduce(getattr, outer, import_module(module))
    original = getattr(owner, name)
    calls = 0

    def harmed(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == harm.call:
            if harm.kind == "raise":
                raise RuntimeError(harm.error)
            os.kill(os.getpid(), signal.SIGKILL if harm.kind == "kill" else signal.SIGTERM)
        return original(*arguments, **named)

    setattr(owner, name, harmed)


def _train(act: dict[str, Any]) -> int:
    from tasks.training.worker import main

    for harm in act.get("harms", []):
        _arrange(Harm(**harm))
    return main(Path(act["run"]))


def _mount(folder: str, size: int) -> None:
    """A small disk that only this process and those below it see; the same folder again changes its size."""
    libc = ctypes.CDLL(None, use_errno=True)
    again = os.path.ismount(folder)
    if not again:
        user, group = os.getuid(), os.getgid()
        if libc.unshare(_NEW_NAMESPACES) != 0:
            raise OSError(ctypes.get_errno(), "no namespace of its own")
        Path("/proc/self/setgroups").write_text("deny")  # asked for before a group may be mapped
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    options = f"size={size}".encode()
    if libc.mount(b"none", folder.encode(), b"tmpfs", _REMOUNT if again else 0, options) != 0:
        raise OSError(ctypes.get_errno(), "nothing can be mounted")


def _in_a_process(act: dict[str, Any]) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            log = os.open(str(Path(act["run"]).with_name("nursery.log")), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            code = _train(act)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _agree(asked: list[list[bool]], store: str) -> list[int]:
    """What each of several processes hears when they ask one another, call by call; an answer's bits, the first low."""
    children = []
    for rank, calls in enumerate(asked):
        children.append(os.fork())
        if children[-1] == 0:
            import torch

            from tasks.training.preempt import agree

            torch.distributed.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=len(asked)
            )
            answers = [agree(call, torch.device("cpu")) for call in calls]
            os._exit(sum(answer << at for at, answer in enumerate(answers)))
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _do(acts: list[dict[str, Any]]) -> list[int]:
    codes = []
    for act in acts:
        if "agree" in act:
            codes += _agree(act["agree"], act["store"])
        elif "mount" in act:
            try:
                _mount(act["mount"], act["bytes"])
                codes.append(0)
            except OSError as error:
                codes.append(-(error.errno or 1))
        elif "copy" in act:
            codes.append(subprocess.run(["cp", "-a", *act["copy"]], check=False).returncode)
        else:
            codes.append(_in_a_process(act))
    return codes


def main() -> None:
    """Take orders until there are no more."""
    import tasks.training.fit  # noqa: F401 - what takes the time

    for line in sys.stdin:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:  # a process for the whole order: what it mounts goes with it
            os.close(read)
            with os.fdopen(write, "w") as answer:
                json.dump(_do(json.loads(line)), answer)
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as answer:
            print(answer.read(), flush=True)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
