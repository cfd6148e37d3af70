"""A gateway in a process of its own, as `goldgate serve` runs it, with fake engines: `python -m … STORE FAKES`.

with running_gateway(store, fakes) as url: ...
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tasks.contracts.review import SpoolSpec
from tasks.contracts.serving import GatewaySpec, LogSpec
from tasks.contracts.spec import ExecutionSpec
from tasks.serving.gateway.server import run_gateway
from tasks.serving.host import Pace
from tests.serving.fake_engine import ROOT, FakeCommand

PACE = Pace(look=0.1, probe=1.0, probe_timeout=10.0, retry=0.1, back_off=(0.1, 0.2, 0.4), stable=60.0, end=5.0)
_START_SECONDS = 60.0


@contextmanager
def running_gateway(store: Path, fakes: FakeCommand) -> Iterator[str]:
    """Its address; at the end it is stopped, its engines with it, and its folder is deleted."""
    with gateway_process(store, fakes) as process:
        try:
            yield wait_for_address(store, process)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait(timeout=30)
            end_engines(fakes)
            shutil.rmtree(store / "serving")


@contextmanager
def gateway_process(store: Path, fakes: FakeCommand, port: int = 0) -> Iterator[subprocess.Popen[bytes]]:
    """The process; the caller waits for its address, and is free to kill it."""
    (store / "serving").mkdir(parents=True, exist_ok=True)
    with (store / "gateway.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.serving.gateway_process", str(store), str(fakes.folder), str(port)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=log,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def wait_for_address(store: Path, process: subprocess.Popen[bytes]) -> str:
    """Where it listens, once it does."""
    path = store / "serving" / "gateway.json"
    until = time.monotonic() + _START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        with suppress(OSError, ValueError):
            record = json.loads(path.read_text())
            if record["pid"] == process.pid:
                return str(record["url"])
        time.sleep(0.05)
    raise AssertionError(f"the gateway did not start:\n{(store / 'gateway.log').read_text()}")


def end_engines(fakes: FakeCommand) -> None:
    """Kill what engines are left that behave as this folder says."""
    for process in psutil.process_iter(["cmdline"]):
        if "tests.serving.fake_engine" in (process.info["cmdline"] or []):
            with suppress(psutil.Error):
                if str(fakes.folder) in process.environ().values():
                    process.kill()


def main(store: str, fakes: str, port: str) -> None:
    """Serve until SIGTERM."""
    spec = GatewaySpec(
        port=int(port), execution=ExecutionSpec(store=store), log=LogSpec(to="none", mask=False),
        review=SpoolSpec(mask=False), shutdown_seconds=5.0,
    )  # fmt: skip
    run_gateway(spec, FakeCommand(Path(fakes)), mask=None, pace=PACE)


if __name__ == "__main__":
    main(*sys.argv[1:])
