"""Runs in the environment of the peers (see `peers.txt`), and knows nothing of Goldgate.

    python peers.py decide DATA.npz JOBS.json OUT.json WORKERS
    python peers.py time DATA.npz JOBS.json OUT.json
    python peers.py once DATA.npz JOBS.json OUT.json

DATA has `<name>.baseline` and `<name>.candidate`, [data sets, n], and maybe `<name>.groups`, [n]. A job names data,
tool and options; what comes out is, per job, whether each data set's candidate was let through, or how long it took.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

_ALMOST_ZERO = 1e-9  # evalsig divides by min_delta


def evalsig_gate(
    baseline: np.ndarray, candidate: np.ndarray, groups: np.ndarray | None, options: dict[str, Any]
) -> Callable[[], bool]:
    """Evalsig's release gate: one-sided at `alpha`. Groups are taken into account if `cluster` is asked for."""
    from evalsig import gate
    from evalsig.types import ItemResult, RunFrame

    def run(name: str, scores: np.ndarray) -> RunFrame:
        codes = [None] * len(scores) if groups is None else [f"g{code}" for code in groups]
        items = [
            ItemResult(f"i{number:05d}", float(score), code)
            for number, (score, code) in enumerate(zip(scores, codes, strict=True))
        ]
        return RunFrame(name, name, "task", "accuracy", items)

    before, after = run("baseline", baseline), run("candidate", candidate)
    settings = {"min_delta": _ALMOST_ZERO, "alpha": 0.05, "one_sided": True} | options
    return lambda: gate(before, after, **settings).verdict.value == "ALLOW"


def statgate_gate(
    baseline: np.ndarray, candidate: np.ndarray, groups: np.ndarray | None, options: dict[str, Any]
) -> Callable[[], bool]:
    """Statgate's compare: the lower end of a two-sided interval above minus `margin`.

    It has no groups. With `groups_as_cases` each group is handed over as one case that was run several times, which it
    averages.
    """
    from statgate import GateSettings, evaluate_gate
    from statgate.records import EvalRecord

    options = dict(options)
    as_cases = options.pop("groups_as_cases", False)
    runs: dict[int, int] = {}
    names = []
    for number in range(len(baseline)):
        if as_cases and groups is not None:
            code = int(groups[number])
            runs[code] = runs.get(code, -1) + 1
            names.append((f"g{code}", runs[code]))
        else:
            names.append((f"i{number:05d}", 0))

    def records(scores: np.ndarray) -> list[EvalRecord]:
        return [
            EvalRecord(case_id=case, run_index=turn, score=float(score))
            for (case, turn), score in zip(names, scores, strict=True)
        ]

    before, after = records(baseline), records(candidate)
    settings = GateSettings(**({"alpha": 0.1, "margin": 0.0, "seed": 0} | options))
    return lambda: evaluate_gate(before, after, settings).verdict.value == "SHIP"


_TOOLS = {"evalsig": evalsig_gate, "statgate": statgate_gate}


def _data(arrays: dict[str, np.ndarray], job: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    name = job["data"]
    return arrays[f"{name}.baseline"], arrays[f"{name}.candidate"], arrays.get(f"{name}.groups")


def _decide(task: tuple[str, np.ndarray, np.ndarray, np.ndarray | None, dict[str, Any]]) -> list[bool]:
    tool, baselines, candidates, groups, options = task
    return [_TOOLS[tool](before, after, groups, options)() for before, after in zip(baselines, candidates, strict=True)]


def decide(arrays: dict[str, np.ndarray], jobs: list[dict[str, Any]], workers: int) -> list[list[bool]]:
    """Whether each candidate is let through, per job."""
    tasks, owners = [], []
    for number, job in enumerate(jobs):
        baselines, candidates, groups = _data(arrays, job)
        for start in range(0, len(baselines), 50):
            end = start + 50
            tasks.append((job["tool"], baselines[start:end], candidates[start:end], groups, job["options"]))
            owners.append(number)
    answers: list[list[bool]] = [[] for _ in jobs]
    with multiprocessing.Pool(workers) as pool:
        for owner, part in zip(owners, pool.imap(_decide, tasks), strict=True):
            answers[owner] += part
    return answers


def times(arrays: dict[str, np.ndarray], jobs: list[dict[str, Any]]) -> list[list[float]]:
    """Seconds of each decision, per job; what is handed over is made beforehand, and the first decision not counted."""
    found = []
    for job in jobs:
        baselines, candidates, groups = _data(arrays, job)
        seconds = []
        for before, after in zip(baselines, candidates, strict=True):
            gate = _TOOLS[job["tool"]](before, after, groups, job["options"])
            start = time.perf_counter()
            gate()
            seconds.append(time.perf_counter() - start)
        found.append(seconds[1:])
    return found


def once(arrays: dict[str, np.ndarray], jobs: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of all jobs' first data sets one after another, and the process's largest memory."""
    start = time.perf_counter()
    for job in jobs:
        baselines, candidates, groups = _data(arrays, job)
        _TOOLS[job["tool"]](baselines[0], candidates[0], groups, job["options"])
    made = time.perf_counter()  # imports are done as well now
    gates = []
    for job in jobs:
        baselines, candidates, groups = _data(arrays, job)
        gates.append(_TOOLS[job["tool"]](baselines[0], candidates[0], groups, job["options"]))
    ready, busy = time.perf_counter(), time.process_time()
    for gate in gates:
        gate()
    done, busy = time.perf_counter(), time.process_time() - busy
    peak = peak_mb()
    return {"imports": (made - start) - (ready - made), "decide": done - ready, "processor": busy, "peak_mb": peak}


def peak_mb() -> float:
    """Largest memory of this process. (`ru_maxrss` would count that of the process which started it as well.)"""
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM"))


def main() -> None:
    """Read, do, write."""
    what, data, wanted, out, *rest = sys.argv[1:]
    with np.load(data) as stored:
        arrays = dict(stored)
    with open(wanted, encoding="utf-8") as file:
        jobs = json.load(file)
    if what == "decide":
        answer: Any = decide(arrays, jobs, int(rest[0]))
    else:
        answer = times(arrays, jobs) if what == "time" else once(arrays, jobs)
    with open(out, "w", encoding="utf-8") as file:
        json.dump(answer, file)


if __name__ == "__main__":
    main()
