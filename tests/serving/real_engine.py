"""A real vLLM that serves one model, under the host that a gateway has."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tasks.contracts.serving import EngineSpec, EngineState, VersionRef
from tasks.contracts.spec import ExecutionSpec
from tasks.serving.host import EngineHost, Pace
from tasks.serving.vllm import VllmCommand


@contextmanager
def real_engine(
    folder: Path, version: VersionRef, model: Path, arguments: tuple[str, ...] = ()
) -> Iterator[EngineHost]:
    """A host whose only engine is ready; its processes are killed when the block ends.

    Args:
        folder: a new folder for the host.
        version: what is served.
        model: its files.
        arguments: further ones for vLLM.
    """
    folder.mkdir()
    host = EngineHost(folder, ExecutionSpec(), VllmCommand(), prepare=lambda *_: model, pace=Pace(back_off=()))
    try:
        host.start(version, EngineSpec(eager=True, start_seconds=300.0, arguments=arguments))
        until = time.monotonic() + 300
        while (status := host.status(version.engine)) is not None and status.state is EngineState.STARTING:
            assert time.monotonic() < until
            time.sleep(0.2)
        assert status is not None
        assert status.state is EngineState.READY, status.why
        yield host
    finally:
        host.close()
        for process in psutil.process_iter(["cmdline"]):
            if str(model) in (process.info["cmdline"] or []):
                with suppress(ProcessLookupError):  # it has just ended
                    os.killpg(process.pid, signal.SIGKILL)
