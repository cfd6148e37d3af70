"""Starts the preference-tuning process, listens to it, and turns every way it can end into a result or an error.

Pairs are few, so a killed process starts anew: there are no checkpoints, and each attempt has a folder of its own. It
uses one device.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tasks.contracts.errors import GoldgateError, TrainingError
from tasks.contracts.progress import Progress, ProgressListener
from tasks.training.job import CANNOT_WRITE, RESULT
from tasks.training.launch import refusal_in, said_if_unusable, wait_for
from tasks.training.launcher import worker_environment
from tasks.training.prefer import PreferJob, PreferOutcome

_GRACE_SECONDS = 10.0  # for the process to close its MLflow run after an interrupt
_TAIL_LINES = 12


def run_preference(job: PreferJob, listener: ProgressListener) -> PreferOutcome:
    """Tune in a process of its own, which ends when this one does.

    Raises:
        TrainingError: it ended without a result.
        StoreError: the scratch folder cannot be written.
        GoldgateError: whatever it refused, as it said it.
    """
    spec = job.scratch / "spec.json"
    with said_if_unusable(job.scratch):
        spec.write_text(job.model_dump_json(indent=2), encoding="utf-8")
    log = job.scratch / "worker.log"
    tether = [sys.executable, "-m", "tasks.training.tether", str(os.getpid())]
    with log.open("ab") as out:
        process = subprocess.Popen(
            [*tether, "-m", "tasks.training.prefer_worker", str(spec)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=_environment(),
            process_group=0,  # Ctrl-C in a terminal reaches this process alone, which then ends the tuning in order
        )
    listener(Progress(0, 1, "steps", "loading the model"))
    try:
        code = wait_for(process, job.scratch, listener)
    except BaseException:
        _end(process)
        raise
    result = job.scratch / RESULT
    if code == 0 and result.exists():
        return PreferOutcome.model_validate_json(result.read_text(encoding="utf-8"))
    raise reason_of(code, job.scratch, log)


def reason_of(code: int, scratch: Path, log: Path) -> GoldgateError:
    """Why a process ended without a result: what it refused, or what its exit code and log say."""
    refused = refusal_in(scratch)
    if refused is not None:
        return refused
    from tasks.training.failures import PREFERENCE_TUNING, no_room

    if code == CANNOT_WRITE:
        return no_room(scratch, f"the end of {log.name} has more", PREFERENCE_TUNING)
    if code == -signal.SIGKILL:
        return TrainingError(
            "The preference tuning was killed (SIGKILL), most likely because the machine ran out of memory.",
            where=str(log),
            fix=PREFERENCE_TUNING.memory_fix,
        )
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
    tail = "\n".join(f"    {line}" for line in lines)
    return TrainingError(
        f"The preference tuning ended with exit code {code} and no result. Its last words:\n{tail}",
        where=str(log),
        fix="read the log; the next run starts this stage anew",
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _environment() -> dict[str, str]:
    # One device: with several visible, transformers would spread each batch over copies of the model.
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return worker_environment({**os.environ, "CUDA_VISIBLE_DEVICES": device})
