"""The preference stage as a flow, every part real but the size of the model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.states import Completed, Failed
from rich.console import Console

from flows.prefer import prefer, prefer_further
from flows.retrain import retrain
from flows.train import train, train_where_told, tune_where_told
from goldgate.prefer import print_preference
from tasks.contracts.dev import DevPart, rows_of_part
from tasks.contracts.errors import SpecError, TrainingError
from tasks.contracts.prefer import DevEffect, PreferRequest, PreferResult
from tasks.contracts.references import BaseModelRef, ItemOutcome, RunResult, SplitsRef, TrainedModelRef, TrainRequest
from tasks.contracts.rows import Row, read_rows
from tasks.contracts.spec import (
    CurateSpec,
    Guard,
    PreferenceSpec,
    RetrainSpec,
    TrainSpec,
)
from tasks.evaluation.engines.embedded import EmbeddedEngine
from tasks.store import Store
from tasks.training.prefer import Pair, read_pairs
from tests.prefect_server import prefect_server
from tests.toys import toy_risks, toy_rows, toy_spec

pytestmark = pytest.mark.timeout(600)  # whoever comes first starts the server and trains

PREFERENCE = PreferenceSpec(mine_share=0.5, min_pairs=5, epochs=2, learning_rate=5e-3)


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    with prefect_server():
        yield


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> RetrainSpec:
    """Toy rows, and a recipe so short that the model gets plenty of dev wrong."""
    folder = tmp_path_factory.mktemp("prefer")
    risks = toy_risks(Guard.FEW_ROWS, Guard.LEARNING_RATE, Guard.SELF_CHECK, Guard.UNSEEN_ANSWER)
    return toy_spec(
        folder,
        toy_rows(300, seed=1),
        items=60,
        curate=CurateSpec(dev_share=0.3, accept_risks=risks),
        train=TrainSpec(epochs=1, learning_rate=1e-4, batch_size=16, max_tokens=128, evaluations=1),
        preference=PREFERENCE,
    )


class Ran(NamedTuple):
    """A run of the flow, with what it read and asked.

    Attributes:
        result: what it handed back.
        golden: the golden items.
        dev: the dev rows.
        asked: ids of the rows that models were asked, in order.
        trained_from: the request of the first training.
    """

    result: PreferResult
    golden: list[Row]
    dev: list[Row]
    asked: list[str]
    trained_from: TrainRequest


@pytest.fixture(scope="module")
def ran(spec: RetrainSpec) -> Ran:
    """One run, during which the golden set is taken away as soon as the data is curated."""
    golden = list(read_rows(Path(spec.golden.path) / "items.jsonl"))
    hidden = Path(spec.golden.path).with_name("taken away")
    asked: list[str] = []
    requests: list[TrainRequest] = []
    answer = EmbeddedEngine.answer

    def watched(engine: EmbeddedEngine, prompt: Any, rows: Sequence[Row], *rest: Any) -> Any:
        asked.extend(row.id for row in rows)
        return answer(engine, prompt, rows, *rest)

    def without_golden_set(request: TrainRequest) -> TrainedModelRef:
        shutil.move(spec.golden.path, hidden)
        requests.append(request)
        return train_where_told(request)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(EmbeddedEngine, "answer", watched)
        patched.setattr("flows.prefer.train_where_told", without_golden_set)
        result = prefer(spec)
        assert not Path(spec.golden.path).exists(), "whatever came after curating did without it"
    shutil.move(hidden, spec.golden.path)
    return Ran(result, golden, list(read_rows(files(spec, requests[0].splits.uri) / "dev.jsonl")), asked, requests[0])


def files(spec: RetrainSpec, uri: str) -> Path:
    store = Store(spec.execution.store)
    return store.files(store.open(uri))


def pairs_of(spec: RetrainSpec, ran: Ran) -> list[Pair]:
    return list(read_pairs(files(spec, ran.result.pairs.uri) / "pairs.jsonl"))


def test_no_golden_item_is_asked_mined_or_trained_on(spec: RetrainSpec, ran: Ran) -> None:
    ids, texts = {row.id for row in ran.golden}, {row.text for row in ran.golden}
    assert len(texts) == 60
    dev = {row.id for row in ran.dev}
    assert set(ran.asked) == dev, "models were asked all of dev and nothing else"
    assert not set(ran.asked) & ids
    pairs = pairs_of(spec, ran)
    assert pairs
    assert not {pair.row.id for pair in pairs} & ids
    assert not {pair.row.text for pair in pairs} & texts
    for uri in (ran.result.pairs.uri, ran.result.before.uri, ran.trained_from.splits.uri):
        for path in files(spec, uri).rglob("*.jsonl"):
            if path.name == "quarantine.jsonl":  # where golden rows that were in the data are named
                continue
            kept = path.read_text(encoding="utf-8")
            assert not [text for text in texts if text in kept], path


def test_pairs_come_from_one_part_of_dev_and_the_effect_from_the_other(spec: RetrainSpec, ran: Ran) -> None:
    mined, held_out = (rows_of_part(ran.dev, part, PREFERENCE) for part in (DevPart.MINED, DevPart.HELD_OUT))
    result = ran.result
    assert {pair.row.id for pair in pairs_of(spec, ran)} <= {row.id for row in mined}
    assert (result.pairs.asked, result.before.items) == (len(mined), len(held_out))
    assert sorted(ran.asked) == sorted(row.id for row in (*mined, *held_out, *held_out)), "before and after"
    assert result.after is not None
    for answers, model in ((result.before, result.trained), (result.after, result.tuned)):
        assert model is not None
        assert answers.part is DevPart.HELD_OUT
        assert answers.system.digest == model.merged_digest
        lines = (files(spec, answers.uri) / "items.jsonl").read_text().splitlines()
        outcomes = [ItemOutcome.model_validate_json(line) for line in lines]
        assert {one.id for one in outcomes} == {row.id for row in held_out}
        assert answers.metrics["exact_match"] == sum(one.prediction == one.target for one in outcomes) / len(outcomes)


def test_the_effect_is_told_with_its_interval(spec: RetrainSpec, ran: Ran) -> None:
    result = ran.result
    assert result.tuned is not None
    assert result.after is not None
    assert result.tuned.merged_digest != result.trained.merged_digest
    assert result.tuned.step == "prefer"
    first = result.comparisons[0]
    assert first.metric == spec.policy.metric == "exact_match"
    assert (first.baseline, first.candidate) == (
        result.before.metrics["exact_match"],
        result.after.metrics["exact_match"],
    )
    assert first.low <= first.difference <= first.high
    assert first.difference == pytest.approx(first.candidate - first.baseline)
    assert first.n == result.before.items
    shown = DevEffect.GAIN if first.low > 0 else DevEffect.LOSS if first.high < 0 else DevEffect.NONE_SHOWN
    assert result.effect is shown
    with get_client(sync_client=True) as client:
        (page,) = [str(one.data) for one in client.read_artifacts() if one.key == "tickets-preference"]
    assert result.sentence in page
    assert "the golden set was not asked" in page
    assert result.tuned.merged_digest in page

    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_preference(console, result)
    text = console.export_text()
    assert result.sentence in text
    assert text.rstrip().endswith(result.tuned.uri)


def test_the_tuned_model_is_the_candidate_of_a_whole_run(spec: RetrainSpec, ran: Ran) -> None:
    splits: SplitsRef = ran.trained_from.splits
    base: BaseModelRef = ran.trained_from.base
    tuned = prefer_further(ran.result.trained, splits, base, spec)
    assert tuned.reused
    assert ran.result.tuned is not None
    assert tuned.merged_digest == ran.result.tuned.merged_digest


def test_a_tuning_runs_where_trainings_run(spec: RetrainSpec, ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of its own of the deployment that trains; only the request passes through Prefect, as JSON."""
    handed: list[tuple[str, str]] = []

    def on_a_worker(name: str, parameters: dict[str, Any], timeout: float) -> FlowRun:
        asked = train.validate_parameters(json.loads(json.dumps(parameters)))
        state = train(**asked, return_state=True)
        with get_client(sync_client=True) as client:
            run = client.read_flow_run(state.state_details.flow_run_id)
        handed.append((name, run.name))
        return run

    monkeypatch.setattr("flows.train.run_deployment", on_a_worker)
    execution = spec.execution.model_copy(update={"train_deployment": "train/gpu"})
    other = spec.model_copy(
        update={"execution": execution, "preference": PREFERENCE.model_copy(update={"beta": 0.2, "epochs": 1})}
    )
    result = prefer(other)
    assert handed == [("train/gpu", "tune tickets")], "the training was found, the tuning was handed on"
    assert result.tuned is not None
    assert not result.tuned.reused
    assert result.trained == ran.result.trained.model_copy(update={"reused": True})
    assert ran.result.tuned is not None
    assert result.tuned.merged_digest != ran.result.tuned.merged_digest
    again = prefer(other)
    assert len(handed) == 1, "what is tuned needs no worker"
    assert again.tuned == result.tuned.model_copy(update={"reused": True})


def test_a_tuning_that_failed_elsewhere_is_named(spec: RetrainSpec, ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    def failed(name: str, parameters: dict[str, Any], timeout: float) -> FlowRun:
        return FlowRun(flow_id=uuid4(), name="brave-otter", state=Failed(message="no memory"))

    def lost(name: str, parameters: dict[str, Any], timeout: float) -> FlowRun:
        return FlowRun(flow_id=uuid4(), name="brave-otter", state=Completed())

    asked = PreferRequest.of(spec, ran.trained_from.splits, ran.trained_from.base, ran.result.trained, ran.result.pairs)
    request = asked.model_copy(
        update={
            "preference": PREFERENCE.model_copy(update={"beta": 0.7}),
            "execution": spec.execution.model_copy(update={"train_deployment": "train/gpu"}),
        }
    )
    monkeypatch.setattr("flows.train.run_deployment", failed)
    with pytest.raises(TrainingError, match="The run that tunes preferences ended as Failed: no memory") as caught:
        tune_where_told(request)
    assert caught.value.where is not None
    assert caught.value.where.endswith("of deployment train/gpu")
    assert "starts the tuning anew" in caught.value.fix
    monkeypatch.setattr("flows.train.run_deployment", lost)
    with pytest.raises(TrainingError, match="its model is not in the store of this run") as caught:
        tune_where_told(request)
    assert caught.value.where == spec.execution.store


def test_where_there_is_too_little_to_learn_from_the_model_stays(spec: RetrainSpec, ran: Ran) -> None:
    many = spec.model_copy(update={"preference": PREFERENCE.model_copy(update={"min_pairs": 10_000})})
    result = prefer(many)
    assert (result.tuned, result.after, result.comparisons) == (None, None, ())
    assert result.effect is DevEffect.NOT_TUNED
    wrong, asked = result.pairs.wrong, result.pairs.asked
    assert result.sentence == (
        f"Not tuned: nothing to learn from: {wrong} wrong of {asked}, and `preference.min_pairs` asks for 10000."
    )
    assert result.trained.reused
    stays = prefer_further(result.trained, ran.trained_from.splits, ran.trained_from.base, many)
    assert stays == result.trained


def test_a_recipe_that_makes_no_adapter_is_refused_before_anything_else(spec: RetrainSpec, tmp_path: Path) -> None:
    full = spec.model_copy(
        update={
            "train": TrainSpec(method="full"),
            "execution": spec.execution.model_copy(update={"store": str(tmp_path / "store")}),
        }
    )
    with pytest.raises(SpecError, match="method full makes none"):
        prefer(full)
    assert not list((tmp_path / "store").rglob("*"))


def test_what_is_kept_says_what_it_was_made_of(spec: RetrainSpec, ran: Ran) -> None:
    assert ran.result.tuned is not None
    manifest = Store(spec.execution.store).open(ran.result.tuned.uri).manifest
    assert manifest.inputs == {
        "base": ran.trained_from.base.digest,
        "splits": ran.trained_from.splits.digest,
        "trained": ran.result.trained.digest,
        "pairs": ran.result.pairs.digest,
    }
    assert json.loads(json.dumps(manifest.config))["preference"]["beta"] == PREFERENCE.beta


def test_a_whole_run_puts_the_tuned_model_before_the_gate(spec: RetrainSpec, ran: Ran) -> None:
    """And it is let through, since its pairs are of the dev rows that were checked; a second run makes nothing anew."""
    tunings = len(list(Store(spec.execution.store).list("prefer")))
    first, again = (retrain(spec, return_state=True).result() for _ in range(2))
    assert ran.result.tuned is not None
    for one in (first, again):
        assert isinstance(one, RunResult)
        assert one.verdict.candidate.digest == ran.result.tuned.merged_digest
    assert isinstance(first, RunResult)
    assert isinstance(again, RunResult)
    assert again.verdict == first.verdict
    assert len(list(Store(spec.execution.store).list("prefer"))) == tunings, "those of the tests before"
