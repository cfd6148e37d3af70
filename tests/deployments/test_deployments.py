"""Every deployment of prefect.yaml loads, its parameters fit its flow, and its parts fit each other."""

from __future__ import annotations

import re
from contextlib import chdir
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import yaml
from prefect.client.schemas.schedules import CronSchedule
from prefect.events.schemas.automations import AutomationCore
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.utilities.callables import parameter_schema
from prefect.utilities.importtools import import_object
from prefect.utilities.schema_tools import validate
from prefect.utilities.templating import apply_values

from goldgate import services
from goldgate.config import load_spec
from tasks.contracts.spec import EvaluationSpec, RetrainSpec

ROOT = services.PROJECT
DEPLOYMENTS: list[dict[str, Any]] = yaml.safe_load((ROOT / "deployments/prefect.yaml").read_text())["deployments"]
POOLS = yaml.safe_load((ROOT / "deployments/work_pools.yaml").read_text())
FLOW_NAMES = {"flows.retrain.retrain": "retrain", "flows.evaluate.evaluate": "evaluate", "flows.train.train": "train"}


def full_name(deployment: dict[str, Any]) -> str:
    return f"{FLOW_NAMES[deployment['entrypoint']]}/{deployment['name']}"


every_deployment = pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=full_name)


def parameters_of(deployment: dict[str, Any]) -> dict[str, Any]:
    """The parameters as `prefect deploy`, started in the project's folder, makes them: by its build steps."""
    outputs: dict[str, Any] = {}
    with chdir(ROOT):
        for step in deployment.get("build", []):
            ((function, inputs),) = step.items()
            arguments = {name: value for name, value in inputs.items() if name != "id"}
            outputs[inputs["id"]] = import_object(function)(**arguments)
    found = apply_values(deployment.get("parameters", {}), outputs)
    assert isinstance(found, dict)
    return found


def test_all_deployments_are_there() -> None:
    assert {full_name(deployment): deployment["work_pool"]["name"] for deployment in DEPLOYMENTS} == {
        "retrain/complaints": "cpu",
        "retrain/prices": "cpu",
        "evaluate/complaints": "cpu",
        "evaluate/prices": "cpu",
        "train/gpu": "gpu",
    }


@every_deployment
def test_entrypoint_loads_a_flow_of_the_known_name(deployment: dict[str, Any]) -> None:
    assert load_flow_from_entrypoint(deployment["entrypoint"]).name == FLOW_NAMES[deployment["entrypoint"]]


@every_deployment
def test_parameters_fit_the_flow(deployment: dict[str, Any]) -> None:
    flow: Flow[..., Any] = load_flow_from_entrypoint(deployment["entrypoint"])
    parameters = parameters_of(deployment)
    if not parameters:
        assert full_name(deployment) == "train/gpu"  # its request is made by `retrain`
        return
    schema = parameter_schema(flow).model_dump_for_openapi()
    validate(parameters, schema, raise_on_error=True)  # what the server checks before a run is made
    assert flow.validate_parameters(parameters).keys() >= parameters.keys()  # what the run checks when it starts


@pytest.mark.parametrize("deployment", [one for one in DEPLOYMENTS if one.get("parameters")], ids=full_name)
def test_preset_is_the_example(deployment: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOLDGATE_STORE", str(tmp_path))
    name = deployment["name"]
    kind = RetrainSpec if deployment["entrypoint"] == "flows.retrain.retrain" else EvaluationSpec
    spec = kind.model_validate(parameters_of(deployment)["spec"])
    example = load_spec(ROOT / "examples" / name / f"{name}.yaml")

    for field in kind.model_fields.keys() - {"execution"}:
        assert getattr(spec, field) == getattr(example, field), field
    assert Path(spec.golden.path) == ROOT / "examples" / name / "golden"
    assert spec.execution.store == str(tmp_path)
    assert spec.execution.tracking_uri is None  # the worker's own
    if isinstance(spec, RetrainSpec):
        assert Path(spec.data.source) == ROOT / "examples" / name / f"{name}.jsonl"
        assert spec.execution.train_deployment == "train/gpu"


def test_evaluate_presets_score_the_champion() -> None:
    models = {one["name"]: one["parameters"]["model"] for one in DEPLOYMENTS if "evaluate" in one["entrypoint"]}
    assert models == {"complaints": "models:/complaints@champion", "prices": "models:/prices@champion"}


def test_complaints_are_retrained_weekly_and_one_at_a_time() -> None:
    scheduled = {full_name(one): one["schedules"] for one in DEPLOYMENTS if one["schedules"]}
    assert scheduled.keys() == {"retrain/complaints"}
    (weekly,) = scheduled["retrain/complaints"]
    assert CronSchedule(cron=weekly["cron"], timezone=weekly["timezone"]).cron.split()[-1] == "1"
    assert ZoneInfo(weekly["timezone"])
    limits = {full_name(one): one.get("concurrency_limit") for one in DEPLOYMENTS}
    alone = {"limit": 1, "collision_strategy": "ENQUEUE"}
    assert limits["retrain/complaints"] == limits["retrain/prices"] == alone


def test_pools() -> None:
    assert {name: (pool["type"], pool["concurrency_limit"]) for name, pool in POOLS.items()} == {
        "cpu": ("process", 2),
        "gpu": ("process", 1),
    }


def test_vanished_workers_are_noticed_in_our_pools_alone() -> None:
    automations = yaml.safe_load((ROOT / "deployments/automations.yaml").read_text())["automations"]
    for automation in automations:
        AutomationCore.model_validate(automation)
        related = automation["trigger"]["match_related"]
        assert related == {"prefect.resource.role": "work-pool", "prefect.resource.name": list(POOLS)}
        assert automation["actions"][0]["state"] == "CRASHED"
    assert len({automation["name"] for automation in automations}) == len(automations) == 2
    environment = services.worker_environment(
        services.Services(store="/s", prefect_url="http://p", mlflow_url="http://m"), {}
    )
    assert automations[0]["trigger"]["within"] == 3 * int(environment["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"])


def test_nothing_names_this_machine() -> None:
    for file in (ROOT / "deployments").glob("*.yaml"):
        assert not re.search(r"(?:[\s\"':]|file:/)/(?:home|root|work|tmp|Users)\b", file.read_text()), file
