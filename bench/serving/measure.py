"""The measurements: what the gateway adds, what a swap does to requests, how long starts take, and a soak."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.serving.load import Job
from bench.serving.relay import relayed
from bench.serving.world import ENGINE, NAME, ROOT, World, questions, start
from tasks.contracts.serving import EngineState, Phase, VersionRef

CLIENTS = (1, 10, 50)
_BY = "bench"


# -- what the gateway adds --------------------------------------------------------------------------------------------


def overhead(world: World, work: Path, turns: int, requests: dict[int, int]) -> list[dict[str, Any]]:
    """The same load on vLLM alone, through a bare relay and through the gateway, in turns.

    A row for each number of clients and each way.
    """
    live = world.versions[0]
    serve(world, live, None)
    direct = world.direct(live)
    asked = questions(world.spec)
    found: dict[tuple[int, str], list[dict[str, float]]] = {}
    with relayed(direct.url) as relay:
        ways = {
            "vLLM alone": (direct.url, direct.key, live.label),
            "bare relay": (relay, direct.key, live.label),
            "gateway": (world.api, "", NAME),
        }
        for url, key, model in ways.values():  # all warm
            ask(Job(url, model, asked, 4, key=key, requests=16), work)
        for turn in range(turns):
            for clients in CLIENTS:
                order = list(ways) if turn % 2 == 0 else list(reversed(ways))  # whoever comes later has warmer caches
                for way in order:
                    url, key, model = ways[way]
                    job = Job(url, model, asked, clients, key=key, requests=requests[clients], system=system(world))
                    found.setdefault((clients, way), []).append(summary(ask(job, work)))
                    print(f"turn {turn}, {clients} clients, {way}: {found[clients, way][-1]}", file=sys.stderr)
    return [
        {
            "clients": clients,
            "way": way,
            "requests": requests[clients] * turns,
            **{key: statistics.median(one[key] for one in runs) for key in runs[0]},
            "failed": sum(one["failed"] for one in runs),
        }
        for (clients, way), runs in found.items()
    ]


def summary(load: dict[str, Any]) -> dict[str, float]:
    """Requests a second, and the latencies of those that were answered, in milliseconds."""
    good = sorted(one["seconds"] for one in load["asked"] if not one["error"])
    return {
        "per_second": len(good) / load["wall"],
        "p50_ms": 1000 * percentile(good, 0.50),
        "p99_ms": 1000 * percentile(good, 0.99),
        "failed": float(len(load["asked"]) - len(good)),
    }


# -- a swap and a rollback under load -------------------------------------------------------------------------------


def swap(world: World, work: Path, clients: int) -> dict[str, Any]:
    """Traffic moves from version 1 to 2, and back by a rollback, while `clients` ask without a pause.

    Seconds count from the decision (the call that moves traffic) to the end of the last request that the old version
    was chosen for after it: none is chosen later. The new version's start is counted apart, in `starts`.
    """
    first, second = world.versions
    serve(world, first, None)
    start(world.gateway, second)
    stop = work / "stop"
    stop.unlink(missing_ok=True)
    job = Job(world.api, NAME, questions(world.spec), clients, stop_file=str(stop), stream=True, system=system(world))
    moments: dict[str, tuple[float, float]] = {}
    with Asking(job, work) as asking:
        time.sleep(10)
        moments["swap"] = timed(lambda: move(world, second, first, "swap"))
        time.sleep(15)
        moments["rollback"] = timed(lambda: back(world))
        time.sleep(10)
        stop.touch()
        load = asking.result()
    began_at = load["started"]
    rows = {}
    for what, (decided, returned) in moments.items():
        old = first.label if what == "swap" else second.label
        late = [
            one
            for one in load["asked"]
            if one["version"] == old and began_at + one["began"] >= returned and began_at + one["began"] < returned + 12
        ]
        spanning = [
            began_at + one["began"] + one["seconds"]
            for one in load["asked"]
            if one["version"] == old and began_at + one["began"] < returned <= began_at + one["began"] + one["seconds"]
        ]
        rows[what] = {
            "call_seconds": returned - decided,
            "last_old_answer_seconds": (max(spanning) if spanning else returned) - decided,
            "old_version_chosen_afterwards": len(late),
        }
    return {
        "clients": clients,
        "requests": len(load["asked"]),
        "failed": sum(1 for one in load["asked"] if one["error"]),
        "mixed": sum(1 for one in load["asked"] if "," in one["body_version"] or one["version"] != one["body_version"]),
        "by_version": {
            version.label: sum(1 for one in load["asked"] if one["version"] == version.label)
            for version in world.versions
        },
        "errors": sorted({one["error"] for one in load["asked"] if one["error"]})[:5],
        **rows,
    }


# -- starts, soak ---------------------------------------------------------------------------------------------------


def starts(world: World, work: Path) -> list[dict[str, Any]]:
    """Seconds from the request to the first checked answer, compiled and eager; then a request to one that is warm."""
    first, second = world.versions
    serve(world, first, None)
    rows = []
    for name, spec in (("compiled", ENGINE), ("eager", ENGINE.model_copy(update={"eager": True}))):
        stop_engine(world, second)
        status, seconds = start(world.gateway, second, spec)
        rows.append({"start": name, "seconds": seconds, "engine_seconds": status.ready_seconds,
                     "memory_mb": status.memory_bytes / 1e6})  # fmt: skip
        print(rows[-1], file=sys.stderr)
    stop_engine(world, second)  # else the next part finds it running with other settings
    job = Job(world.api, NAME, questions(world.spec), 1, requests=20)
    rows.append({"start": "already warm", "seconds": summary(ask(job, work))["p50_ms"] / 1000})
    return rows


def soak(world: World, work: Path, clients: int, seconds: float) -> dict[str, Any]:
    """A load for a long time; memory of the gateway's process and of the engine every ten seconds."""
    live = world.versions[0]
    serve(world, live, None)
    memory: list[tuple[float, float, float]] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(10.0):
            status = world.gateway.engine(live.engine)
            engine = status.memory_bytes / 1e6 if status else float("nan")
            memory.append((time.time(), world.process.memory_info().rss / 1e6, engine))

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    job = Job(world.api, NAME, questions(world.spec), clients, seconds=seconds, system=system(world))
    load = ask(job, work, timeout=seconds + 300)
    over.set()
    watching.join()
    tenth = max(1, len(memory) // 10)
    settled = memory[tenth:]  # the first tenth fills caches
    half = len(settled) // 2
    return {
        "seconds": load["wall"],
        "clients": clients,
        **summary(load),
        "requests": len(load["asked"]),
        "gateway_mb": [statistics.median(part[1] for part in one) for one in (settled[:half], settled[half:])],
        "engine_mb": [statistics.median(part[2] for part in one) for one in (settled[:half], settled[half:])],
    }


# -- helpers --------------------------------------------------------------------------------------------------------


class Asking:
    """A load in a process of its own."""

    def __init__(self, job: Job, work: Path, timeout: float = 600.0) -> None:
        self._job, self._work, self._timeout = job, work, timeout

    def __enter__(self) -> Asking:
        (self._work / "job.json").write_text(json.dumps(asdict(self._job)), encoding="utf-8")
        (self._work / "load.json").unlink(missing_ok=True)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.serving.load", str(self._work / "job.json"), str(self._work / "load.json")],
            cwd=ROOT,
        )
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()

    def result(self) -> dict[str, Any]:
        """What came of it, once it has ended."""
        if self._process.wait(self._timeout) != 0:
            raise SystemExit("the load ended with an error")
        load: dict[str, Any] = json.loads((self._work / "load.json").read_text(encoding="utf-8"))
        return load


def ask(job: Job, work: Path, timeout: float = 600.0) -> dict[str, Any]:
    """Run a load to its end."""
    with Asking(job, work, timeout) as asking:
        return asking.result()


def serve(world: World, live: VersionRef, previous: VersionRef | None) -> None:
    """Have one version answer, whatever was before."""
    start(world.gateway, live)
    move(world, live, previous, "set up")


def move(world: World, live: VersionRef, previous: VersionRef | None, why: str) -> None:
    """Move traffic."""
    now = world.gateway.traffic(NAME)
    world.gateway.move_traffic(
        NAME, live=live, previous=previous, from_revision=now.revision if now else 0, by=_BY, why=why
    )


def back(world: World) -> None:
    """Roll back, as `goldgate rollback` does, but for the registry's aliases."""
    done = world.gateway.roll_back(NAME, by=_BY, why="the benchmark's rollback", holder=_BY)
    world.gateway.write(done.intent.model_copy(update={"phase": Phase.DONE}))


def stop_engine(world: World, version: VersionRef) -> None:
    """End an engine and wait until it is gone."""
    if world.gateway.engine(version.engine) is None:
        return
    world.gateway.end_engine(version.engine, 0.0)
    while (status := world.gateway.engine(version.engine)) is not None and status.state not in (
        EngineState.STOPPED,
        EngineState.FAILED,
    ):
        time.sleep(0.2)


def timed(call: Callable[[], None]) -> tuple[float, float]:
    """When a call began and when it returned, seconds since the epoch."""
    before = time.time()
    call()
    return before, time.time()


def system(world: World) -> str:
    """The system turn of the example."""
    return world.spec.task.instruction


def percentile(ascending: list[float], share: float) -> float:
    """The value at a share of an ascending list (nearest rank)."""
    return ascending[min(len(ascending) - 1, int(share * len(ascending)))] if ascending else float("nan")
