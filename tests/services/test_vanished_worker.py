"""A worker that is killed with all it runs: its training is marked crashed, and another worker takes it up again."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from rich.console import Console

from goldgate import services
from tasks.contracts.references import BaseModelRef, SplitsRef, TrainRequest
from tasks.contracts.rows import Message, Row, write_rows
from tasks.contracts.spec import ExecutionSpec, TaskKind, TaskSpec, TrainSpec
from tasks.store import Store
from tests.tiny import make_tiny_model

pytestmark = [pytest.mark.services, pytest.mark.timeout(900)]

_LABELS = ("red apple", "pear")


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(frozen=True)
class World:
    """Servers, workers and the deployment `train/gpu`, as `goldgate up` makes them."""

    store: Path
    services: services.Services
    api: httpx.Client

    def ask(self, method: str, path: str, record: Any = None) -> Any:
        """An answer; asked again while SQLite is busy, as every client of Prefect does."""
        for _ in range(20):
            answer = self.api.request(method, path, json=record)
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                return answer.raise_for_status().json()
            time.sleep(1.0)
        raise AssertionError(f"{method} {path}: {answer.text}")

    def run(self, run: str) -> dict[str, Any]:
        found: dict[str, Any] = self.ask("GET", f"/flow_runs/{run}")
        return found

    def states(self, run: str) -> list[tuple[str, str]]:
        """All states that a run went through, as name and message."""
        found = self.ask("GET", f"/flow_run_states/?flow_run_id={run}")
        ordered = sorted(found, key=lambda state: str(state["timestamp"]))
        return [(state["name"], state["message"] or "") for state in ordered]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("vanished")
    store = folder / "store"
    ours = yaml.safe_load((services.DEPLOYMENTS / "prefect.yaml").read_text())
    ours["deployments"] = [one for one in ours["deployments"] if one["entrypoint"] == "flows.train.train"]
    prefect_file = folder / "prefect.yaml"
    prefect_file.write_text(yaml.safe_dump(ours))
    console = Console(file=io.StringIO(), width=400)
    running = services.up(store, console, prefect_port=free_port(), mlflow_port=free_port(), prefect_file=prefect_file)
    try:
        with httpx.Client(base_url=f"{running.prefect_url}/api", timeout=60.0, trust_env=False) as api:
            yield World(store, running, api)
    finally:
        services.down(store, console)


def make_request(world: World, folder: Path) -> TrainRequest:
    """A training of the tiny model that takes minutes, with a checkpoint every few steps."""
    store = Store(str(world.store))
    rows = [
        Row(f"r{at}", at + 1, (Message("user", f"{'crimson' if at % 2 else 'green'} fruit {at}"),), _LABELS[1 - at % 2])
        for at in range(240)
    ]

    def write(out: Path) -> dict[str, int]:
        write_rows(out / "train.jsonl", rows)
        write_rows(out / "dev.jsonl", rows[:24])
        return {}

    def convert(out: Path) -> dict[str, int]:
        make_tiny_model(out / "model")
        return {}

    splits = store.produce("splits", 1, {}, {}, write).reference()
    base = store.produce("base_model", 1, {}, {}, convert).reference()
    return TrainRequest(
        name="vanished",
        task=TaskSpec(kind=TaskKind.CLASSIFY, instruction="Which fruit?", labels=_LABELS),
        splits=SplitsRef(**splits, train_rows=240, dev_rows=24, removed={}),
        base=BaseModelRef(**base, source="tiny"),
        recipe=TrainSpec(epochs=10, batch_size=4, lora_rank=4, learning_rate=1e-3, evaluations=2, save_every=5),
        execution=ExecutionSpec(store=str(world.store), tracking_uri=world.services.mlflow_url),
    )


def wait_until(done: Callable[[], bool], what: Callable[[], str], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, what()
        time.sleep(0.5)


def test_a_training_whose_worker_vanishes_is_crashed_and_taken_up_from_its_checkpoint(
    world: World, tmp_path: Path
) -> None:
    deployment = world.ask("GET", "/deployments/name/train/gpu")["id"]
    request = make_request(world, tmp_path).model_dump(mode="json")
    run = world.ask("POST", f"/deployments/{deployment}/create_flow_run", {"parameters": {"request": request}})["id"]

    def marks() -> list[Path]:
        return list(world.store.glob("scratch/train-*/checkpoint-*/goldgate_complete.json"))

    def state() -> str:
        return str(world.run(run)["state_name"])

    wait_until(lambda: bool(marks()), lambda: f"no checkpoint; {world.states(run)}", 150.0)
    (worker,) = [process for process in world.services.processes if process.name == "worker-gpu"]
    tree = [psutil.Process(worker.pid), *psutil.Process(worker.pid).children(recursive=True)]
    assert len(tree) >= 3  # worker, flow, training
    for process in tree:
        with suppress(psutil.NoSuchProcess):  # the training ends with the flow
            process.send_signal(signal.SIGKILL)
    vanished = time.monotonic()
    assert state() == "Running"  # nobody has said anything

    def picked_up() -> bool:
        return [name for name, _ in world.states(run)][-2:] == ["Crashed", "AwaitingRetry"]

    wait_until(picked_up, lambda: str(world.states(run)), 150.0)
    assert time.monotonic() - vanished < 150.0
    said = dict(world.states(run))
    assert said["Crashed"].startswith("No heartbeat for 90 seconds.")
    assert "picked up again" in said["AwaitingRetry"]

    environment = services.worker_environment(world.services, os.environ)
    with (tmp_path / "worker.log").open("wb") as log:
        other = subprocess.Popen(
            [sys.executable, "-m", "prefect", "worker", "start", "--pool", "gpu", "--type", "process", "--name", "two"],
            env=environment, cwd=world.store, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        wait_until(
            lambda: state() in ("Completed", "Failed"),
            lambda: f"{world.states(run)}\n{(tmp_path / 'worker.log').read_text()[-3000:]}",
            400.0,
        )
    finally:
        for process in [*psutil.Process(other.pid).children(recursive=True), psutil.Process(other.pid)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        other.wait()
    assert state() == "Completed", world.states(run)
    assert world.run(run)["run_count"] == 2
    (artefact,) = world.store.glob("train/*/manifest.json")
    facts = yaml.safe_load(artefact.read_text())["facts"]  # JSON is YAML
    assert facts["steps"] == facts["planned_steps"] == 600
    assert 5 <= facts["resumed_from_step"] < 600
