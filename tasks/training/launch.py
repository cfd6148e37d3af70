"""Starts the training process, listens to it, and turns every way it can end into a result or a clear error."""

from __future__ import annotations

import fcntl
import importlib
import json
import logging
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tasks.contracts.errors import GoldgateError, StoreError, TrainingError
from tasks.contracts.progress import Progress, ProgressListener
from tasks.training import launcher
from tasks.training.job import (
    CANNOT_WRITE,
    ERROR,
    OUT_OF_MEMORY_FIX,
    PROGRESS,
    RESULT,
    TrainJob,
    TrainResult,
    read_progress,
)

log = logging.getLogger("goldgate.training")

LOG = "worker.log"
_PREVIOUS_LOG = "worker.previous.log"
_POLL_SECONDS = 0.3
GRACE_SECONDS = 60.0  # for a step, a checkpoint and the end of the MLflow run, after an interrupt
_TAIL_LINES = 12
_KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)  # as subprocess, and as a shell or launcher reports it
_TERMINATED = (-signal.SIGTERM, 128 + signal.SIGTERM)
_SMALLER = "It ran out of memory; training again with half the batch and twice the accumulation"


class _Training:
    """A training process, and whether it was told to end: told twice, it would keep no checkpoint."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.told = False

    def tell_to_end(self) -> None:
        if not self.told:
            self.told = True
            self.process.terminate()


# Those of this process, as they are its children. Whoever hears a signal for it has nowhere else to look them up.
_at_work: set[_Training] = set()


def end_trainings() -> int:
    """Tell every training of this process to end, whichever thread waits for it; how many there are.

    Each keeps a checkpoint first, for which it has `GRACE_SECONDS`. Safe to call in a signal handler.
    """
    trainings = list(_at_work)
    for training in trainings:
        training.tell_to_end()
    return len(trainings)


def trainings_at_work() -> int:
    """How many training processes of this process have not ended."""
    return len(_at_work)


def run_training(job: TrainJob, listener: ProgressListener) -> TrainResult:
    """Train in a process of its own, or several, one for each CUDA device.

    Out of memory, it is tried once more with half the batch and twice the accumulation, which is the same training.

    Raises:
        TrainingError: another process trains in the same scratch folder, or training ended without a result.
        StoreError: the scratch folder cannot be written.
        GoldgateError: whatever the training process refused, as it said it.
    """
    with said_if_unusable(job.scratch):
        job.scratch.mkdir(parents=True, exist_ok=True)
    with _locked(job.scratch) as lock:
        try:
            return _train_once(job, lock, listener)
        except GoldgateError as refusal:
            smaller = _with_half_the_batch(job)
            if smaller is None:
                raise
            log.warning("%s (%s)", _SMALLER, refusal.what)
        listener(Progress(0, 1, "steps", _SMALLER))
        return _train_once(smaller, lock, listener)


def _train_once(job: TrainJob, lock: int, listener: ProgressListener) -> TrainResult:
    worker_log = job.scratch / LOG
    with said_if_unusable(job.scratch):
        for name in (RESULT, ERROR, PROGRESS):
            (job.scratch / name).unlink(missing_ok=True)
        (job.scratch / launcher.SPEC).write_text(job.model_dump_json(indent=2), encoding="utf-8")
        with suppress(FileNotFoundError):
            worker_log.replace(job.scratch / _PREVIOUS_LOG)  # what is said of an end is read in the log of that end
    with worker_log.open("wb") as out:
        process = subprocess.Popen(
            launcher.command(job, os.getpid(), os.environ),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=launcher.worker_environment(os.environ),
            pass_fds=[lock],  # the lock is held until the last process of this training is gone
            process_group=0,  # Ctrl-C in a terminal reaches this process alone, which then ends the training in order
        )
    training = _Training(process)
    try:
        _at_work.add(training)
        listener(Progress(0, 1, "steps", "loading the base model"))
        code = wait_for(process, job.scratch, listener)
    except BaseException:
        _end(training, job.scratch, listener)
        raise
    finally:
        _at_work.discard(training)
    if code == 0 and (job.scratch / RESULT).exists():
        return TrainResult.model_validate_json((job.scratch / RESULT).read_text(encoding="utf-8"))
    raise reason_of(code, job.scratch, worker_log)


def wait_for(process: subprocess.Popen[bytes], scratch: Path, listener: ProgressListener) -> int:
    """The exit code of a process, once it has ended; until then its progress, as it comes."""
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


def _end(training: _Training, scratch: Path, listener: ProgressListener) -> None:
    """Ask the training to end, which keeps a checkpoint first; a second interrupt, or a minute, ends it at once."""
    process = training.process
    if process.poll() is not None:
        return
    note = f"saving a checkpoint before it ends (at most {GRACE_SECONDS:.0f} s); interrupt again to end at once"
    try:  # a second interrupt may come at any moment of this
        training.tell_to_end()
        log.warning("stopping the training: %s", note)
        with suppress(Exception):  # whatever is wrong with the listener, the training has to be ended
            listener((read_progress(scratch) or Progress(0, 1, "steps", ""))._replace(note=note))
        process.wait(GRACE_SECONDS)
    except BaseException as error:
        process.kill()
        process.wait()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        log.warning("the training did not end in time and was killed; it goes on from its last checkpoint")


def _with_half_the_batch(job: TrainJob) -> TrainJob | None:
    """The job once more with less memory; None if memory was not what ended it, or there is nothing to halve."""
    record = _error_record(job.scratch)
    if record is None or not record.get("out_of_memory") or job.halve_batches or job.request.recipe.batch_size < 2:
        return None
    return job.model_copy(update={"halve_batches": 1})


def _error_record(scratch: Path) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads((scratch / ERROR).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return record


def refusal_in(scratch: Path) -> GoldgateError | None:
    """What a process refused, as it said it in its scratch folder; None where it said nothing."""
    record = _error_record(scratch)
    return None if record is None else _as_error(record)


def _as_error(record: dict[str, Any]) -> GoldgateError:
    kind: type[GoldgateError] = getattr(importlib.import_module("tasks.contracts.errors"), record["type"])
    return kind(record["what"], where=record["where"], fix=record["fix"])


def reason_of(code: int, scratch: Path, worker_log: Path) -> GoldgateError:
    """Why a training process ended without a result: what it refused, or what its exit code and log say."""
    lost = launcher.lost_process(worker_log)
    if lost is not None:  # whatever the others say, it is what became of them after that
        return lost
    record = _error_record(scratch)
    if record is not None:
        failed = launcher.failed_process(worker_log) if record.get("interrupted") else None
        if failed is not None:  # one of several processes failed, and the first was told to stop
            return failed
        return _as_error(record)
    if code in _KILLED:
        return TrainingError(
            "The training process was killed (SIGKILL), most likely because the machine ran out of memory.",
            where=str(worker_log),
            fix=OUT_OF_MEMORY_FIX,
        )
    if code in _TERMINATED:
        return TrainingError(
            "Training was told to stop (SIGTERM) before it took a step.",
            where=str(scratch),
            fix="run it again; it goes on from the last checkpoint",
        )
    if code == CANNOT_WRITE:
        from tasks.training.failures import no_room

        return no_room(scratch, f"the end of {worker_log.name} has more")
    failed = launcher.failed_process(worker_log)
    if failed is not None:
        return failed
    tail = "\n".join(
        f"    {line}" for line in worker_log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
    )
    return TrainingError(
        f"The training process ended with exit code {code} and no result. Its last words:\n{tail}",
        where=str(worker_log),
        fix="read the log; the next run goes on from the last checkpoint",
    )


@contextmanager
def said_if_unusable(scratch: Path) -> Iterator[None]:
    """Turn what a full or forbidden disk raises into a refusal.

    Raises:
        StoreError: the folder cannot be used.
    """
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"The folder of the training cannot be used: {error.strerror or error}",
            where=str(error.filename or scratch),
            fix="free space or allow writing there; the next run goes on from the last checkpoint",
        ) from error


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
