"""Evaluation through vLLM: Goldgate's beside lm-evaluation-harness, on the same items and the same running engine.

Both ask the engine itself, without the gateway, with the same instruction, the same choices, greedily, and so many
requests at a time. They take turns, since whoever comes second finds the engine's prefix cache warm; before the first
turn each asks once for nothing. lm-evaluation-harness has an environment of its own (`peers.txt`).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.serving.measure import serve
from bench.serving.world import ROOT, Direct, World
from bench.venv import make_environment
from tasks.contracts.progress import ignore_progress
from tasks.contracts.prompt import decoding_for, tuned_prompt
from tasks.contracts.references import SystemUnderTest
from tasks.contracts.rows import Row, read_rows
from tasks.contracts.serving import VersionRef
from tasks.contracts.spec import RetrainSpec

HERE = Path(__file__).parent
VENV = ROOT / "build" / "bench-serving-peers"
OURS, THEIRS = "Goldgate", "lm-evaluation-harness"


class Evaluated(NamedTuple):
    """One evaluation.

    Attributes:
        asking: seconds from the first request to the last answer.
        whole: seconds from the rows to the score.
        score: share of the items that are right.
        answers: by the item's id.
    """

    asking: float
    whole: float
    score: float
    answers: dict[str, str]


def harness(world: World, work: Path, turns: int, items: int, clients: int) -> dict[str, Any]:
    """Both ways on the same items, in turns; a row for each, and how far their answers agree.

    Args:
        world: a gateway whose first version is served.
        work: folder for files.
        turns: each way once in each.
        items: golden items of the example.
        clients: requests at a time.
    """
    live = world.versions[0]
    serve(world, live, None)
    direct = world.direct(live)
    rows = _rows(world.spec, items)
    python = make_environment(VENV, HERE / "peers.txt")
    ways: dict[str, Callable[[Sequence[Row]], Evaluated]] = {
        OURS: lambda asked: by_goldgate(world.spec, live, direct, asked, clients),
        THEIRS: lambda asked: by_harness(world.spec, live, direct, asked, clients, python, work),
    }
    for way in ways.values():
        way(rows[:clients])
    found: dict[str, list[Evaluated]] = {name: [] for name in ways}
    for turn in range(turns):
        for name in list(ways) if turn % 2 == 0 else reversed(ways):
            found[name].append(ways[name](rows))
            print(f"turn {turn}, {name}: {found[name][-1]._replace(answers={})}", file=sys.stderr)
    return {
        "items": len(rows),
        "clients": clients,
        "turns": turns,
        "version": _version(python),
        "rows": [_row(name, found[name], len(rows)) for name in ways],
        "agreement": _agreement(found[OURS][0], found[THEIRS][0]),
        "agreement_with_itself": _agreement(found[OURS][0], found[OURS][-1]) if turns > 1 else None,
    }


def by_goldgate(spec: RetrainSpec, live: VersionRef, direct: Direct, rows: Sequence[Row], clients: int) -> Evaluated:
    """As the stage `evaluate` asks and scores, with the engine that it uses for a vLLM."""
    from tasks.evaluation.engines.openai_http import API_KEY, OpenAIEngine
    from tasks.evaluation.evaluate import evaluate

    before = os.environ.get(API_KEY)
    os.environ[API_KEY] = direct.key
    try:
        engine = OpenAIEngine(direct.url, live.label, batch_size=clients, identity="vllm", reads_calls=True)
    finally:
        if before is None:
            del os.environ[API_KEY]
        else:
            os.environ[API_KEY] = before
    timed = _Timed(engine)
    system = SystemUnderTest(
        uri=live.uri, digest=live.digest, prompt=tuned_prompt(spec.task), role="other", label=live.label
    )
    decoding = decoding_for(spec.task, spec.evaluate.max_new_tokens)
    began = time.perf_counter()
    try:
        done = evaluate(timed, system, rows, spec.task, decoding, "0" * 64, ignore_progress)
    finally:
        engine.close()
    whole = time.perf_counter() - began
    answers = {one.id: one.prediction for one in done.outcomes}
    return Evaluated(timed.seconds, whole, done.summary.metrics["exact_match"], answers)


def by_harness(
    spec: RetrainSpec, live: VersionRef, direct: Direct, rows: Sequence[Row], clients: int, python: Path, work: Path
) -> Evaluated:
    """As `lm-eval --model local-chat-completions` does, its imports not counted."""
    items, job, out = work / "harness-items.jsonl", work / "harness-job.json", work / "harness-result.json"
    items.write_text(
        "".join(json.dumps({"id": row.id, "text": row.text, "target": row.target}) + "\n" for row in rows),
        encoding="utf-8",
    )
    decoding = decoding_for(spec.task, spec.evaluate.max_new_tokens)
    about = {
        "url": direct.url, "key": direct.key, "model": live.label, "clients": clients, "items": str(items),
        "system": spec.task.instruction, "max_tokens": decoding.max_new_tokens, "choices": list(decoding.choices),
    }  # fmt: skip
    job.touch(mode=0o600)  # the engine's key is in it
    job.write_text(json.dumps(about), encoding="utf-8")
    environment = os.environ | {"HF_HOME": str(work / "harness-cache")}
    command = [str(python), str(HERE / "peers.py"), str(job), str(out)]
    try:
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    finally:
        job.unlink()
    found = json.loads(out.read_text(encoding="utf-8"))
    return Evaluated(found["asking_seconds"], found["whole_seconds"], found["score"], found["answers"])


class _Timed:
    """An engine whose answering is timed."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.identity: str = engine.identity
        self.seconds = 0.0

    def answer(self, *asked: Any) -> Any:
        began = time.perf_counter()
        try:
            return self._engine.answer(*asked)
        finally:
            self.seconds += time.perf_counter() - began

    def close(self) -> None:
        self._engine.close()


def _rows(spec: RetrainSpec, count: int) -> list[Row]:
    """Golden items of the example, as many of each label as its file has at its begin."""
    return list(read_rows(Path(spec.golden.path) / "items.jsonl"))[:count]


def _row(way: str, done: Sequence[Evaluated], items: int) -> dict[str, Any]:
    return {
        "way": way,
        "per_second": statistics.median(items / one.asking for one in done),
        "per_second_whole": statistics.median(items / one.whole for one in done),
        "score": done[0].score,
    }


def _agreement(one: Evaluated, other: Evaluated) -> float:
    """Share of the items that both answer with the same text, white space around it apart."""
    same = [other.answers[item].strip() == said.strip() for item, said in one.answers.items()]
    return sum(same) / len(same)


def _version(python: Path) -> str:
    code = "from importlib.metadata import version; print(version('lm-eval'))"
    return subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout.strip()
