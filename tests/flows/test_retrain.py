"""The whole flow, every part real but the size of the model: promoted, rejected, inconclusive, and refused."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from prefect.testing.utilities import prefect_test_harness

from flows.retrain import retrain
from tasks.contracts.errors import DataError, GoldenSetError
from tasks.contracts.references import Outcome, RunResult
from tasks.contracts.spec import (
    CurateSpec,
    DataSpec,
    EvaluateSpec,
    ExecutionSpec,
    GoldenSpec,
    Guard,
    RetrainSpec,
    TaskKind,
    TaskSpec,
    TrainSpec,
)
from tasks.data.golden import freeze
from tests.tiny import make_tiny_model
from tests.toys import LABELS, toy_rows, vocabulary, write_jsonl


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> RetrainSpec:
    """A spec over toy rows, a frozen golden set and a tiny model, in one store."""
    folder = tmp_path_factory.mktemp("world")
    model = make_tiny_model(folder / "base", vocabulary())
    source = write_jsonl(folder / "rows.jsonl", toy_rows(400, seed=1))
    spec = RetrainSpec(
        name="tickets",
        task=TaskSpec(kind=TaskKind.CLASSIFY, instruction="Which team?", labels=LABELS),
        data=DataSpec(source=str(source)),
        golden=GoldenSpec(path=str(folder / "golden"), items=80),
        base_model=str(model),
        curate=CurateSpec(
            accept_risks={
                Guard.FEW_ROWS: "a toy task with a model of two layers",
                Guard.LEARNING_RATE: "a toy task with a model of two layers",
            }
        ),
        train=TrainSpec(epochs=6, learning_rate=5e-3, batch_size=16, max_tokens=128, evaluations=2),
        evaluate=EvaluateSpec(max_new_tokens=8, batch_size=40, baseline_shots=2, baseline_dev_items=20),
        execution=ExecutionSpec(store=str(folder / "store"), tracking_uri=f"sqlite:///{folder}/mlflow.db"),
    )
    freeze(spec)
    return spec


def versions(spec: RetrainSpec) -> dict[str, str]:
    """Aliases of the registered model; empty when it is not there."""
    client = MlflowClient(spec.execution.tracking_uri, spec.execution.tracking_uri)
    found = client.search_registered_models(f"name = '{spec.name}'")
    return dict(found[0].aliases) if found else {}


def run(spec: RetrainSpec) -> tuple[str, RunResult]:
    state = retrain(spec, return_state=True)
    result = state.result()
    assert isinstance(result, RunResult)
    return state.name, result


def test_a_better_candidate_is_promoted_and_a_second_run_reuses_it(world: RetrainSpec) -> None:
    name, result = run(world)

    assert name == "Promoted"
    assert result.verdict.outcome is Outcome.PROMOTE
    assert result.registered is not None
    assert (result.registered.version, result.registered.alias) == ("1", "champion")
    assert result.verdict.digests["candidate"] == result.registered.digest
    assert {alias: str(v) for alias, v in versions(world).items()} == {"champion": "1"}
    kept = json.loads((Path(result.folder) / "verdict.json").read_text())
    assert kept["verdict"] == "promote"
    assert "Promote" in (Path(result.folder) / "report.html").read_text()

    again_name, again = run(world)
    assert again_name == "Promoted"
    assert again.verdict == result.verdict
    assert again.registered == result.registered
    assert {alias: str(v) for alias, v in versions(world).items()} == {"champion": "1"}


def test_a_candidate_trained_on_shuffled_labels_is_rejected(world: RetrainSpec, tmp_path: Path) -> None:
    if not versions(world):
        run(world)
    rows = toy_rows(400, seed=1)
    labels = [row["label"] for row in rows]
    random.Random(3).shuffle(labels)
    broken = write_jsonl(
        tmp_path / "broken.jsonl", [row | {"label": new} for row, new in zip(rows, labels, strict=True)]
    )
    spec = world.model_copy(update={"data": world.data.model_copy(update={"source": str(broken)})})

    name, result = run(spec)

    assert name == "Rejected"
    assert result.verdict.baseline.role == "champion"
    assert result.registered is None
    assert {alias: str(v) for alias, v in versions(world).items()} == {"champion": "1"}


def test_the_same_recipe_with_another_seed_is_inconclusive(world: RetrainSpec) -> None:
    if not versions(world):
        run(world)
    spec = world.model_copy(update={"train": world.train.model_copy(update={"seed": 18})})

    name, result = run(spec)

    assert name == "Inconclusive"
    assert result.registered is None
    assert result.verdict.looks > 1
    assert {alias: str(v) for alias, v in versions(world).items()} == {"champion": "1"}


def test_a_changed_golden_set_stops_the_run_before_anything_else(world: RetrainSpec, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(world.golden.path, tmp_path / "golden")
    items = tmp_path / "golden" / "items.jsonl"
    items.write_bytes(items.read_bytes().replace(b"billing", b"support", 1))
    store = tmp_path / "store"
    spec = world.model_copy(
        update={
            "golden": world.golden.model_copy(update={"path": str(tmp_path / "golden")}),
            "execution": world.execution.model_copy(update={"store": str(store)}),
        }
    )
    with pytest.raises(GoldenSetError, match="changed"):
        retrain(spec)
    assert not any(store.rglob("manifest.json"))


def test_rows_over_the_limit_stop_the_run_and_are_named(world: RetrainSpec, tmp_path: Path) -> None:
    rows = toy_rows(400, seed=1)
    for row in rows[:40]:
        row["label"] = "sales"
    spec = world.model_copy(
        update={"data": world.data.model_copy(update={"source": str(write_jsonl(tmp_path / "rows.jsonl", rows))})}
    )
    with pytest.raises(DataError, match="40"):
        retrain(spec)
