"""The preference-tuning process: `python -m tasks.training.prefer_worker SPEC.json`.

Reads a `PreferJob`, tunes, merges, and leaves `result.json` (or `error.json`) in the job's scratch folder. Killed, the
same command starts anew.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import sys
from pathlib import Path

from tasks.contracts.errors import GoldgateError, StoreError, TrainingError
from tasks.training.job import ERROR, RESULT, write_whole
from tasks.training.prefer import PreferJob
from tasks.training.prefer_launch import OUT_OF_MEMORY_FIX
from tasks.training.tether import TETHERED, die_with_parent

log = logging.getLogger("goldgate.training")


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main(spec: Path) -> int:
    """Run the job of a spec file; 0 when `result.json` is written, else 1 with the reason in `error.json`."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if os.environ.get(TETHERED):
        die_with_parent(None)
    signal.signal(signal.SIGTERM, _interrupt)  # so that MLflow's run is closed as killed
    job = PreferJob.model_validate_json(spec.read_text(encoding="utf-8"))
    try:
        import torch  # takes seconds: interrupts are heard before

        from tasks.training.prefer_fit import tune

        torch.set_flush_denormal(True)  # as in the first training
        result = tune(job)
    except KeyboardInterrupt:
        log.info("interrupted; the next run starts this stage anew")
        return 130
    except Exception as error:
        refusal = _as_refusal(error)
        if refusal is None:
            raise
        log.error("%s", refusal, exc_info=error)
        record = {"type": type(refusal).__name__, "what": refusal.what, "where": refusal.where, "fix": refusal.fix}
        write_whole(job.scratch / ERROR, json.dumps(record))
        return 1
    write_whole(job.scratch / RESULT, result.model_dump_json(indent=2))
    return 0


def _as_refusal(error: Exception) -> GoldgateError | None:
    """The error as a person should meet it; None for one that nobody foresaw."""
    import torch

    if isinstance(error, GoldgateError):
        return error
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        return TrainingError(
            f"Preference tuning ran out of memory: {str(error).splitlines()[0]}",
            where="preference.batch_size",
            fix=OUT_OF_MEMORY_FIX,
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        return StoreError(
            f"Preference tuning cannot write: {error.strerror}",
            where=str(error.filename),
            fix="free space or allow writing there; the stage starts anew",
        )
    return None


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
