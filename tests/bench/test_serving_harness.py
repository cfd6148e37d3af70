"""The evaluation beside lm-evaluation-harness, with a fake engine: what is asked, what is counted, what is told."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from bench.serving.harness import HERE, VENV, Evaluated, _agreement, _row, by_goldgate, by_harness
from bench.serving.tables import all_tables
from bench.serving.world import Direct
from tasks.contracts.rows import Message, Row
from tasks.contracts.spec import DataSpec, EvaluateSpec, GoldenSpec, RetrainSpec, TaskSpec
from tests.services.test_vanished_worker import free_port
from tests.serving.fake_engine import ROOT, Behaviour, FakeCommand
from tests.serving.records import version

SEVEN = version(7)
TEXTS = ("They charged my card.", "They ask for a loan.", "Neither.", "Both.")
ANSWERS = dict(zip(TEXTS, ("card", "loan", "card", "loan"), strict=True))
ROWS = [Row(f"r{n}", n, (Message("user", text),), "card") for n, text in enumerate(TEXTS)]


def spec() -> RetrainSpec:
    return RetrainSpec(
        name="complaints",
        task=TaskSpec(kind="classify", instruction="Which product?", labels=("card", "loan")),
        data=DataSpec(source="unused.jsonl"),
        golden=GoldenSpec(path="unused"),
        base_model="unused",
        evaluate=EvaluateSpec(max_new_tokens=8),
    )


@contextmanager
def running(folder: Path) -> Iterator[tuple[Direct, FakeCommand]]:
    """A fake engine in a process of its own."""
    fakes, port = FakeCommand(folder / "fakes", Behaviour(answers=dict(ANSWERS))), free_port()
    command = [sys.executable, "-m", "tests.serving.fake_engine", "/model", "--port", str(port)]
    with (folder / "engine.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--served-model-name", SEVEN.label], cwd=ROOT, env=fakes.environment("the key"), stdout=log,
            stderr=log,
        )  # fmt: skip
    try:
        until = time.monotonic() + 120
        while True:
            assert time.monotonic() < until, (folder / "engine.log").read_text()
            try:
                httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.05)
        yield Direct(f"http://127.0.0.1:{port}/v1", "the key"), fakes
    finally:
        process.terminate()
        process.wait(30)


def test_goldgate_asks_the_engine_itself_as_it_evaluates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "of somebody else")
    with running(tmp_path) as (direct, fakes):
        done = by_goldgate(spec(), SEVEN, direct, ROWS, clients=2)
    assert done.answers == {row.id: ANSWERS[row.text] for row in ROWS}
    assert done.score == 0.5
    assert 0 < done.asking <= done.whole
    asked = fakes.requests(SEVEN.label)
    assert len(asked) == len(ROWS)
    assert asked[0]["messages"][0] == {"role": "system", "content": "Which product?"}
    assert asked[0]["structured_outputs"] == {"choice": ["card", "loan"]}


@pytest.mark.slow
@pytest.mark.skipif(not (VENV / ".ready").exists(), reason="its environment is made by `python -m bench.serving`")
def test_the_harness_is_asked_for_the_same(tmp_path: Path) -> None:
    with running(tmp_path) as (direct, fakes):
        ours = by_goldgate(spec(), SEVEN, direct, ROWS, clients=2)
        theirs = by_harness(spec(), SEVEN, direct, ROWS, 2, VENV / "bin" / "python", tmp_path)
    assert theirs.answers == ours.answers
    assert theirs.score == ours.score
    first, second = fakes.requests(SEVEN.label)[: len(ROWS)], fakes.requests(SEVEN.label)[len(ROWS) :]
    assert {body["temperature"] for body in (*first, *second)} == {0}
    for name in ("messages", "structured_outputs", "max_tokens"):
        assert sorted(json.dumps(body[name]) for body in first) == sorted(json.dumps(body[name]) for body in second)
    assert not (tmp_path / "harness-job.json").exists()  # it holds the engine's key


def test_the_versions_of_the_peer_are_pinned() -> None:
    wanted = [line for line in (HERE / "peers.txt").read_text().splitlines() if not line.startswith("#")]
    assert all("==" in line for line in wanted)


def test_medians_agreement_and_the_table() -> None:
    one = Evaluated(2.0, 4.0, 0.5, {"a": "card", "b": "loan"})
    other = Evaluated(4.0, 8.0, 1.0, {"a": " card\n", "b": "card"})
    assert _agreement(one, other) == 0.5
    rows = [_row("Goldgate", [one, one, other], 8), _row("lm-evaluation-harness", [other], 8)]
    assert [(row["per_second"], row["per_second_whole"], row["score"]) for row in rows] == [
        (4.0, 2.0, 0.5),
        (2.0, 1.0, 1.0),
    ]
    found = {"items": 8, "clients": 2, "turns": 3, "version": "1.2", "rows": rows, "agreement": 0.5}
    text = all_tables({"harness": found | {"agreement_with_itself": 1.0}})["harness"]
    assert "the same answer to 50.0% of the items; Goldgate's own first and last turn agree on 100.0%." in text
    assert "| lm-evaluation-harness | 2.0 | 0.500 | 1.0 | 1.000 |" in text
    assert "Goldgate's own" not in all_tables({"harness": found | {"agreement_with_itself": None}})["harness"]
