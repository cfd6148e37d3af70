"""The training process: `python -m tasks.training.worker SPEC.json` (or behind `accelerate launch`).

Reads a `TrainJob`, trains, merges, and leaves `result.json` (or `error.json`) in the job's scratch folder. Killed at
any time, the same command goes on from the last whole checkpoint; told to end (SIGTERM), it keeps a checkpoint of the
step that it is at first.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from pathlib import Path

from tasks.contracts.errors import GoldgateError, TrainingError
from tasks.training.job import CANNOT_WRITE, ERROR, RESULT, Preempted, TrainJob, write_whole
from tasks.training.tether import TETHERED, die_with_parent

log = logging.getLogger("goldgate.training")

_INTERRUPTED = 128 + signal.SIGINT
_TERMINATED = 128 + signal.SIGTERM  # as a shell reports a process that SIGTERM ended


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main(spec: Path) -> int:
    """Run the job of a spec file.

    Returns:
        0 when `result.json` is written; 143 when it was told to end and kept a checkpoint first, 130 when it was
        interrupted otherwise; else 1. The reason of whatever ended it is in `error.json`; 74 when not even that could
        be written.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if os.environ.get(TETHERED):
        die_with_parent(None)
    signal.signal(signal.SIGTERM, _interrupt)  # so that MLflow's run is closed as killed
    job = TrainJob.model_validate_json(spec.read_text(encoding="utf-8"))
    try:
        import torch  # takes seconds: the parent is watched and interrupts are heard before

        from tasks.training.fit import train

        # Adam's second moments of tiny gradients are denormal numbers, and a CPU takes a tenth of a step for their
        # roots. It holds for the whole process, which is why it is set where the process begins.
        torch.set_flush_denormal(True)
        result = train(job)
        if result is not None:
            write_whole(job.scratch / RESULT, result.model_dump_json(indent=2))
    except KeyboardInterrupt as stop:
        return _stopped(job, stop)
    except Exception as error:
        from tasks.training.failures import explain

        failure = explain(error, job.scratch)
        if failure is None:
            raise
        log.error("%s", failure.refusal, exc_info=error)
        return _refuse(job, failure.refusal, 1, out_of_memory=failure.out_of_memory)
    return 0


def _stopped(job: TrainJob, stop: KeyboardInterrupt) -> int:
    code = _TERMINATED if isinstance(stop, Preempted) else _INTERRUPTED
    how = str(stop) if isinstance(stop, Preempted) else "interrupted between checkpoints"
    log.info("%s; the next start goes on from the last checkpoint", how)
    if (
        os.environ.get("RANK", "0") != "0" or (job.scratch / ERROR).exists()
    ):  # the first one speaks for all, if none has
        return code
    refusal = TrainingError(
        f"Training was {how}.", where=str(job.scratch), fix="run it again; it goes on from the last checkpoint"
    )
    return _refuse(job, refusal, code, interrupted=True)


def _refuse(
    job: TrainJob, refusal: GoldgateError, code: int, *, out_of_memory: bool = False, interrupted: bool = False
) -> int:
    """Leave word of the refusal; a checkpoint that was cut off makes room for it."""
    from tasks.training.checkpoints import drop_half_written

    record = {
        "type": type(refusal).__name__,
        "what": refusal.what,
        "where": refusal.where,
        "fix": refusal.fix,
        "out_of_memory": out_of_memory,
        "interrupted": interrupted,
    }
    try:
        drop_half_written(job.scratch)
        write_whole(job.scratch / ERROR, json.dumps(record))
    except OSError as error:
        log.error("the reason could not be written to %s: %s", job.scratch, error)
        return CANNOT_WRITE
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
