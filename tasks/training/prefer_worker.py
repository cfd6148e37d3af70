"""The preference-tuning process: `python -m tasks.training.prefer_worker SPEC.json`.

Reads a `PreferJob`, tunes, merges, and leaves `result.json` (or `error.json`) in the job's scratch folder. Killed, the
same command starts anew.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from pathlib import Path

from tasks.contracts.errors import GoldgateError
from tasks.training.job import CANNOT_WRITE, ERROR, RESULT, write_whole
from tasks.training.prefer import PreferJob
from tasks.training.tether import TETHERED, die_with_parent

log = logging.getLogger("goldgate.training")


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main(spec: Path) -> int:
    """Run the job of a spec file.

    Returns:
        0 when `result.json` is written, 130 when it was interrupted; else 1 with the reason in `error.json`, or 74 when
        not even that could be written.
    """
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
        write_whole(job.scratch / RESULT, result.model_dump_json(indent=2))
    except KeyboardInterrupt:
        log.info("interrupted; the next run starts this stage anew")
        return 130
    except Exception as error:
        from tasks.training.failures import PREFERENCE_TUNING, explain

        failure = explain(error, job.scratch, PREFERENCE_TUNING)
        if failure is None:
            raise
        log.error("%s", failure.refusal, exc_info=error)
        return _refuse(job, failure.refusal)
    return 0


def _refuse(job: PreferJob, refusal: GoldgateError) -> int:
    record = {"type": type(refusal).__name__, "what": refusal.what, "where": refusal.where, "fix": refusal.fix}
    try:
        write_whole(job.scratch / ERROR, json.dumps(record))
    except OSError as error:
        log.error("the reason could not be written to %s: %s", job.scratch, error)
        return CANNOT_WRITE
    return 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
