"""Real servers: a Prefect server, MLflow and both workers, a toy preset, and runs started as people start them.

The tests share one `up` and go from top to bottom; the last one takes it down.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from rich.console import Console

from goldgate import services
from goldgate.config import load_spec
from tasks.contracts.errors import ServiceError
from tasks.contracts.spec import ExecutionSpec
from tests.tiny import make_tiny_model
from tests.toys import LABELS, toy_rows, vocabulary, write_jsonl

pytestmark = [pytest.mark.services, pytest.mark.timeout(600)]

VERDICTS = {"Promoted", "Rejected", "Inconclusive"}
CHROMIUM = shutil.which("chromium")
_RUN_SECONDS = 240.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(done: Callable[[], bool], what: str, seconds: float = _RUN_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(1.0)


@dataclass(frozen=True)
class World:
    """The servers that are up, and a client of Prefect's API."""

    store: Path
    services: services.Services
    said: str
    api: httpx.Client

    def ask(self, method: str, path: str, record: Any = None) -> httpx.Response:
        """An answer; asked again while SQLite is busy, as every client of Prefect does."""
        for _ in range(10):
            answer = self.api.request(method, path, json=record)
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                return answer
            time.sleep(1.0)
        raise AssertionError(f"{method} {path}: {answer.text}")

    def deployment(self, name: str) -> dict[str, Any]:
        return self.ask("GET", f"/deployments/name/{name}").raise_for_status().json()  # type: ignore[no-any-return]

    def start(self, name: str, parameters: dict[str, Any] | None = None) -> str:
        record = {} if parameters is None else {"parameters": parameters}
        answer = self.ask("POST", f"/deployments/{self.deployment(name)['id']}/create_flow_run", record)
        assert answer.status_code == httpx.codes.CREATED, answer.text
        return str(answer.json()["id"])

    def runs(self, name: str | None = None) -> list[dict[str, Any]]:
        """Runs that somebody started (not those the schedule has laid out), oldest first."""
        query = {} if name is None else {"deployments": {"id": {"any_": [self.deployment(name)["id"]]}}}
        found = self.ask("POST", "/flow_runs/filter", {**query, "sort": "EXPECTED_START_TIME_ASC"}).raise_for_status()
        return [run for run in found.json() if not run["auto_scheduled"]]

    def run(self, run: str) -> dict[str, Any]:
        return self.ask("GET", f"/flow_runs/{run}").raise_for_status().json()  # type: ignore[no-any-return]

    def ended(self, run: str) -> dict[str, Any]:
        """The run when it has ended, however it did."""
        wait_until(lambda: self.run(run)["end_time"] is not None, f"run {run} ends")
        return self.run(run)

    def logs(self, run: str) -> str:
        found = self.ask("POST", "/logs/filter", {"logs": {"flow_run_id": {"any_": [run]}}}).raise_for_status().json()
        return "\n".join(line["message"] for line in found)


def toy_project(folder: Path) -> Path:
    """A toy example with data, golden set and tiny base model, and a prefect.yaml with our deployments of it."""
    from tasks.data.golden import freeze

    make_tiny_model(folder / "base", vocabulary())
    write_jsonl(folder / "rows.jsonl", toy_rows(400, seed=1))
    config = folder / "tickets.yaml"
    reason = "a toy task with a model of two layers"
    example = {
        "name": "tickets",
        "task": {"kind": "classify", "instruction": "Which team?", "labels": list(LABELS)},
        "data": {"source": "rows.jsonl"},
        "golden": {"path": "golden", "items": 80},
        "base_model": "base",
        "curate": {"accept_risks": {"few_rows": reason, "learning_rate": reason}},
        "train": {"epochs": 2, "learning_rate": 5e-3, "batch_size": 16, "max_tokens": 128, "evaluations": 2},
        "evaluate": {"max_new_tokens": 8, "batch_size": 40, "baseline_shots": 2, "baseline_dev_items": 20},
    }
    config.write_text(yaml.safe_dump(example))
    freeze(load_spec(config, [f"execution.store={folder / 'store'}"]))
    synthesis = folder / "synthesize.yaml"
    teacher = {"url": "http://127.0.0.1:9/v1", "model": "nobody"}  # deployed, and not started here
    synthesis.write_text(yaml.safe_dump({"task_from": config.name, "teacher": teacher, "fill_classes_to": 10}))
    distillation = folder / "distill.yaml"
    asked = {"training_from": config.name, "teacher": teacher, "instruction": "Name the team.", "relabel": True}
    distillation.write_text(yaml.safe_dump(asked))
    sweep = folder / "sweep.yaml"
    sweep.write_text(yaml.safe_dump({"training_from": config.name, "trials": 2, "space": {"lora_rank": [4, 8]}}))
    monitoring = folder / "monitor.yaml"
    monitoring.write_text(yaml.safe_dump({"training_from": config.name}))
    reviewing = folder / "review.yaml"
    files = {"rows": "reviews/rows.jsonl", "golden_candidates": "reviews/golden_candidates.jsonl"}
    reviewing.write_text(yaml.safe_dump({"task_from": config.name, **files}))
    configs = {
        "goldgate.presets.load": config,
        "goldgate.synthesize.load_preset": synthesis,
        "goldgate.distill.load_preset": distillation,
        "goldgate.sweep.load_preset": sweep,
        "goldgate.monitor.load_preset": monitoring,
        "goldgate.review.load_preset": reviewing,
    }

    ours = yaml.safe_load((services.DEPLOYMENTS / "prefect.yaml").read_text())
    for deployment in ours["deployments"]:
        for step in deployment.get("build", []):
            ((loader, arguments),) = step.items()
            arguments["config"] = str(configs[loader])
    path = folder / "prefect.yaml"
    path.write_text(yaml.safe_dump(ours))
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("services")
    console = Console(file=io.StringIO(), width=400)
    store = folder / "store"
    prefect_file = toy_project(folder)
    running = services.up(store, console, prefect_port=free_port(), mlflow_port=free_port(), prefect_file=prefect_file)
    try:
        with httpx.Client(base_url=f"{running.prefect_url}/api", timeout=60.0, trust_env=False) as api:
            assert isinstance(console.file, io.StringIO)
            yield World(store, running, console.file.getvalue(), api)
    finally:
        services.down(store, console)


def test_up_says_where_everything_is(world: World) -> None:
    deployment = world.deployment("retrain/complaints")["id"]
    for page in (
        world.services.prefect_url,
        world.services.mlflow_url,
        f"{world.services.prefect_url}/v2/deployments/deployment/{deployment}/run",
    ):
        assert page in world.said
        answer = httpx.get(page, follow_redirects=True, trust_env=False, timeout=60.0, headers={"accept": "text/html"})
        assert answer.is_success, page
        assert "<html" in answer.text.lower()
    assert {process.name for process in world.services.processes} == {"prefect", "mlflow", "worker-cpu", "worker-gpu"}
    assert json.loads((world.store / "services.json").read_text())["prefect_url"] == world.services.prefect_url


def test_a_second_up_starts_nothing(world: World) -> None:
    console = Console(file=io.StringIO(), width=400)
    assert services.up(world.store, console) == world.services
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().startswith("Already up.")


def test_deploying_again_changes_nothing(world: World) -> None:
    def everything() -> tuple[set[str], ...]:
        return (
            {one["id"] for one in world.ask("POST", "/deployments/filter", {}).json()},
            {one["id"] for one in world.ask("POST", "/work_pools/filter", {}).json()},
            # By name: Prefect makes those of deployments' triggers anew.
            {one["name"] for one in world.ask("POST", "/automations/filter", {}).json()},
            {one["id"] for one in world.deployment("retrain/complaints")["schedules"]},
        )

    before = everything()
    assert [len(part) for part in before] == [13, 2, 5, 1]
    environment = services.worker_environment(world.services, os.environ)
    prefect_file = world.store.parent / "prefect.yaml"
    services.deploy(world.services.prefect_url, environment, prefect_file, world.store / "logs" / "again.log")
    assert everything() == before


def test_requests_at_the_same_time_are_all_answered(world: World) -> None:
    deployment = world.deployment("retrain/prices")["id"]
    later = {"state": {"type": "SCHEDULED", "state_details": {"scheduled_time": "2100-01-01T00:00:00Z"}}}

    def make() -> httpx.Response:
        return world.api.post(f"/deployments/{deployment}/create_flow_run", json=later)

    with ThreadPoolExecutor(8) as clients:
        answers = [client.result() for client in [clients.submit(make) for _ in range(48)]]
    try:
        assert {answer.status_code for answer in answers} == {httpx.codes.CREATED}
    finally:
        for answer in answers:
            if answer.is_success:
                world.ask("DELETE", f"/flow_runs/{answer.json()['id']}").raise_for_status()


@pytest.mark.parametrize(
    ("group", "field", "value", "said"),
    [
        ("train", "epochs", -1, "spec.train.epochs"),
        ("policy", "looks", "sometimes", "spec.policy.looks"),
        ("data", "colour", "red", "colour"),
    ],
)
def test_a_bad_parameter_is_refused_before_anything_starts(
    world: World, group: str, field: str, value: object, said: str
) -> None:
    deployment = world.deployment("retrain/complaints")
    spec = deployment["parameters"]["spec"]
    spec[group] = {**spec[group], field: value}

    answer = world.ask("POST", f"/deployments/{deployment['id']}/create_flow_run", {"parameters": {"spec": spec}})

    assert answer.status_code == httpx.codes.CONFLICT
    assert said in answer.json()["detail"]
    assert world.runs() == []


def test_runs_started_by_api_and_by_curl_take_turns_and_end_in_a_verdict(world: World) -> None:
    curl = next(line for line in world.said.splitlines() if "curl" in line)
    first = world.start("retrain/complaints")
    by_curl = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, check=True)
    second = json.loads(by_curl.stdout)["id"]

    one, two = world.ended(first), world.ended(second)

    assert (one["state_type"], two["state_type"]) == ("COMPLETED", "COMPLETED"), world.logs(first) + world.logs(second)
    assert one["state_name"] in VERDICTS
    assert two["state_name"] in VERDICTS
    assert one["work_pool_name"] == "cpu"
    turns = sorted([one, two], key=lambda run: str(run["start_time"]))
    assert datetime.fromisoformat(turns[0]["end_time"]) <= datetime.fromisoformat(turns[1]["start_time"])

    trainings = world.runs("train/gpu")
    assert trainings
    assert {run["work_pool_name"] for run in trainings} == {"gpu"}
    assert {run["state_type"] for run in trainings} == {"COMPLETED"}
    assert trainings[0]["parent_task_run_id"] is not None
    verdicts = [json.loads(path.read_text()) for path in (world.store / "runs").rglob("verdict.json")]
    assert verdicts
    assert {verdict["verdict"] for verdict in verdicts} <= {"promote", "reject", "inconclusive"}


def test_the_run_page_shows_progress_verdict_and_links(world: World) -> None:
    run = world.runs("retrain/complaints")[0]["id"]
    query = {"artifacts": {"flow_run_id": {"any_": [run]}}}
    artifacts = world.ask("POST", "/artifacts/filter", query).raise_for_status().json()
    kinds = {artifact["type"] for artifact in artifacts}
    assert kinds & {"markdown", "table"}, artifacts
    text = "\n".join(str(artifact["data"]) + str(artifact["description"]) for artifact in artifacts)
    assert world.services.mlflow_url in text
    assert "report.html" in text


def test_a_file_based_run_and_the_server_see_the_same_experiments(world: World) -> None:
    from tasks.tracking import open_run

    execution = ExecutionSpec(store=str(world.store), tracking_uri=f"sqlite:///{world.store}/mlflow.db")
    note = world.store.parent / "note.txt"
    note.write_text("by file")
    with open_run(execution, "by-file", "a run without server", key="k", tags={}, params={"lr": 1}) as run:
        run.log_artifact(note)
    experiments = _mlflow(world, "experiments/search", {"max_results": 100})["experiments"]
    assert {"by-file", "tickets"} <= {experiment["name"] for experiment in experiments}
    listed = httpx.get(
        f"{world.services.mlflow_url}/api/2.0/mlflow/artifacts/list",
        params={"run_id": run.id},
        trust_env=False,
        timeout=60.0,
    ).json()
    assert [file["path"] for file in listed["files"]] == ["note.txt"]

    # The other way round: what a worker logged through the server opens without it.
    with open_run(execution, "tickets", "a run without server", key="k", tags={}, params={"lr": 1}) as run:
        run.log_artifact(note)


# -- a run that asks a person ---------------------------------------------------------------------------------------


def asking(world: World, name: str, hours: float) -> dict[str, Any]:
    """Parameters of a run whose candidate is better, and whose policy asks a person; with a ledger of its own."""
    spec = world.deployment("retrain/complaints")["parameters"]["spec"]
    spec |= {
        "name": name,
        "policy": {**spec["policy"], "approval_hours": hours},
        "train": {**spec["train"], "epochs": 6},
        "execution": {**spec["execution"], "ledger": str(world.store.parent / f"{name}.db")},
    }
    return {"spec": spec}


def suspended(world: World, run: str) -> dict[str, Any]:
    """The run once it waits for an answer."""

    def waits() -> bool:
        now = world.run(run)
        assert now["end_time"] is None, f"{now['state_name']}: {world.logs(run)}"
        return str(now["state_name"]) == "Suspended"

    wait_until(waits, f"run {run} asks")
    return world.run(run)


def resume(world: World, run: str, **answer: Any) -> dict[str, Any]:
    found = world.ask("POST", f"/flow_runs/{run}/resume", {"run_input": answer}).raise_for_status().json()
    assert isinstance(found, dict)
    return found


def champion(world: World, name: str) -> str | None:
    """The version that is champion; None if there is no such model."""
    from tasks.registry.versions import status

    found = status(name, ExecutionSpec(store=str(world.store), tracking_uri=world.services.mlflow_url)).champion
    return found.version if found else None


@pytest.fixture(scope="module")
def waiting(world: World) -> dict[str, Any]:
    """A run that waits for a person, while other tests go on."""
    return suspended(world, world.start("retrain/complaints", asking(world, "approving", 1.0)))


WHOLE = {"decision": "approve", "by": "Grace Hopper", "comment": "read the lost items"}


def test_a_run_suspends_and_asks_with_a_typed_form(world: World, waiting: dict[str, Any]) -> None:
    details = waiting["state"]["state_details"]
    expires = datetime.fromisoformat(details["pause_timeout"]) - datetime.fromisoformat(waiting["state"]["timestamp"])
    assert 3590 < expires.total_seconds() < 3610

    keys = details["run_input_keyset"]
    form = world.ask("GET", f"/flow_runs/{waiting['id']}/input/{keys['schema']}").raise_for_status().json()
    assert form["required"] == ["decision", "by", "comment"]
    decision = form["properties"]["decision"]
    assert decision["enum"] == ["approve", "decline"]
    assert "default" not in decision, "an empty form would approve"
    assert [form["properties"][name]["type"] for name in ("by", "comment")] == ["string", "string"]
    asked = world.ask("GET", f"/flow_runs/{waiting['id']}/input/{keys['description']}").raise_for_status().json()
    for said in ("Promote candidate", "The gate says PROMOTE", "No answer in time means no promotion."):
        assert said in asked

    for bad in ({}, {"decision": "approve"}, WHOLE | {"decision": "perhaps"}, WHOLE | {"by": ""}):
        assert resume(world, waiting["id"], **bad)["status"] == "REJECT", bad
    assert world.run(waiting["id"])["state_name"] == "Suspended"
    assert champion(world, "approving") is None


def test_preferences_are_tuned_on_the_pool_with_the_gpu(world: World) -> None:
    spec = world.deployment("prefer/prices")["parameters"]["spec"]
    reason = "a toy task with a model of two layers"
    risks = dict.fromkeys(("few_rows", "learning_rate", "self_check", "unseen_answer"), reason)
    spec |= {
        "name": "tuning",
        "curate": {**spec["curate"], "dev_share": 0.3, "accept_risks": risks},
        # So short that the model gets plenty of dev wrong.
        "train": {**spec["train"], "epochs": 1, "learning_rate": 1e-4, "evaluations": 1},
        "preference": {"mine_share": 0.5, "min_pairs": 5, "epochs": 1},
    }
    before = {run["id"] for run in world.runs("train/gpu")}
    run = world.ended(world.start("prefer/prices", {"spec": spec}))
    assert run["state_type"] == "COMPLETED", world.logs(run["id"])
    assert run["work_pool_name"] == "cpu"
    made = [one for one in world.runs("train/gpu") if one["id"] not in before]
    assert [one["name"] for one in made] == ["train tuning", "tune tuning"]
    assert {(one["work_pool_name"], one["state_type"]) for one in made} == {("gpu", "COMPLETED")}


def test_a_person_declines_while_another_run_waits(world: World, waiting: dict[str, Any]) -> None:
    # One run of a deployment at a time, and one that waits for a person is none.
    trainings = {run["id"] for run in world.runs("train/gpu")}
    run = world.start("retrain/complaints", asking(world, "declining", 1.0))
    suspended(world, run)
    assert world.run(waiting["id"])["state_name"] == "Suspended"
    assert resume(world, run, **WHOLE | {"decision": "decline"})["status"] == "ACCEPT"
    ended = world.ended(run)

    assert ended["state_name"] == "Declined", world.logs(run)
    assert "Declined by Grace Hopper" in ended["state"]["message"]
    assert champion(world, "declining") is None
    assert {run["id"] for run in world.runs("train/gpu")} == trainings, "what is trained needs no worker"
    assert_one_look_and_one_answer(world, "declining", "declined")


def test_no_answer_in_time_means_no_promotion(world: World) -> None:
    run = world.start("retrain/complaints", asking(world, "unanswered", 0.002))
    ended = world.ended(run)
    assert ended["state_type"] == "FAILED"
    assert "never resumed" in ended["state"]["message"]
    late = resume(world, run, **WHOLE)
    assert late["status"] != "ACCEPT"
    assert world.run(run)["state_type"] == "FAILED"
    assert champion(world, "unanswered") is None


def test_a_person_approves_and_nothing_is_done_twice(world: World, waiting: dict[str, Any]) -> None:
    run, since = waiting["id"], datetime.fromisoformat(waiting["state"]["timestamp"])
    # The automation that crashes runs without a heartbeat acts after 90 s; a run that waits for a person sends none.
    wait_until(lambda: (datetime.now(UTC) - since).total_seconds() > 110, "it has waited for long")
    assert world.run(run)["state_name"] == "Suspended"
    trainings = {run["id"] for run in world.runs("train/gpu")}
    assert resume(world, run, **WHOLE)["status"] == "ACCEPT"
    ended = world.ended(run)

    assert ended["state_name"] == "Promoted", world.logs(run)
    assert "Approved by Grace Hopper" in ended["state"]["message"]
    assert champion(world, "approving") == "1"
    assert {run["id"] for run in world.runs("train/gpu")} == trainings, "what is trained is not trained again"

    def not_said_to_be_reused() -> list[str]:
        _, _, again = world.logs(run).partition("Suspending flow run")
        steps = ("ingest", "curate", "train", "ask base model", "ask candidate")
        return [step for step in steps if not re.search(rf"^{step}: .*\(reused\)$", again, re.MULTILINE)]

    for _ in range(30):  # logs come in batches, a while after what they tell of
        if not not_said_to_be_reused():
            break
        time.sleep(1.0)
    assert not_said_to_be_reused() == [], world.logs(run)
    assert_one_look_and_one_answer(world, "approving", "approved")


def assert_one_look_and_one_answer(world: World, name: str, kind: str) -> None:
    from tasks.gate.ledger import Ledger

    with Ledger.open(str(world.store.parent / f"{name}.db"), create=False) as ledger:
        (page,) = ledger.pages()
        (look,) = ledger.looks(page.page)
        assert look.repeats == ()
        assert "flow run retrain" in look.asked_by
        (decision,) = ledger.decisions(name)
    assert (decision.kind.value, decision.by, decision.reason) == (kind, "Grace Hopper", "read the lost items")


def test_the_certificate_names_whoever_approved(world: World) -> None:
    from goldgate.verify import verify

    execution = ExecutionSpec(store=str(world.store), tracking_uri=world.services.mlflow_url)
    found = verify("models:/approving@champion", execution)
    assert found.holds, found
    release = next(check.detail for check in found.checks if check.what == "release")
    assert release.startswith("promoted by its verdict, and approved by Grace Hopper on ")


def _mlflow(world: World, path: str, record: dict[str, Any]) -> dict[str, Any]:
    answer = httpx.post(
        f"{world.services.mlflow_url}/api/2.0/mlflow/{path}", json=record, trust_env=False, timeout=60.0
    )
    return answer.raise_for_status().json()  # type: ignore[no-any-return]


@pytest.mark.browser
def test_started_from_the_form_in_a_browser(world: World) -> None:
    if CHROMIUM is None:
        reason = "chromium is not installed (apt-get install chromium)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=60_000)
    before = {run["id"] for run in world.runs("retrain/complaints")}
    deployment = world.deployment("retrain/complaints")["id"]
    with sync_playwright() as playwright:
        # In a container, Chromium's sandbox needs privileges that it does not get; the one site it opens is ours.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(60_000)
        page.goto(f"{world.services.prefect_url}/v2/deployments/deployment/{deployment}/run")

        rank = page.get_by_label("Lora rank")
        expect(rank).to_have_value("16", timeout=60_000)
        expect(rank).to_have_attribute("min", "1")
        expect(rank).to_have_attribute("max", "256")
        for shown in (
            "Rank of the LoRA adapter (qlora and lora).",
            "Chance of promoting a candidate that is no better, over all looks at a golden set.",
            "Name of the task: the registered model and the MLflow experiment.",
        ):
            expect(page.get_by_text(shown)).to_be_visible()
        for group in ("Task", "Data", "Golden", "Curate (Optional)", "Train (Optional)", "Policy (Optional)"):
            expect(page.get_by_text(group, exact=True)).to_be_visible()

        for parameter in ("override (Optional)", "approval (Optional)"):  # left empty
            expect(page.get_by_text(parameter, exact=True)).to_be_visible()

        submit = page.get_by_role("button", name="Submit")
        rank.fill("1000")  # a bound that the browser itself knows
        submit.click()
        assert rank.evaluate("field => field.validity.rangeOverflow")
        rank.fill("8")
        epochs = page.get_by_label("Epochs")
        epochs.fill("-1")  # a bound that only the schema knows
        submit.click()
        refusal = page.get_by_text("-1 is less than or equal to the minimum of 0")
        expect(refusal.first).to_be_visible(timeout=30_000)
        assert {run["id"] for run in world.runs("retrain/complaints")} == before

        epochs.fill("2")
        page.screenshot(path=world.store.parent / "form.png", full_page=True)
        submit.click()
        expect(refusal).to_have_count(0, timeout=60_000)

        def made() -> bool:
            return len(world.runs("retrain/complaints")) > len(before)

        try:
            wait_until(made, "the run is made at once", 20.0)
        except AssertionError:  # after a refusal, the form may take one more look at what was mended
            submit.click()
            wait_until(made, "the run is made", 60.0)
        (started,) = {run["id"] for run in world.runs("retrain/complaints")} - before
        run = world.ended(started)
        assert run["parameters"]["spec"]["train"]["lora_rank"] == 8
        assert (run["parameters"].get("override"), run["parameters"].get("approval")) == (None, None)
        assert run["state_name"] in VERDICTS, world.logs(started)

        page.goto(f"{world.services.prefect_url}/v2/runs/flow-run/{started}")
        expect(page.get_by_text(run["state_name"]).first).to_be_visible(timeout=30_000)
        page.screenshot(path=world.store.parent / "run.png", full_page=True)
        browser.close()


@pytest.mark.parametrize(
    ("state", "then"),
    [
        ({"type": "COMPLETED", "name": "Promoted"}, "Promoted"),  # between the look at what runs and its cancelling
        ({"type": "FAILED"}, "Failed"),
        ({"type": "PENDING"}, "Cancelling"),
        ({"type": "RUNNING"}, "Cancelling"),
    ],
    ids=str,
)
def test_only_what_has_not_ended_is_cancelled(world: World, state: dict[str, str], then: str) -> None:
    flow = world.ask("POST", "/flows/", {"name": "made-by-hand"}).raise_for_status().json()["id"]
    run = world.ask("POST", "/flow_runs/", {"flow_id": flow, "state": state}).raise_for_status().json()["id"]
    try:
        services._set_state(world.api, {"id": run}, "CANCELLING", "goldgate down")
        assert world.run(run)["state_name"] == then
    finally:
        world.ask("DELETE", f"/flow_runs/{run}").raise_for_status()


def test_down_cancels_what_runs_and_leaves_no_process(world: World) -> None:
    spec = world.deployment("retrain/complaints")["parameters"]["spec"]
    # So that it trains: one that finds all of its work done may have ended before it is seen to run.
    run = world.start("retrain/complaints", {"spec": spec | {"train": {**spec["train"], "epochs": 50}}})
    wait_until(lambda: world.run(run)["state_name"] == "Running", "the run begins")
    started = [psutil.Process(process.pid) for process in world.services.processes]
    tree = started + [child for process in started for child in process.children(recursive=True)]
    assert len(tree) > len(started)
    console = Console(file=io.StringIO(), width=400)

    services.down(world.store, console)

    assert [process for process in tree if process.is_running() and process.status() != psutil.STATUS_ZOMBIE] == []
    assert isinstance(console.file, io.StringIO)
    assert "Cancelling run" in console.file.getvalue()
    assert not (world.store / "services.json").exists()
    assert services.status(world.store) is None
    assert processes_about(world.store) == []
    assert state_in_file(world.store, run) == "CANCELLED"


def state_in_file(store: Path, run: str) -> str:
    """The state of a run as Prefect's database keeps it, when no server is there to ask."""
    import sqlite3

    with sqlite3.connect(store / "prefect" / "prefect.db") as database:
        (state,) = database.execute(
            "select state_type from flow_run where replace(id, '-', '') = ?", (run.replace("-", ""),)
        ).fetchone()
    return str(state)


def processes_about(store: Path) -> list[str]:
    """Processes with this store in their environment: whatever `up` started, directly or not."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("GOLDGATE_STORE") == str(store) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


_UP = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is started deaf to it
from rich.console import Console
from goldgate import services
services.up(Path(sys.argv[1]), Console(), prefect_port=int(sys.argv[2]), mlflow_port=int(sys.argv[3]))
"""


def test_interrupted_up_leaves_no_process(tmp_path: Path) -> None:
    store = tmp_path / "store"
    up = subprocess.Popen(
        [sys.executable, "-c", _UP, str(store), str(free_port()), str(free_port())],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    wait_until(lambda: len(processes_about(store)) >= 1, "a server is started", 60.0)
    up.send_signal(signal.SIGINT)
    output, _ = up.communicate(timeout=60)

    assert up.returncode != 0
    assert "Stopping what was started." in output
    assert processes_about(store) == []
    assert not (store / "services.json").exists()


def test_a_server_that_does_not_come_up_is_named_with_its_log(tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    (store / "mlflow.db").write_text("this is no database, and MLflow will say so")

    with pytest.raises(ServiceError, match=r"mlflow ended while it started[\s\S]*not a database"):
        services.up(store, Console(file=io.StringIO()), prefect_port=free_port(), mlflow_port=free_port())

    assert processes_about(store) == []
    assert not (store / "services.json").exists()
