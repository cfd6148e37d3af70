"""Seconds and memory of one decision on 10,000 paired items, 8 classes, twenty slices, each in a fresh process."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np

from bench.gate.environment import HERE, ask_peers

ITEMS, SLICES, SEED = 10_000, 20, 20_264
SHARES = (0.3, 0.2, 0.15, 0.12, 0.1, 0.07, 0.04, 0.02)
TIMES = 3
# What is asked: the level of the look, and whether a guard on every slice is asked for besides.
CASES = {
    "one look at 5 %": (0.05, False),
    "first look of the default policy, 2.5 %": (0.025, False),
    "tenth look, 0.045 %": (0.05 / 110, False),
    "first look, and a margin of 5 points on every slice": (0.025, True),
}
Row = dict[str, Any]


def made_up() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Target, both sides' answers, and slice of each item; the candidate is a little better."""
    rng = np.random.default_rng(SEED)
    targets = rng.choice(8, size=ITEMS, p=SHARES)
    baseline = np.where(rng.random(ITEMS) < 0.75, targets, rng.integers(0, 8, ITEMS))
    again = np.where(rng.random(ITEMS) < 0.8, targets, rng.integers(0, 8, ITEMS))
    candidate = np.where(rng.random(ITEMS) < 0.7, baseline, again)
    slices = np.sort(rng.integers(0, SLICES, ITEMS) + rng.integers(0, 2, ITEMS)) % SLICES  # of uneven size
    return targets, baseline, candidate, slices


def decide_once(case: str) -> Row:
    """In this process: import, make the outcomes, decide, and say what that took."""
    start = time.perf_counter()
    from tasks.contracts.references import ItemOutcome
    from tasks.contracts.spec import EVERY_SLICE, MACRO_F1, MetricGuard, Policy
    from tasks.gate.decide import Comparison, decide

    imported = time.perf_counter()
    targets, *answers, slices = made_up()
    labels = [f"class {number}" for number in range(8)]

    def side(codes: np.ndarray) -> list[ItemOutcome]:
        return [
            ItemOutcome(
                id=f"i{number:05d}", text=f"text {number}", target=labels[target], prediction=labels[code],
                scores={"exact_match": float(target == code), "valid_output": 1.0}, latency_ms=10.0,
                prompt_tokens=20, output_tokens=1, slice=f"slice {part:02d}",
            )
            for number, (target, code, part) in enumerate(zip(targets, codes, slices, strict=True))
        ]  # fmt: skip

    before, after = (side(codes) for codes in answers)
    level, guarded = CASES[case]
    guards = (MetricGuard(metric=MACRO_F1, slice=EVERY_SLICE, margin=0.05),) if guarded else ()
    policy = Policy(metric=MACRO_F1, guards=guards)
    ready, busy = time.perf_counter(), time.process_time()
    decision = decide(Comparison(before, after, labels), policy, level=level)
    done, busy = time.perf_counter(), time.process_time() - busy
    assert len(decision.metrics) >= SLICES
    peak = peak_mb()
    return {"imports": imported - start, "decide": done - ready, "processor": busy, "peak_mb": peak}


def peak_mb() -> float:
    """Largest memory of this process. (`ru_maxrss` would count that of the process which started it as well.)"""
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM"))


def speed() -> list[Row]:
    """Every case several times, and the peers on the nearest thing that they can do: accuracy, whole and by slice."""
    rows = []
    for case in CASES:
        command = [sys.executable, "-m", "bench.gate.speed", case]
        found = [
            json.loads(subprocess.run(command, check=True, capture_output=True, cwd=HERE.parents[1]).stdout)
            for _ in range(TIMES)
        ]
        rows.append({"gate": "Goldgate", "what": f"macro-F1, {case}"} | _middle(found))
    targets, baseline, candidate, slices = made_up()
    right = [(codes == targets).astype(float) for codes in (baseline, candidate)]
    arrays = {"all.baseline": right[0][None], "all.candidate": right[1][None]}
    for part in range(SLICES):
        arrays |= {f"{part}.baseline": right[0][None, slices == part]}
        arrays |= {f"{part}.candidate": right[1][None, slices == part]}
    names = ["all", *map(str, range(SLICES))]
    for tool in ("evalsig", "statgate"):
        jobs: list[Row] = [{"data": name, "tool": tool, "options": {}} for name in names]
        found = [ask_peers("once", arrays, jobs) for _ in range(TIMES)]
        rows.append({"gate": tool, "what": "accuracy, 1 + 20 calls"} | _middle(found))
    return rows


def _middle(found: list[Row]) -> Row:
    return {key: statistics.median(one[key] for one in found) for key in found[0]}


if __name__ == "__main__":
    print(json.dumps(decide_once(sys.argv[1])))
