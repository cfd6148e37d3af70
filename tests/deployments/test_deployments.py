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
from prefect.utilities.schema_tools import ValidationError, validate
from prefect.utilities.templating import apply_values

from goldgate import services
from goldgate.config import load_spec
from goldgate.synthesize import load_synthesis
from tasks.contracts.monitor import DRIFTED_EVENT, MonitorSpec
from tasks.contracts.prefer import PairsRef, PreferRequest
from tasks.contracts.references import BaseModelRef, SplitsRef, TrainRequest
from tasks.contracts.serving import PROMOTED_EVENT, RolloutSpec
from tasks.contracts.spec import (
    EvaluationSpec,
    ExecutionSpec,
    PreferenceSpec,
    RetrainSpec,
    TaskKind,
    TaskSpec,
    TrainSpec,
)
from tasks.contracts.synthesis import SynthesizeSpec
from tests.report.example import example_trained

ROOT = services.PROJECT
DEPLOYMENTS: list[dict[str, Any]] = yaml.safe_load((ROOT / "deployments/prefect.yaml").read_text())["deployments"]
POOLS = yaml.safe_load((ROOT / "deployments/work_pools.yaml").read_text())
FLOW_NAMES = {
    "flows.retrain.retrain": "retrain",
    "flows.evaluate.evaluate": "evaluate",
    "flows.train.train": "train",
    "flows.synthesize.synthesize": "synthesize",
    "flows.distill.distill": "distill",
    "flows.prefer.prefer": "prefer",
    "flows.sweep.sweep": "sweep",
    "flows.rollout.rollout": "rollout",
    "flows.monitor.monitor": "monitor",
    "flows.review.review": "review",
    "flows.shadow_report.shadow_report": "shadow-report",
}


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
        "synthesize/complaints": "cpu",
        "distill/prices": "cpu",
        "prefer/prices": "cpu",
        "sweep/prices": "cpu",
        "train/gpu": "gpu",
        "rollout/promoted": "cpu",
        "monitor/complaints": "cpu",
        "review/complaints": "cpu",
        "shadow-report/complaints": "cpu",
    }


@every_deployment
def test_entrypoint_loads_a_flow_of_the_known_name(deployment: dict[str, Any]) -> None:
    assert load_flow_from_entrypoint(deployment["entrypoint"]).name == FLOW_NAMES[deployment["entrypoint"]]


@every_deployment
def test_parameters_fit_the_flow(deployment: dict[str, Any]) -> None:
    flow: Flow[..., Any] = load_flow_from_entrypoint(deployment["entrypoint"])
    parameters = parameters_of(deployment)
    if not parameters:
        # What is asked is made by the flow that waits for it, or stands in the event that starts it.
        assert full_name(deployment) in ("train/gpu", "rollout/promoted")
        return
    schema = parameter_schema(flow).model_dump_for_openapi()
    validate(parameters, schema, raise_on_error=True)  # what the server checks before a run is made
    assert flow.validate_parameters(parameters).keys() >= parameters.keys()  # what the run checks when it starts


def test_one_deployment_trains_and_tunes() -> None:
    """And tells the two requests apart by what they hold."""
    made = {"uri": "unused", "fingerprint": "f" * 64, "digest": "d" * 64}
    both: dict[str, Any] = {
        "name": "tickets",
        "task": TaskSpec(kind=TaskKind.CLASSIFY, instruction="Which team?", labels=("billing", "support")),
        "splits": SplitsRef(**made, step="curate", train_rows=1, dev_rows=1, removed={}),
        "base": BaseModelRef(**made, step="base_model", source="base"),
        "recipe": TrainSpec(),
        "execution": ExecutionSpec(),
    }
    pairs = PairsRef(**made, step="mine_pairs", asked=9, wrong=8, pairs=8)
    requests = [
        TrainRequest(**both),
        PreferRequest(**both, trained=example_trained(), pairs=pairs, preference=PreferenceSpec()),
    ]
    flow: Flow[..., Any] = load_flow_from_entrypoint("flows.train.train")
    schema = parameter_schema(flow).model_dump_for_openapi()
    for request in requests:
        parameters = {"request": request.model_dump(mode="json")}
        validate(parameters, schema, raise_on_error=True)
        assert flow.validate_parameters(parameters) == {"request": request}
    neither = requests[1].model_dump(mode="json", exclude={"pairs"})
    with pytest.raises(ValidationError, match="request"):
        validate({"request": neither}, schema, raise_on_error=True)


def test_a_promotion_carries_what_its_rollout_asks() -> None:
    """The trigger listens to the event that `retrain` emits, and its parameters fit the flow."""
    (deployment,) = [one for one in DEPLOYMENTS if full_name(one) == "rollout/promoted"]
    (trigger,) = deployment["triggers"]
    assert trigger["expect"] == [PROMOTED_EVENT]
    assert trigger["match"] == {"prefect.resource.id": "goldgate.model.*"}
    assert trigger["parameters"]["spec"]["value"]["template"] == "{{ event.payload.spec | tojson }}"
    with chdir(ROOT):
        spec = load_spec(Path("examples/complaints/complaints.yaml"))
    parameters = {"spec": RolloutSpec.of(spec).model_dump(mode="json")}
    flow: Flow[..., Any] = load_flow_from_entrypoint(deployment["entrypoint"])
    validate(parameters, parameter_schema(flow).model_dump_for_openapi(), raise_on_error=True)
    assert flow.validate_parameters(parameters)["spec"] == RolloutSpec.of(spec)


def test_drift_carries_what_its_retrain_asks() -> None:
    """The trigger listens to the event that `monitor` emits, for this task alone, and its parameters fit the flow."""
    triggers = {full_name(one): one["triggers"] for one in DEPLOYMENTS if one.get("triggers")}
    assert triggers.keys() == {"rollout/promoted", "retrain/complaints"}
    (trigger,) = triggers["retrain/complaints"]
    assert trigger["expect"] == [DRIFTED_EVENT]
    assert trigger["match"] == {"prefect.resource.id": "goldgate.model.complaints"}
    assert trigger["parameters"]["spec"]["value"]["template"] == "{{ event.payload.spec | tojson }}"
    assert trigger["parameters"]["reason"]["template"] == "{{ event.payload.reason }}"
    (watching,) = [one for one in DEPLOYMENTS if full_name(one) == "monitor/complaints"]
    spec = MonitorSpec.model_validate(parameters_of(watching)["spec"])
    assert spec.name == "complaints"
    assert spec.retrain is not None
    parameters = {"spec": spec.retrain.model_dump(mode="json"), "reason": "drift: classes (0.34, limit 0.1)"}
    validate(parameters, retrain_schema(), raise_on_error=True)
    preset = RetrainSpec.model_validate(parameters_of(DEPLOYMENTS[0])["spec"])
    assert spec.retrain == preset  # what drift starts is what the schedule starts


def retrain_schema() -> dict[str, Any]:
    return parameter_schema(load_flow_from_entrypoint("flows.retrain.retrain")).model_dump_for_openapi()


def test_a_persons_word_is_optional_and_comes_last_in_the_form() -> None:
    schema = retrain_schema()
    parameters = sorted(schema["properties"], key=lambda name: schema["properties"][name]["position"])
    assert parameters == ["spec", "override", "approval", "reason"]
    assert schema["required"] == ["spec"]
    spec = parameters_of(DEPLOYMENTS[0])["spec"]
    for people in ({}, {"override": None, "approval": None}):
        validate({"spec": spec, **people}, schema, raise_on_error=True)
    validate({"spec": spec, "override": {"by": "Ada", "reason": "hotfix, read by hand"}}, schema, raise_on_error=True)


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"override": {"by": "Ada", "reason": "so"}}, "override"),
        ({"override": {"reason": "hotfix, read by hand"}}, "override"),
        ({"approval": {"by": "Ada", "comment": "fine", "candidate": "f" * 64}}, "approval"),  # no default approves
        ({"approval": {"approve": True, "by": "", "comment": "fine", "candidate": "f" * 64}}, "approval"),
        ({"approval": {"approve": True, "by": "Ada", "comment": "fine", "candidate": "champion"}}, "approval"),
        ({"spec": {"policy": {"looks": "sometimes"}}}, "spec.policy.looks"),
        ({"spec": {"policy": {"guards": [{"metric": "exact_match", "margin": 2.0}]}}}, "spec.policy.guards"),
        ({"spec": {"policy": {"approval_hours": 0}}}, "spec.policy.approval_hours"),
        ({"spec": {"suites": [{"name": "Old", "path": "old"}]}}, "spec.suites[0].name"),
    ],
    ids=str,
)
def test_what_the_server_refuses_before_a_run_is_made(changed: dict[str, Any], field: str) -> None:
    preset = parameters_of(DEPLOYMENTS[0])["spec"]
    parameters = {"spec": preset} | changed
    parameters["spec"] = preset | changed.get("spec", {})
    with pytest.raises(ValidationError, match=re.escape(field)):
        validate(parameters, retrain_schema(), raise_on_error=True)


def test_every_field_of_the_form_says_what_it_is() -> None:
    schema = retrain_schema()
    for name, parameter in schema["properties"].items():
        assert parameter.get("description"), name
    for title, record in schema["definitions"].items():
        for name, field in record.get("properties", {}).items():
            described = schema["definitions"].get(field.get("$ref", "").removeprefix("#/definitions/"), field)
            assert described.get("description"), f"{title}.{name}"
            assert "position" in field, f"{title}.{name}"


def test_an_evaluation_withholds_scores_where_the_policy_is_a_ladder(tmp_path: Path) -> None:
    from goldgate.presets import load

    example = ROOT / "examples/complaints/complaints.yaml"
    assert load(str(example))["evaluation"]["withhold_scores"] is False
    config = yaml.safe_load(example.read_text()) | {"policy": {"looks": "ladder"}}
    (tmp_path / "ladder.yaml").write_text(yaml.safe_dump(config))
    assert load(str(tmp_path / "ladder.yaml"))["evaluation"]["withhold_scores"] is True


JUDGED = [one for one in DEPLOYMENTS if one["entrypoint"] in ("flows.retrain.retrain", "flows.evaluate.evaluate")]


@pytest.mark.parametrize("deployment", JUDGED, ids=full_name)
def test_preset_is_the_example(deployment: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOLDGATE_STORE", str(tmp_path))
    name = deployment["name"]
    kind = RetrainSpec if deployment["entrypoint"] == "flows.retrain.retrain" else EvaluationSpec
    spec = kind.model_validate(parameters_of(deployment)["spec"])
    example = load_spec(ROOT / "examples" / name / f"{name}.yaml")

    expected = example if kind is RetrainSpec else example.evaluation()
    for field in kind.model_fields.keys() - {"execution"}:
        assert getattr(spec, field) == getattr(expected, field), field
    assert Path(spec.golden.path) == ROOT / "examples" / name / "golden"
    assert spec.execution.store == str(tmp_path)
    assert spec.execution.tracking_uri is None  # the worker's own
    if isinstance(spec, RetrainSpec):
        assert Path(spec.data.source) == ROOT / "examples" / name / f"{name}.jsonl"
        assert spec.execution.train_deployment == "train/gpu"


def test_the_preset_of_synthesis_is_its_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOLDGATE_STORE", str(tmp_path))
    (deployment,) = [one for one in DEPLOYMENTS if "synthesize" in one["entrypoint"]]
    spec = SynthesizeSpec.model_validate(parameters_of(deployment)["spec"])
    assert spec == load_synthesis(ROOT / "examples/complaints/synthesize.yaml")
    assert Path(spec.data.source) == ROOT / "examples/complaints/complaints.jsonl"
    assert spec.execution.store == str(tmp_path)
    assert deployment["concurrency_limit"] == {"limit": 1, "collision_strategy": "ENQUEUE"}


@pytest.mark.parametrize(
    ("flow", "spec"),
    [
        ("synthesize.synthesize", "SynthesizeSpec"),
        ("monitor.monitor", "MonitorSpec"),
        ("review.review", "ReviewSpec"),
        ("shadow_report.shadow_report", "ShadowReportSpec"),
    ],
)
def test_every_field_of_the_form_of_another_flow_says_what_it_is(flow: str, spec: str) -> None:
    schema = parameter_schema(load_flow_from_entrypoint(f"flows.{flow}")).model_dump_for_openapi()
    assert spec in schema["definitions"]
    for title, record in schema["definitions"].items():
        for name, field in record.get("properties", {}).items():
            described = schema["definitions"].get(field.get("$ref", "").removeprefix("#/definitions/"), field)
            assert described.get("description"), f"{title}.{name}"
            assert "position" in field, f"{title}.{name}"


def test_evaluate_presets_score_the_champion() -> None:
    models = {one["name"]: one["parameters"]["model"] for one in DEPLOYMENTS if "evaluate" in one["entrypoint"]}
    assert models == {"complaints": "models:/complaints@champion", "prices": "models:/prices@champion"}


def test_complaints_are_retrained_weekly_and_one_at_a_time() -> None:
    scheduled = {full_name(one): one["schedules"] for one in DEPLOYMENTS if one["schedules"]}
    assert scheduled.keys() == {"retrain/complaints", "monitor/complaints", "review/complaints"}
    (weekly,) = scheduled["retrain/complaints"]
    for name in ("monitor/complaints", "review/complaints"):
        (looks,) = scheduled[name]
        assert looks["active"] is False  # there is nothing to look at without a gateway
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
    assert [one["actions"][0]["state"] for one in automations] == ["CRASHED", "CRASHED", "SCHEDULED"]
    assert automations[2]["trigger"]["match"]["prefect.run-count"] == ["1", "2"]
    assert len({automation["name"] for automation in automations}) == len(automations) == 3
    environment = services.worker_environment(
        services.Services(store="/s", prefect_url="http://p", mlflow_url="http://m"), {}
    )
    assert automations[0]["trigger"]["within"] == 3 * int(environment["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"])


def test_nothing_names_this_machine() -> None:
    for file in (ROOT / "deployments").glob("*.yaml"):
        assert not re.search(r"(?:[\s\"':]|file:/)/(?:home|root|work|tmp|Users)\b", file.read_text()), file
