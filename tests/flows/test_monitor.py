"""The monitor as a flow: drift is announced once, and each look says what it has found."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import typer
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import VariableCreate
from prefect.settings import PREFECT_API_URL, temporary_settings
from rich.console import Console

from flows.monitor import monitor
from goldgate import cli
from goldgate.monitor import monitor as command
from tasks.contracts.errors import ServiceError, StoreError
from tasks.contracts.monitor import MonitorResult, MonitorSpec
from tasks.contracts.observe import DriftSpec
from tasks.contracts.spec import DataSpec, ExecutionSpec, GoldenSpec, RetrainSpec, TaskSpec
from tasks.serving import monitor_steps
from tasks.serving.monitor.claims import Claim
from tasks.serving.monitor.windows import ParquetLog, PostgresLog
from tasks.serving.monitor_steps import PrefectClaims, log_of
from tests.prefect_server import prefect_server
from tests.serving.requests_made import last_day, steady, write_log
from tests.serving.test_monitor_claims import at_once, claim

pytestmark = pytest.mark.timeout(300)  # whoever comes first starts the server


@pytest.fixture(scope="module", autouse=True)
def _server() -> Iterator[None]:
    with prefect_server():
        yield


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The events that are emitted."""
    monkeypatch.delenv("GOLDGATE_LOG_DB", raising=False)
    events: list[dict[str, Any]] = []

    def emit(**event: Any) -> object:
        events.append(event)
        return event

    monkeypatch.setattr(monitor_steps, "emit_event", emit)
    return events


def watched(store: Path, *, drifted: bool | None, **changes: Any) -> MonitorSpec:
    """A task of its own, whose gateway has answered requests; None for none of the last day."""
    name = f"t{uuid4().hex[:8]}"
    now = datetime.now(UTC)
    day = [] if drifted is None else last_day(now, drifted=drifted)
    rows = [row | {"name": name, "version": f"{name}@7"} for row in (*steady(now), *day)]
    write_log(store / "serving" / "request_log", rows)
    execution = ExecutionSpec(store=str(store))
    training = RetrainSpec(
        name=name, data=DataSpec(source="rows.jsonl"), golden=GoldenSpec(path="golden"), base_model="base",
        task=TaskSpec(kind="classify", instruction="Which?", labels=("card", "loan", "money_transfer")),
        execution=execution,
    )  # fmt: skip
    return MonitorSpec(**({"name": name, "retrain": training, "execution": execution} | changes))


def run(spec: MonitorSpec) -> tuple[str, MonitorResult]:
    state = monitor(spec, return_state=True)
    result = state.result()
    assert isinstance(result, MonitorResult)
    return str(state.name), result


def page(spec: MonitorSpec) -> str:
    with get_client(sync_client=True) as client:
        return str(client.request("GET", f"/artifacts/{spec.name}-monitor/latest").json()["data"])


def variables(name: str) -> dict[str, str]:
    with get_client(sync_client=True) as client:
        return {one.name: str(one.value) for one in client.read_variables() if f"-{name}-" in one.name}


def test_drift_is_announced_once(tmp_path: Path, told: list[dict[str, Any]]) -> None:
    spec = watched(tmp_path, drifted=True)
    state, first = run(spec)
    assert (state, first.started) == ("Drifted, retrain started", True)
    assert first.report is not None
    assert first.report.reason.startswith("drift: classes (")
    (event,) = told
    assert event["event"] == "goldgate.model.drifted"
    assert event["resource"] == {
        "prefect.resource.id": f"goldgate.model.{spec.name}",
        "prefect.resource.name": spec.name,
    }
    assert RetrainSpec.model_validate(event["payload"]["spec"]) == spec.retrain
    assert event["payload"]["reason"] == first.report.reason
    assert event["payload"]["report"]["tests"][0]["what"] == "lengths"
    assert "# Drifted, retrain started" in page(spec)
    assert f"Prefect has no deployment `retrain/{spec.name}`" in page(spec)
    assert list(variables(spec.name)) == [f"goldgate-drift-{spec.name}-1"]

    state, second = run(spec)
    assert (state, second.started, len(told)) == ("Drifted, too soon", False, 1)
    assert second.permit is not None
    assert second.permit.next_at is not None
    assert timedelta(hours=23) < second.permit.next_at - datetime.now(UTC) < timedelta(hours=24)
    assert "No retrain was started. Drift started a retrain at" in page(spec)

    other = watched(tmp_path, drifted=True)  # another task has its own time
    assert run(other)[0] == "Drifted, retrain started"
    assert len(told) == 2


def test_it_is_claimed_before_it_is_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in between, it has started none; the next look waits for the set time and then does."""
    spec = watched(tmp_path, drifted=True, drift=DriftSpec(retrain_at_most_every_hours=0.0001))

    def killed(**_: Any) -> None:
        assert len(variables(spec.name)) == 1
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(monitor_steps, "emit_event", killed)
        with pytest.raises(KeyboardInterrupt):
            monitor(spec)
    monkeypatch.setattr(monitor_steps, "emit_event", lambda **_: object())
    slow = spec.model_copy(update={"drift": DriftSpec(retrain_at_most_every_hours=24.0)})
    assert run(slow)[0] == "Drifted, too soon"
    assert run(spec)[0] == "Drifted, retrain started"
    assert len(variables(spec.name)) == 2


def test_an_event_that_is_not_emitted_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = watched(tmp_path, drifted=True)
    monkeypatch.setattr(monitor_steps, "emit_event", lambda **_: None)
    with pytest.raises(ServiceError, match="The event that starts a retrain was not emitted"):
        monitor(spec)


@pytest.mark.parametrize(
    ("drifted", "changes", "state"),
    [
        (False, {}, "No drift"),
        (None, {}, "Not enough to compare"),
        (True, {"report_only": True}, "Drifted"),
        (True, {"retrain": None}, "Drifted"),
    ],
)
def test_looks_that_start_nothing(
    tmp_path: Path, told: list[dict[str, Any]], drifted: bool | None, changes: dict[str, Any], state: str
) -> None:
    spec = watched(tmp_path, drifted=drifted, **changes)
    ended, result = run(spec)
    assert (ended, result.permit, result.started) == (state, None, False)
    assert told == []
    assert variables(spec.name) == {}
    assert f"# {state}\n" in page(spec)
    if drifted is None:
        assert "lengths: 1,680 rows in the reference and 0 now, at least 200 needed" in result.why_not
        assert (result.report, result.current and result.current.requests) == (None, 0)


def test_without_a_log_it_fails(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="There is no request log"):
        monitor(MonitorSpec(name="nobody", execution=ExecutionSpec(store=str(tmp_path))))


def test_where_the_log_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOLDGATE_LOG_DB", raising=False)
    spec = MonitorSpec(name="cards", execution=ExecutionSpec(store=str(tmp_path)))
    assert log_of(spec) == ParquetLog(tmp_path / "serving" / "request_log")
    remote = spec.model_copy(update={"execution": ExecutionSpec(store="memory://store")})
    with pytest.raises(StoreError, match="No request log is named, and the store is remote"):
        log_of(remote)
    monkeypatch.setenv("GOLDGATE_LOG_DB", "postgresql://u:secret@h/d")
    assert log_of(remote) == PostgresLog("postgresql://u:secret@h/d")
    assert "secret" not in repr(log_of(remote))
    assert log_of(spec.model_copy(update={"log": "/logs"})) == ParquetLog(Path("/logs"))


# -- claims -----------------------------------------------------------------------------------------------------------


def test_of_many_looks_at_once_the_server_lets_one(told: list[dict[str, Any]]) -> None:
    name, now = f"t{uuid4().hex[:8]}", datetime.now(UTC)
    permits = at_once(PrefectClaims(name), 6, now)
    assert sorted(one.allowed for one in permits) == [False] * 5 + [True]
    last = PrefectClaims(name).last()
    assert last is not None
    assert (last.number, last.at, last.reason) == (1, now, "drift: lengths")
    assert not claim(PrefectClaims(name), now + timedelta(hours=1)).allowed
    assert claim(PrefectClaims(name), now + timedelta(hours=24)).allowed
    assert len(variables(name)) == 2


def test_names_that_begin_alike_have_claims_of_their_own() -> None:
    base, now = f"t{uuid4().hex[:8]}", datetime(2026, 3, 4, tzinfo=UTC)
    names = {f"{base}_a": 11, f"{base}-a": 2, f"{base}-a-1": 3, f"x-{base}_a": 1}  # `_` is any letter to a database
    for name, times in names.items():
        for number in range(1, times + 1):
            assert PrefectClaims(name).add(Claim(number, now + timedelta(hours=number), name, "-"))
    for name, times in names.items():
        last = PrefectClaims(name).last()
        assert last is not None
        assert (last.number, last.by) == (times, name)
    assert PrefectClaims(base).last() is None


def test_many_claims_are_on_more_than_one_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor_steps, "_PAGE", 3)
    claims = PrefectClaims(f"t{uuid4().hex[:8]}")
    for number in range(1, 11):
        assert claims.add(Claim(number, datetime(2026, 3, number, tzinfo=UTC), "-", "-"))
    last = claims.last()
    assert last is not None
    assert last.number == 10
    assert not claims.add(last)


@pytest.mark.parametrize("value", ["yesterday", "{}", [1], {"at": 7}])
def test_a_variable_that_says_something_else_starts_nothing(value: Any) -> None:
    name = f"t{uuid4().hex[:8]}"
    with get_client(sync_client=True) as client:
        client.create_variable(VariableCreate(name=f"goldgate-drift-{name}-1", value=value))
    with pytest.raises(ServiceError, match="does not say when drift started a retrain"):
        PrefectClaims(name).last()


def test_without_a_server_nothing_is_claimed(tmp_path: Path, told: list[dict[str, Any]]) -> None:
    spec = watched(tmp_path, drifted=True)
    seen = monitor_steps.read_request_windows.fn(spec)
    comparison = monitor_steps.compare.fn(seen, spec)
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        permit = monitor_steps.permit_retrain.fn(comparison, spec)
    assert permit is not None
    assert (permit.allowed, permit.next_at) == (False, None)
    assert "No Prefect server is up" in permit.why
    assert monitor_steps.announce_drift.fn(comparison, permit, spec) is False
    assert told == []
    assert variables(spec.name) == {}


# -- command line -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("drifted", "options", "exits", "said"),
    [
        (False, {}, None, "no drift in 4 tests."),
        (True, {}, 3, "A retrain was started."),
        (True, {"report_only": True}, 3, "Nothing was started, since this look only reports."),
        (None, {}, 4, "The windows hold too little"),
    ],
)
def test_the_command_says_what_it_found(
    tmp_path: Path, told: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, drifted: bool | None,
    options: dict[str, Any], exits: int | None, said: str,
) -> None:  # fmt: skip
    console = Console(record=True, width=200, file=io.StringIO())
    monkeypatch.setattr(cli, "console", console)
    monkeypatch.setattr(cli, "_prepare_flow", lambda execution: None)  # the server is the tests'
    monkeypatch.setattr(cli, "_ending_soon", nullcontext)
    config = tmp_path / "monitor.yaml"
    config.write_text(watched(tmp_path, drifted=drifted).model_dump_json())
    code = None
    try:
        command(config, [], **options)
    except typer.Exit as ended:
        code = ended.exit_code
    text = console.export_text()
    assert (code, len(told)) == (exits, int(exits == 3 and not options))
    assert said in text
    assert ("Compared" in text) == (drifted is not None)
    assert ("disagreement not tested: no file of reviews is named" in text) == (drifted is not None)


def test_the_command_prints_json(
    tmp_path: Path, told: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_prepare_flow", lambda execution: None)
    monkeypatch.setattr(cli, "_ending_soon", nullcontext)
    config = tmp_path / "monitor.yaml"
    config.write_text(watched(tmp_path, drifted=False).model_dump_json())
    command(config, [], as_json=True)
    result = MonitorResult.model_validate_json(capsys.readouterr().out)
    assert result.report is not None
    assert (result.report.reason, result.started) == ("no drift", False)
