"""Runs in the environment of the peers (see `peers.txt`), and knows nothing of Goldgate.

    python peers.py datatrove PARTS WORK OUT.json '{"n_grams": 3, "num_buckets": 14, "hashes_per_bucket": 8}'
    python peers.py semhash PARTS MODEL OUT.json '{"threshold": 0.9}'

PARTS is a folder of two JSON Lines files of {id, text}. OUT.json holds the ids that were taken out as duplicates, and
the seconds without imports and reading.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORKERS = 2


def datatrove_duplicates(parts: Path, work: Path, options: dict[str, Any]) -> dict[str, Any]:
    """The MinHash pipeline of datatrove: signatures, buckets, clusters, filter; two processes, step after step."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import (
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter
    from loguru import logger

    logger.remove()
    shutil.rmtree(work, ignore_errors=True)
    config = MinhashConfig(**options)

    def folder(name: str) -> str:
        return str(work / name)

    def read() -> Any:
        return JsonlReader(str(parts), text_key="text", id_key="id", glob_pattern="*.jsonl")

    def step(name: str, pipeline: list[Any], tasks: int) -> None:
        LocalPipelineExecutor(
            pipeline=pipeline, tasks=tasks, workers=min(WORKERS, tasks), logging_dir=folder(f"logs-{name}")
        ).run()

    start = time.perf_counter()
    step("signatures", [read(), MinhashDedupSignature(folder("signatures"), config=config)], WORKERS)
    step("buckets", [MinhashDedupBuckets(folder("signatures"), folder("buckets"), config=config)], config.num_buckets)
    step("clusters", [MinhashDedupCluster(folder("buckets"), folder("removed"), config=config)], 1)
    out = JsonlWriter(folder("out"), compression=None)
    kept = JsonlWriter(folder("kept"), compression=None)
    step("filter", [read(), MinhashDedupFilter(folder("removed"), exclusion_writer=out), kept], WORKERS)
    seconds = time.perf_counter() - start
    ids = []
    for path in sorted(Path(folder("out")).rglob("*.jsonl")):
        with path.open(encoding="utf-8") as lines:
            ids += [json.loads(line)["id"] for line in lines]
    shutil.rmtree(work)
    return {"removed": ids, "seconds": seconds}


def semhash_duplicates(parts: Path, model: Path, options: dict[str, Any]) -> dict[str, Any]:
    """What `self_deduplicate` of semhash takes out, with its default index."""
    from model2vec import StaticModel
    from semhash import SemHash

    records = []
    for path in sorted(parts.glob("*.jsonl")):
        with path.open(encoding="utf-8") as lines:
            records += [json.loads(line) for line in lines]
    encoder = StaticModel.from_pretrained(model)
    start = time.perf_counter()
    found = SemHash.from_records(records, columns=["text"], model=encoder).self_deduplicate(**options)
    seconds = time.perf_counter() - start
    return {"removed": [one.record["id"] for one in found.filtered], "seconds": seconds}


_TOOLS: dict[str, Callable[[Path, Path, dict[str, Any]], dict[str, Any]]] = {
    "datatrove": datatrove_duplicates,
    "semhash": semhash_duplicates,
}


if __name__ == "__main__":
    tool, parts, beside, out, options = sys.argv[1:]
    found = _TOOLS[tool](Path(parts), Path(beside), json.loads(options))
    Path(out).write_text(json.dumps(found), encoding="utf-8")
