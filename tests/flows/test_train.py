"""Where a training runs, and what the run that asked for it says of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import Completed, Failed, Running

import flows.train as module
from flows.train import train_where_told
from tasks.contracts.errors import TrainingError
from tasks.contracts.references import BaseModelRef, SplitsRef, TrainRequest
from tasks.contracts.spec import ExecutionSpec, TaskKind, TaskSpec, TrainSpec
from tasks.store import Store
from tasks.training.steps import _TRAIN_VERSION, _recipe, train_adapter
from tests.report.example import example_trained


@pytest.fixture
def request_(tmp_path: Path) -> TrainRequest:
    """A training that is handed to a deployment."""
    made = {"uri": "unused", "fingerprint": "f" * 64, "digest": "d" * 64}
    return TrainRequest(
        name="tickets",
        task=TaskSpec(kind=TaskKind.CLASSIFY, instruction="Which team?", labels=("billing", "support")),
        splits=SplitsRef(**made, step="curate", train_rows=1, dev_rows=1, removed={}),
        base=BaseModelRef(**made, step="base_model", source="base"),
        recipe=TrainSpec(),
        execution=ExecutionSpec(store=str(tmp_path / "store"), train_deployment="train/gpu"),
    )


def train_elsewhere(request: TrainRequest) -> None:
    """What a worker leaves in the store when it has trained."""
    config, inputs = _recipe(request)
    facts = example_trained().model_dump(exclude={"uri", "step", "fingerprint", "digest", "reused", "kind"})
    facts |= {
        "planned_steps": 180, "best_step": 135, "tokens": 1, "trainable_parameters": 1, "device": "cpu",
        "compute_dtype": "float32", "stopped_early": False, "mlflow_run_id": "", "mlflow_url": None,
    }  # fmt: skip
    Store(request.execution.store).produce("train", _TRAIN_VERSION, config, inputs, lambda folder: facts)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The lines of the run's page."""
    monkeypatch.setattr("tasks.runtime.get_run_logger", lambda: logging.getLogger("the run's page"))
    caplog.set_level(logging.INFO, logger="the run's page")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "the run's page"]


class Server:
    """Stands for a Prefect server: a training run goes through these states, and trains before the last one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *states: State, work: Callable[[], None] = lambda: None):
        self.states, self.work = list(states), work
        self.asked: list[str] = []
        self.id = uuid4()
        monkeypatch.setattr(module, "run_deployment", self.run_deployment)
        monkeypatch.setattr(module, "get_client", lambda sync_client: self)
        monkeypatch.setattr(module, "_POLL_SECONDS", 0.0)
        monkeypatch.setattr(module, "url_for", lambda run: f"http://server/runs/flow-run/{run.id}")

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run_deployment(self, name: str, parameters: dict[str, Any], timeout: float) -> FlowRun:
        assert timeout == 0
        TrainRequest.model_validate(parameters["request"])
        self.asked.append(name)
        return self.read_flow_run(self.id)

    def read_flow_run(self, id_: object) -> FlowRun:
        assert id_ == self.id
        state = self.states.pop(0)
        if not self.states:
            self.work()
        return FlowRun(id=self.id, flow_id=uuid4(), name="brave-otter", state=state)


def test_a_training_that_was_handed_over_is_named_and_counts_as_trained_by_this_run(
    request_: TrainRequest, monkeypatch: pytest.MonkeyPatch, log: Callable[[], list[str]]
) -> None:
    server = Server(monkeypatch, Running(), Running(), Completed(), work=lambda: train_elsewhere(request_))
    trained = train_where_told(request_)
    assert server.asked == ["train/gpu"]
    assert server.states == []
    assert not trained.reused
    handed, done = log()
    assert handed == (
        f"train: handed to train/gpu, as run brave-otter, which shows its progress: "
        f"http://server/runs/flow-run/{server.id}"
    )
    assert done.startswith("train: 180 steps")
    assert not done.endswith("(reused)")


def test_a_training_that_was_finished_before_is_reused_without_asking_for_a_worker(
    request_: TrainRequest, monkeypatch: pytest.MonkeyPatch, log: Callable[[], list[str]]
) -> None:
    server = Server(monkeypatch)
    train_elsewhere(request_)
    trained = train_where_told(request_)
    assert server.asked == []
    assert trained.reused
    assert trained == train_adapter.fn(request_)
    assert [line.endswith("(reused)") for line in log()] == [True, True]


def test_a_training_run_that_failed_is_named(request_: TrainRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(monkeypatch, Running(), Failed(message="no memory"))
    with pytest.raises(TrainingError, match="The training run ended as Failed: no memory") as caught:
        train_where_told(request_)
    assert caught.value.where == f"flow run brave-otter ({server.id}) of deployment train/gpu"


def test_a_store_that_is_not_shared_is_named(request_: TrainRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    Server(monkeypatch, Completed())
    with pytest.raises(TrainingError, match="its model is not in the store of this run") as caught:
        train_where_told(request_)
    assert caught.value.where == request_.execution.store
