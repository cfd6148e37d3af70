"""Confidence from end to end: learnt by `retrain`, registered, rolled out, and said of answers by a gateway."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prefect.client.orchestration import get_client

from flows.retrain import retrain
from flows.rollout import rollout
from tasks.contracts.confidence import LearntTrust
from tasks.contracts.references import Approval, ItemOutcome, RunResult
from tasks.contracts.serving import Phase, RolloutResult, RolloutSpec, Trust
from tasks.contracts.spec import (
    ConfidenceSpec,
    CurateSpec,
    ExecutionSpec,
    Guard,
    Policy,
    RetrainSpec,
    RolloutSettings,
)
from tasks.registry.serving_aliases import read_aliases, resolve_version
from tasks.serving.client import gateway_of
from tasks.serving.trust import sureness
from tasks.store import Store
from tests.prefect_server import prefect_server
from tests.serving.fake_engine import Behaviour, FakeCommand
from tests.serving.gateway_process import running_gateway
from tests.toys import LABELS, toy_risks, toy_rows, toy_spec

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module", autouse=True)
def _server() -> Iterator[None]:
    with prefect_server():
        yield


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> RetrainSpec:
    """A task with a third of its rows in dev, whose promotion waits for a person first."""
    folder = tmp_path_factory.mktemp("trust")
    return toy_spec(
        folder,
        toy_rows(400, seed=1),
        curate=CurateSpec(dev_share=0.35, accept_risks=toy_risks(Guard.FEW_ROWS, Guard.LEARNING_RATE)),
        policy=Policy(approval_hours=1),
        rollout=RolloutSettings(
            smoke_items=5, drain_seconds=0.5, confidence=ConfidenceSpec(target_accuracy=0.8, min_rows=20)
        ),
        execution=ExecutionSpec(store=str(folder / "store")),  # the registry too, where the gateway looks for it
    )


def run(spec: RetrainSpec, approval: Approval | None = None) -> tuple[str, RunResult]:
    state = retrain(spec, approval=approval, return_state=True)
    result = state.result()
    assert isinstance(result, RunResult)
    return str(state.name), result


def made(spec: RetrainSpec, step: str) -> int:
    return len(list(Store(spec.execution.store).list(step)))


@pytest.fixture(scope="module")
def waiting(spec: RetrainSpec) -> RunResult:
    state, result = run(spec)
    assert state == "Awaiting approval"
    return result


@pytest.fixture(scope="module")
def promoted(spec: RetrainSpec, waiting: RunResult) -> RunResult:
    said = Approval(approve=True, by="Grace", comment="go", candidate=waiting.verdict.candidate.digest)
    state, result = run(spec, said)
    assert state == "Promoted"
    return result


@pytest.fixture(scope="module")
def learnt(spec: RetrainSpec, promoted: RunResult) -> LearntTrust:
    store = Store(spec.execution.store)
    (artefact,) = store.list("trust")
    return LearntTrust.model_validate_json((store.files(artefact) / "trust.json").read_text())


def outcomes(spec: RetrainSpec, step: str, model: str) -> list[ItemOutcome]:
    store = Store(spec.execution.store)
    (found,) = [one for one in store.list(step) if model in one.manifest.inputs.values()]
    lines = (store.files(found) / "items.jsonl").read_text().splitlines()
    return [ItemOutcome.model_validate_json(line) for line in lines]


def test_nothing_is_asked_of_a_candidate_that_is_not_promoted(spec: RetrainSpec, waiting: RunResult) -> None:
    assert (made(spec, "ask_dev"), made(spec, "trust")) == (0, 0)
    assert 'id="confidence"' not in Path(waiting.folder, "report.html").read_text()


def test_a_promoted_candidate_is_asked_dev_and_its_trust_goes_with_the_version(
    spec: RetrainSpec, promoted: RunResult, learnt: LearntTrust
) -> None:
    answers = outcomes(spec, "ask_dev", promoted.verdict.candidate.digest)
    assert learnt.rows == len(answers) > 100
    assert learnt.choices == LABELS
    assert learnt.engine.startswith("embedded/")
    assert learnt.threshold.at is not None
    above = [one for one in answers if one.confidence is not None and one.confidence >= learnt.threshold.at]
    assert learnt.threshold.coverage == pytest.approx(len(above) / len(answers))
    assert learnt.threshold.accuracy == pytest.approx(sum(one.scores["exact_match"] for one in above) / len(above))
    assert promoted.registered is not None
    assert promoted.registered.alias == "promoted"
    version = resolve_version(spec.name, None, spec.execution)
    assert version.trust == Trust.of(learnt)
    report = Path(promoted.folder, "report.html").read_text()
    assert 'id="confidence"' in report
    assert f"Learnt on {learnt.rows:,} dev rows" in report
    with get_client(sync_client=True) as client:
        page = client.request("GET", "/artifacts/tickets-verdict/latest").json()["data"]
    assert "**Confidence.** Answers that the model is at least" in page


def test_the_same_run_again_asks_nothing_anew(spec: RetrainSpec, promoted: RunResult) -> None:
    state, again = run(spec)
    assert (state, again.registered) == ("Promoted", promoted.registered)
    assert (made(spec, "ask_dev"), made(spec, "trust")) == (1, 1)


@pytest.mark.slow
def test_the_gateway_says_how_sure_the_version_that_was_rolled_out_is(
    spec: RetrainSpec, promoted: RunResult, learnt: LearntTrust, tmp_path: Path
) -> None:
    golden = outcomes(spec, "evaluate", promoted.verdict.candidate.digest)
    answers = {one.text: one.prediction for one in golden}
    sure = {one.text: math.log(one.confidence) for one in golden if one.confidence}
    fakes = FakeCommand(tmp_path / "fakes", Behaviour(answers=answers, confidences=sure))
    with running_gateway(Path(spec.execution.store), fakes), gateway_of(spec.execution) as gateway:
        state = rollout(RolloutSpec.of(spec), wait_seconds=0.0, return_state=True)
        result = state.result()
        assert isinstance(result, RolloutResult)
        assert (result.phase, result.problems) == (Phase.DONE, ())
        body = {"model": "tickets", "messages": [{"role": "user", "content": golden[0].text}]}
        answer = httpx.post(f"{gateway.url}/v1/chat/completions", json=body, timeout=30.0)
        traffic = gateway.traffic("tickets")
    assert read_aliases(spec.name, spec.execution).champion == "1"
    assert traffic is not None
    assert traffic.live.trust == Trust.of(learnt)
    assert answer.json()["choices"][0]["message"]["content"] == golden[0].prediction
    expected = sureness(golden[0].confidence, Trust.of(learnt))
    shown = golden[0].confidence if expected.certainty is None else expected.certainty
    assert answer.headers["x-goldgate-confidence"] == f"{shown:.4f}"
    assert answer.headers["x-goldgate-review"] == ("yes" if expected.flagged else "no")
    asked = fakes.requests("tickets@1")[-1]
    assert asked["logprobs"] is True
    assert json.loads(answer.content)["choices"][0]["logprobs"] is None
