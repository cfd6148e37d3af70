"""Starts the training process, listens to it, and turns every way it can end into a result or a clear error."""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tasks.contracts.errors import GoldgateError, TrainingError
from tasks.contracts.progress import Progress, ProgressListener
from tasks.training.job import ERROR, OUT_OF_MEMORY_FIX, PROGRESS, RESULT, TrainJob, TrainResult, read_progress
from tasks.training.tether import TETHERED

_POLL_SECONDS = 0.3
_GRACE_SECONDS = 10.0  # for the process to close its MLflow run after an interrupt
_TAIL_LINES = 12
_KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)  # as subprocess, and as a shell or launcher reports it


def run_training(job: TrainJob, listener: ProgressListener) -> TrainResult:
    """Train in a process of its own, or several, one for each CUDA device.

    Raises:
        TrainingError: another process trains in the same scratch folder, or training ended without a result.
        GoldgateError: whatever the training process refused, as it said it.
    """
    job.scratch.mkdir(parents=True, exist_ok=True)
    with _locked(job.scratch) as lock:
        for name in (RESULT, ERROR, PROGRESS):
            (job.scratch / name).unlink(missing_ok=True)
        spec = job.scratch / "spec.json"
        spec.write_text(job.model_dump_json(indent=2), encoding="utf-8")
        log = job.scratch / "worker.log"
        with log.open("ab") as out:
            process = subprocess.Popen(
                [*_launcher(), "-m", "tasks.training.worker", str(spec)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=_environment(),
                pass_fds=[lock],  # the lock is held until the last process of this training is gone
            )
        listener(Progress(0, 1, "steps", "loading the base model"))
        try:
            code = _wait(process, job.scratch, listener)
        except BaseException:
            _end(process)
            raise
        if code == 0 and (job.scratch / RESULT).exists():
            return TrainResult.model_validate_json((job.scratch / RESULT).read_text(encoding="utf-8"))
        raise reason_of(code, job.scratch, log)


def _wait(process: subprocess.Popen[bytes], scratch: Path, listener: ProgressListener) -> int:
    heard = None
    while True:
        code = process.poll()
        progress = read_progress(scratch)
        if progress is not None and progress != heard:
            listener(progress)
            heard = progress
        if code is not None:
            return code
        time.sleep(_POLL_SECONDS)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _launcher() -> list[str]:
    devices = _cuda_devices()
    python = [sys.executable, "-m", "tasks.training.tether", str(os.getpid())]
    if devices < 2:
        return python
    return [
        *python, "-m", "accelerate.commands.launch",
        "--num_processes", str(devices), "--num_machines", "1", "--mixed_precision", "bf16", "--dynamo_backend", "no",
    ]  # fmt: skip


def _cuda_devices() -> int:
    """How many CUDA devices training may use, found without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    driver = Path("/proc/driver/nvidia/gpus")
    return len(list(driver.iterdir())) if driver.is_dir() else 0


def _environment() -> dict[str, str]:
    return {
        **os.environ,
        TETHERED: "1",
        "HF_HUB_OFFLINE": "1",  # everything is in the job's folders; nothing may be fetched behind its back
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }


def reason_of(code: int, scratch: Path, log: Path) -> GoldgateError:
    """Why a training process ended without a result: what it refused, or what its exit code and log say."""
    error = scratch / ERROR
    if error.exists():
        record = json.loads(error.read_text(encoding="utf-8"))
        kind: type[GoldgateError] = getattr(importlib.import_module("tasks.contracts.errors"), record["type"])
        return kind(record["what"], where=record["where"], fix=record["fix"])
    if code in _KILLED:
        return TrainingError(
            "The training process was killed (SIGKILL), most likely because the machine ran out of memory.",
            where=str(log),
            fix=OUT_OF_MEMORY_FIX,
        )
    tail = "\n".join(
        f"    {line}" for line in log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
    )
    return TrainingError(
        f"The training process ended with exit code {code} and no result. Its last words:\n{tail}",
        where=str(log),
        fix="read the log; the next run goes on from the last checkpoint",
    )


@contextmanager
def _locked(scratch: Path) -> Iterator[int]:
    """Hold the scratch folder alone. The kernel lets go when the last holder dies, so no lock is ever stale."""
    lock = os.open(scratch / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(lock, 32, 0).decode().strip() or "unknown"
            raise TrainingError(
                f"Another process (pid {holder}) is running this very training.",
                where=str(scratch),
                fix="wait until it is done, and its result is reused; or stop it, and this one goes on where it was",
            ) from None
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        yield lock
    finally:
        os.close(lock)
