"""One stage of the data room on made rows, in a process of its own: `python -m bench.data.stages STAGE FOLDER [JSON]`.

Prints one line of JSON: the seconds of the call, without imports, and what it counted.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.data.make_rows import COUNTS, GOLDEN, ROWS, task

# `duplicates` is `curate` with nothing but duplicates and splits: what the peers do too.
STAGES = ("ingest", "validate", "curate", "duplicates")
_LEARNING_RATE = 2e-4


def prepare(stage: str, folder: Path, options: dict[str, Any]) -> Callable[[], Any]:
    """The call that is timed, with everything imported; `options` go into `CurateSpec`."""
    from tasks.contracts.references import GoldenSetRef
    from tasks.contracts.spec import CurateSpec, DataSpec, PoisonPolicy, SuspectPolicy
    from tasks.data.golden import MANIFEST

    data = DataSpec(source=str(folder / ROWS), source_field="source", time_field="time")
    out = folder / stage
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    match stage:
        case "ingest":
            from tasks.data.ingest import ingest

            return lambda: ingest(data, task().kind, out)
        case "validate":
            from tasks.data.validate import validate

            kept = folder / "kept"
            kept.mkdir(exist_ok=True)
            return lambda: validate(folder / "ingest", task(), data, out, lambda: kept)
    from tasks.data.curate import curate

    golden = None
    if stage == "curate":
        manifest = json.loads((folder / GOLDEN / MANIFEST).read_text(encoding="utf-8"))
        # By these policies every row that looks wrong stands in the quarantine; a report names the first of them alone.
        options = {"suspects": SuspectPolicy.REVIEW, "poisoning": PoisonPolicy.QUARANTINE} | options
        golden = GoldenSetRef(path=str(folder / GOLDEN), digest=manifest["digest"], items=manifest["items"])
    else:
        options = {"suspects": SuspectPolicy.OFF, "poisoning": PoisonPolicy.OFF} | options
    spec = CurateSpec(**options)
    return lambda: curate(folder / "validate", golden, task(), spec, _LEARNING_RATE, out)


def main() -> None:
    """Run the stage that the command line names."""
    stage, folder, *rest = sys.argv[1:]
    call = prepare(stage, Path(folder), json.loads(rest[0]) if rest else {})
    rows = json.loads((Path(folder) / COUNTS).read_text(encoding="utf-8"))["rows"]
    start = time.perf_counter()
    result = call()
    print(json.dumps({"rows": rows, "seconds": time.perf_counter() - start, "counted": result._asdict()}))


if __name__ == "__main__":
    main()
