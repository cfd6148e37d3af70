"""The whole flow with a teacher behind HTTP: what it leaves, what a second run costs, and what ingest makes of it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.client.schemas.sorting import ArtifactSort

from flows.synthesize import synthesize
from tasks.contracts.errors import GoldenSetError, ServiceError, SpecError
from tasks.contracts.spec import DataSpec, ExecutionSpec, GoldenSpec, RetrainSpec, TaskKind, TaskSpec
from tasks.contracts.synthesis import SynthesizeSpec
from tasks.data.golden import ITEMS, freeze
from tasks.evaluation.engines.vllm import vllm_environment
from tasks.store import Store
from tests.data.synthesis.fake_teacher import FakeTeacher, Say, fake_teacher, good_teacher, is_vote, says
from tests.prefect_server import prefect_server
from tests.tiny import small_model
from tests.toys import LABELS, toy_rows, write_jsonl

pytestmark = pytest.mark.timeout(300)
KEY = "sk-very-secret-key"
PHONE = "call me at 212-555-0147 or write to ada.lovelace@example.com"


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    with prefect_server():
        yield


@pytest.fixture
def teacher() -> Iterator[FakeTeacher]:
    with fake_teacher() as state:
        yield state


@pytest.fixture
def spec(tmp_path: Path, teacher: FakeTeacher, monkeypatch: pytest.MonkeyPatch) -> SynthesizeSpec:
    """Toy rows of which support has few, a frozen golden set, and a teacher."""
    monkeypatch.delenv("GOLDGATE_TEACHER_KEY", raising=False)
    toys = toy_rows(400, seed=1)
    few = [row for row in toys if row["label"] == "support"][:60]
    private = [{"id": f"p{n}", "text": f"{PHONE} login {n}", "label": "support"} for n in range(5)]
    source = write_jsonl(tmp_path / "rows.jsonl", [row for row in toys if row["label"] == "billing"] + few + private)
    task = TaskSpec(kind=TaskKind.CLASSIFY, instruction="Which team?", labels=LABELS)
    golden = GoldenSpec(path=str(tmp_path / "golden"), items=40)
    execution = ExecutionSpec(store=str(tmp_path / "store"))
    data = DataSpec(source=str(source))
    freeze(RetrainSpec(name="tickets", task=task, data=data, golden=golden, base_model="none", execution=execution))
    return SynthesizeSpec.model_validate(
        {
            "name": "tickets",
            "task": task,
            "data": data,
            "golden": golden,
            "execution": execution,
            "teacher": {"url": teacher.url, "model": "big", "max_tokens": 64},
            "price": {"per_million_prompt": 1.0, "per_million_completion": 10.0},
            "fill": [{"label": "billing", "looks_like": "support", "rows": 2}],
            "fill_classes_to": 70,
        }
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def page_of(key: str) -> str:
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(
            artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])), sort=ArtifactSort.CREATED_DESC
        )
    return str(found[0].data)


def test_from_few_rows_to_a_folder_of_parts(spec: SynthesizeSpec, teacher: FakeTeacher) -> None:
    result = synthesize(spec)
    rows = lines(Path(result.path))
    assert Path(result.path).name == "synthetic.jsonl"
    assert result.rows == len(rows) == result.report["kept"]
    labels = Counter(row["label"] for row in rows)
    assert labels["billing"] == 2
    (support,) = [fill for fill in result.report["fills"] if fill["label"] == "support"]
    assert labels["support"] == support["wanted"] == support["kept"] > 10
    assert all(row["synthetic"] is True and row["source"] == "synthetic:big" for row in rows)
    assert result.report["costs"]["money"] == pytest.approx(len(teacher.asked) * 0.0003)
    page = page_of("tickets-synthesis")
    assert f"# {result.rows} rows written by `big`" in page
    assert "| self-consistency |" in page

    # Neither what is private nor what is golden is shown to the teacher.
    asked = "\n".join(turn["content"] for body in teacher.asked for turn in body["messages"])
    assert "555-0147" not in asked
    golden = [item["messages"][0]["content"] for item in lines(Path(spec.golden.path) / ITEMS)]
    assert not [text for text in golden if text in asked]

    # A second run of the same is reused and asks nothing.
    count = len(teacher.asked)
    again = synthesize(spec)
    assert again.reused
    assert again.path == result.path
    assert len(teacher.asked) == count


def test_beside_the_real_rows_they_are_read_as_synthetic(spec: SynthesizeSpec, tmp_path: Path) -> None:
    from tasks.contracts.rows import read_rows
    from tasks.data.ingest import ROWS, ingest

    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "real.jsonl").write_bytes(Path(spec.data.source).read_bytes())
    (parts / "synthetic.jsonl").write_bytes(Path(synthesize(spec).path).read_bytes())
    out = tmp_path / "ingested"
    out.mkdir()
    found = ingest(DataSpec(source=str(parts)), TaskKind.CLASSIFY, out)
    rows = list(read_rows(out / ROWS))
    assert found.unreadable == 0
    assert Counter(row.synthetic for row in rows)[True] == len(lines(parts / "synthetic.jsonl")) > 0
    assert all(row.synthetic == row.id.startswith("syn-") for row in rows)


def test_a_teacher_that_fails_ends_the_run_and_the_next_one_goes_on(spec: SynthesizeSpec, teacher: FakeTeacher) -> None:
    one_by_one = spec.teacher.model_copy(update={"concurrency": 1, "max_failures": 2})
    spec = spec.model_copy(update={"teacher": one_by_one})
    teacher.reply = lambda body: good_teacher(body) if len(teacher.asked) <= 9 else Say("out of memory", 418)
    with pytest.raises(ServiceError, match="The teacher failed 2 requests one after the other") as caught:
        synthesize(spec)
    assert caught.value.where == f"{teacher.url}/v1"
    assert not list(Store(spec.execution.store).list("synthesize"))
    teacher.reply = good_teacher
    paid, teacher.asked = teacher.asked[:9], []
    result = synthesize(spec)
    assert result.report["costs"]["requests"] == len(teacher.asked) + 9
    assert not [body for body in paid if body in teacher.asked]
    traffic = next(iter(Store(spec.execution.store).list("synthesize"))).manifest.facts["traffic"]
    assert traffic == {"paid": len(teacher.asked), "reused": 9, "repeated": 0}


def test_a_spent_budget_is_a_result(spec: SynthesizeSpec, teacher: FakeTeacher) -> None:
    result = synthesize(spec.model_copy(update={"budget": spec.budget.model_copy(update={"requests": 10})}))
    assert result.stopped == "budget.requests is 10"
    assert len(teacher.asked) <= 10
    assert 1 <= result.rows <= 3
    assert "**Stopped early**: budget.requests is 10" in page_of("tickets-synthesis")


@pytest.mark.parametrize("where", ["environment", "block"])
def test_the_key_reaches_the_teacher_and_nothing_else(
    spec: SynthesizeSpec, teacher: FakeTeacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    if where == "environment":
        monkeypatch.setenv("GOLDGATE_TEACHER_KEY", KEY)
    else:
        Secret(value=KEY).save("teacher-key", overwrite=True)
        spec = spec.model_copy(update={"teacher": spec.teacher.model_copy(update={"key_block": "teacher-key"})})
    teacher.reply = lambda body: good_teacher(body) if is_vote(body) or body["seed"] % 2 else says(f"Bearer {KEY}")
    result = synthesize(spec)
    assert {headers["Authorization"] for headers in teacher.headers} == {f"Bearer {KEY}"}
    quarantine = lines(Path(result.path).with_name("quarantine.jsonl"))
    assert "Bearer ***" in [entry["written"] for entry in quarantine]
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert kept == []


def test_a_block_that_is_not_there(spec: SynthesizeSpec) -> None:
    spec = spec.model_copy(update={"teacher": spec.teacher.model_copy(update={"key_block": "nowhere"})})
    with pytest.raises(SpecError, match="no Prefect Secret block 'nowhere'"):
        synthesize(spec)


def test_without_a_golden_set_nothing_is_asked(spec: SynthesizeSpec, teacher: FakeTeacher, tmp_path: Path) -> None:
    spec = spec.model_copy(update={"golden": GoldenSpec(path=str(tmp_path / "elsewhere"))})
    with pytest.raises(GoldenSetError, match="not frozen yet"):
        synthesize(spec)
    assert teacher.asked == []


# -- a real model -------------------------------------------------------------------------------------------------


@pytest.mark.vllm
@pytest.mark.timeout(1800)
def test_a_real_small_model_is_a_poor_teacher_and_its_answers_are_filtered(
    spec: SynthesizeSpec, tmp_path: Path
) -> None:
    """SmolLM2-135M behind vLLM: the counts add up and the tokens are the server's, whatever it writes."""
    with served(small_model(tmp_path), tmp_path / "vllm.log") as url:
        settings = {"url": url, "model": "small", "max_tokens": 96, "timeout_seconds": 300.0}
        asked = spec.model_copy(
            update={
                "teacher": spec.teacher.model_copy(update=settings),
                "budget": spec.budget.model_copy(update={"requests": 60}),
            }
        )
        result = synthesize(asked)
    report, quarantine = result.report, lines(Path(result.path).with_name("quarantine.jsonl"))
    assert report["asked"] == report["kept"] + len(quarantine) > 0
    assert 0 < report["costs"]["requests"] <= 60
    assert report["costs"]["money"] > 0
    assert report["costs"]["not_counted_by_server"] == 0
    left = report["asked"]
    for entry in report["funnel"]:
        assert entry["in"] == left
        left = entry["out"]
    assert left == report["kept"] == len(lines(Path(result.path)))
    # The server holds answers to the schema, so one that does not fit it was cut off.
    assert all("cut off" in entry["detail"] for entry in quarantine if entry["reason"] == "schema")


@contextmanager
def served(model: Path, log: Path) -> Iterator[str]:
    """The base URL of a vLLM server of its own."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    command = [
        str(vllm_environment() / "bin/vllm"), "serve", str(model), "--host", "127.0.0.1", "--port", str(port),
        "--served-model-name", "small", "--max-model-len", "4096", "--enforce-eager", "--shutdown-timeout", "20",
    ]  # fmt: skip
    variables = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0-1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    with log.open("wb") as out, subprocess.Popen(command, env=variables, stdout=out, stderr=out) as server:
        try:
            deadline = time.monotonic() + 600
            while not is_up(f"http://127.0.0.1:{port}/health"):
                assert server.poll() is None, log.read_text()[-2000:]
                assert time.monotonic() < deadline, log.read_text()[-2000:]
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(timeout=60)


def is_up(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5.0, trust_env=False).is_success
    except httpx.TransportError:
        return False
