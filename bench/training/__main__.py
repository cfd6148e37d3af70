"""Run it all: `make bench-training`, or `python -m bench.training [compare] [options] [--quick] [--seeds 17 18 19]`."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.training.cases import ROOT, TASKS

PARTS = ("compare", "options")
SEEDS = {"compare": (17, 18, 19), "options": (17, 18)}
_QUICK_ROWS = 24  # six steps
_LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes")


def main() -> None:
    """Measure, write results.json, fill in README.md. `bench.training.gpu` measures what needs a GPU."""
    from bench.training.tables import all_tables, fill_readme, read_results, write_results

    parser = argparse.ArgumentParser(prog="python -m bench.training", description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all if none is named")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=TASKS)
    parser.add_argument("--seeds", nargs="*", type=int, help="a run each; more than one says what is noise")
    parser.add_argument("--quick", action="store_true", help="six steps with one seed, printed and not kept")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench-training", help="folder for rows and runs")
    asked = parser.parse_args()
    parts = asked.parts or list(PARTS)
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    asked.work.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {} if asked.quick else read_results()
    for part in parts:
        start = time.perf_counter()
        seeds = asked.seeds or (SEEDS[part][:1] if asked.quick else SEEDS[part])
        rows = measure(part, asked.tasks, seeds, asked.work, _QUICK_ROWS if asked.quick else None)
        kept = [row for row in results.get(part, []) if row["task"] not in asked.tasks]
        results[part] = sorted(kept + rows, key=lambda row: TASKS.index(row["task"]))
        seconds = results.get("seconds", {}) | {part: round(time.perf_counter() - start)}
        results |= {"machine": machine(), "seconds": seconds}
        print(f"{part}: {seconds[part]} s", file=sys.stderr)
        if not asked.quick:
            write_results(results)
    if not asked.quick:
        fill_readme(results)
        return
    for name, body in all_tables(results).items():
        if name in parts:
            print(f"\n## {name}\n\n{body}")


def measure(
    part: str, tasks: Sequence[str], seeds: Sequence[int], work: Path, rows: int | None
) -> list[dict[str, Any]]:
    """One part of the results, task after task."""
    from bench.training.cases import example_case
    from bench.training.compare import compare, try_options

    call = compare if part == "compare" else try_options
    return [row for task in tasks for row in call(example_case(task, work, rows), seeds, work)]


def machine() -> dict[str, str]:
    """What it ran on, as far as a reader needs to know."""
    from bench.gate.__main__ import machine as processor_and_python

    about = processor_and_python()
    libraries = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    return {
        "processor": about["processor"],
        "cores": f"{len(os.sched_getaffinity(0))}",
        "Python": about["python"],
    } | libraries


if __name__ == "__main__":
    main()
