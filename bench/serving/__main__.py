"""Run it all: `make bench-serving`, or a part: `python -m bench.serving [overhead] [swap] [harness] … [--quick]`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from bench.serving.world import ROOT

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
PARTS = ("overhead", "swap", "harness", "starts", "soak")
_SOAK_SECONDS = {"short": 600.0, "hour": 3600.0}


def main() -> None:
    """Measure, write results.json, fill in README.md."""
    from bench.gate.__main__ import written
    from bench.gate.tables import fill
    from bench.serving.tables import all_tables
    from bench.serving.world import running
    from bench.training.__main__ import machine

    parser = argparse.ArgumentParser(prog="python -m bench.serving", description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all if none is named")
    parser.add_argument("--turns", type=int, default=3, help="of overhead and harness, each way once in a turn")
    parser.add_argument("--soak", choices=_SOAK_SECONDS, default="short", help="ten minutes, or an hour")
    parser.add_argument("--quick", action="store_true", help="a few requests of each, printed and not kept")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench-serving", help="folder for the store")
    asked = parser.parse_args()
    parts = asked.parts or list(PARTS)
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    results: dict[str, Any] = {}
    if RESULTS.exists() and not asked.quick:
        results = json.loads(RESULTS.read_text(encoding="utf-8"))
    with running(asked.work.absolute()) as world:
        for part in parts:
            began = time.perf_counter()
            results[part] = measure(part, world, asked)
            seconds = results.get("seconds", {}) | {part: round(time.perf_counter() - began)}
            results |= {"seconds": seconds, "machine": machine() | {"vLLM": vllm_version()}}
            print(f"{part}: {seconds[part]} s", file=sys.stderr)
            if not asked.quick:
                RESULTS.write_text(written(results), encoding="utf-8")
    tables = all_tables(results)
    if not asked.quick:
        fill(HERE / "README.md", tables)
        return
    for part in parts:
        print(f"\n## {part}\n\n{tables[part]}")


def measure(part: str, world: Any, asked: argparse.Namespace) -> Any:
    """One part of the results."""
    from bench.serving import measure as measures

    work = asked.work.absolute()
    match part:
        case "overhead":
            requests = {1: 10, 10: 20, 50: 50} if asked.quick else {1: 60, 10: 150, 50: 300}
            return measures.overhead(world, work, 1 if asked.quick else asked.turns, requests)
        case "swap":
            return measures.swap(world, work, 50)
        case "harness":
            from bench.serving.harness import harness

            turns, items = (1, 16) if asked.quick else (asked.turns, 300)
            return harness(world, work, turns, items, 16)
        case "starts":
            return measures.starts(world, work)
        case _:
            return measures.soak(world, work, 10, 30.0 if asked.quick else _SOAK_SECONDS[asked.soak])


def vllm_version() -> str:
    """Of vLLM's own environment."""
    from tasks.vllm import vllm_environment, vllm_version

    return vllm_version(vllm_environment())


if __name__ == "__main__":
    main()
