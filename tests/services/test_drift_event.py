"""Drift in a request log starts a retrain through real servers and a worker, once."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import yaml
from rich.console import Console

from goldgate import services
from goldgate.monitor import load_monitor
from tasks.contracts.spec import RetrainSpec
from tests.services.test_vanished_worker import free_port
from tests.serving.requests_made import last_day, steady, write_log

pytestmark = [pytest.mark.services, pytest.mark.timeout(600)]

_RUN_SECONDS = 180.0
_QUIET_SECONDS = 15.0  # an event's run comes within five
_FLOWS = ("flows.retrain.retrain", "flows.monitor.monitor")


class World(NamedTuple):
    """Servers and a worker, a log with drift in it, and the configuration of the look at it."""

    api: httpx.Client
    store: Path
    config: Path

    def ask(self, method: str, path: str, record: Any = None) -> Any:
        for _ in range(20):
            answer = self.api.request(method, path, json=record)
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:  # SQLite is busy
                return answer.raise_for_status().json() if answer.content else None
            time.sleep(1.0)
        raise AssertionError(answer.text)

    def runs(self, deployment: str) -> list[dict[str, Any]]:
        """Runs that were started, not those that a schedule has laid out; oldest first."""
        known = self.ask("GET", f"/deployments/name/{deployment}")["id"]
        asked = {"deployments": {"id": {"any_": [known]}}, "sort": "EXPECTED_START_TIME_ASC"}
        return [run for run in self.ask("POST", "/flow_runs/filter", asked) if not run["auto_scheduled"]]

    def ended(self, deployment: str, count: int) -> list[dict[str, Any]]:
        """So many runs, once all have ended."""
        until = time.monotonic() + _RUN_SECONDS
        while True:
            runs = self.runs(deployment)
            if len(runs) >= count and all(run["end_time"] for run in runs):
                return runs
            assert time.monotonic() < until, [(run["name"], run["state_name"]) for run in runs]
            time.sleep(1.0)

    def start_look(self) -> None:
        """As the schedule does, with a configuration of its own."""
        deployment = self.ask("GET", "/deployments/name/monitor/complaints")
        parameters = {"spec": load_monitor(self.config).model_dump(mode="json")}
        self.ask("POST", f"/deployments/{deployment['id']}/create_flow_run", {"parameters": parameters})

    def look_by_hand(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "goldgate", "monitor", str(self.config)], cwd=services.PROJECT, text=True,
            env=os.environ | {"COLUMNS": "200", "GOLDGATE_STORE": str(self.store)}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("drift")
    store = root / "store"
    now = datetime.now(UTC)
    write_log(store / "serving" / "request_log", steady(now), last_day(now, drifted=True))
    # The training is refused at its first step, for want of a golden set: that it was asked for is what counts here.
    training = {
        "name": "complaints", "data": {"source": "rows.jsonl"}, "golden": {"path": "golden"}, "base_model": "base",
        "task": {"kind": "classify", "instruction": "Which?", "labels": ["card", "loan", "money_transfer"]},
        "execution": {"store": str(store)},
    }  # fmt: skip
    (root / "complaints.yaml").write_text(yaml.safe_dump(training))
    (root / "monitor.yaml").write_text(yaml.safe_dump({"training_from": "complaints.yaml"}))
    ours = yaml.safe_load((services.DEPLOYMENTS / "prefect.yaml").read_text())
    ours["deployments"] = [
        one for one in ours["deployments"] if one["name"] == "complaints" and one["entrypoint"] in _FLOWS
    ]
    assert len(ours["deployments"]) == 2
    (root / "prefect.yaml").write_text(yaml.safe_dump(ours))
    console = Console(file=io.StringIO(), width=400)
    with pytest.MonkeyPatch.context() as patched:
        for variable in ("MLFLOW_TRACKING_URI", "GOLDGATE_LOG_DB", "GOLDGATE_STORE", "PREFECT_API_URL", "PREFECT_HOME"):
            patched.delenv(variable, raising=False)
        running = services.up(
            store, console, prefect_port=free_port(), mlflow_port=free_port(), prefect_file=root / "prefect.yaml"
        )
        try:
            with httpx.Client(base_url=f"{running.prefect_url}/api", timeout=60.0, trust_env=False) as client:
                yield World(client, store, root / "monitor.yaml")
        finally:
            services.down(store, console)


def test_drift_starts_a_retrain_with_its_reason(world: World) -> None:
    world.start_look()
    (look,) = world.ended("monitor/complaints", 1)
    assert look["state_name"] == "Drifted, retrain started"
    (retrain,) = world.ended("retrain/complaints", 1)
    assert retrain["name"].startswith("retrain complaints (drift: classes (")
    assert retrain["name"] == f"retrain complaints ({retrain['parameters']['reason']})"
    assert RetrainSpec.model_validate(retrain["parameters"]["spec"]) == load_monitor(world.config).retrain
    assert (retrain["state_type"], retrain["created_by"]["type"]) == ("FAILED", "AUTOMATION")
    assert "golden" in retrain["state"]["message"]
    page = world.ask("GET", "/artifacts/complaints-monitor/latest")["data"]
    deployment = world.ask("GET", "/deployments/name/retrain/complaints")["id"]
    assert f"[Runs of retrain/complaints](/v2/deployments/deployment/{deployment})" in page


def test_a_second_look_starts_none(world: World) -> None:
    world.start_look()
    looks = world.ended("monitor/complaints", 2)
    assert [look["state_name"] for look in looks] == ["Drifted, retrain started", "Drifted, too soon"]
    time.sleep(_QUIET_SECONDS)
    assert len(world.runs("retrain/complaints")) == 1


def test_of_two_looks_at_once_one_starts_a_retrain(world: World) -> None:
    world.ask("DELETE", "/variables/name/goldgate-drift-complaints-1")  # as if none had been started yet
    looks = [world.look_by_hand() for _ in range(2)]
    said = [look.communicate(timeout=_RUN_SECONDS)[0] for look in looks]
    assert [look.returncode for look in looks] == [3, 3], said
    assert sorted("A retrain was started." in text for text in said) == [False, True], said
    assert sum("No retrain was started." in text for text in said) == 1
    world.ended("retrain/complaints", 2)
    time.sleep(_QUIET_SECONDS)
    retrains = world.runs("retrain/complaints")
    assert len(retrains) == 2
    assert retrains[1]["parameters"]["spec"]["execution"]["train_deployment"] == "train/gpu"
    kept = json.loads(world.ask("GET", "/variables/name/goldgate-drift-complaints-1")["value"])
    assert kept["reason"] == retrains[1]["parameters"]["reason"]
