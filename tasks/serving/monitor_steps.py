"""The monitor's Prefect tasks: windows, their comparison, the claim of a retrain, its event, and what a run shows."""

from __future__ import annotations

import json
import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import httpx
from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import VariableCreate
from prefect.client.schemas.objects import State
from prefect.events import emit_event
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.settings import PREFECT_API_URL
from prefect.states import Completed

from tasks.contracts.errors import ServiceError, StoreError
from tasks.contracts.monitor import DRIFTED_EVENT, MonitorResult, MonitorSpec, WindowFacts
from tasks.contracts.observe import DriftReport, RetrainPermit
from tasks.runtime import say_done
from tasks.serving.drift import TooLittleError, compare_windows
from tasks.serving.monitor.claims import Claim, claim_retrain
from tasks.serving.monitor.windows import Log, ParquetLog, PostgresLog, Seen, read_windows
from tasks.serving.monitor.words import headline, monitor_markdown, state_name
from tasks.serving.request_log import LOG_DB
from tasks.serving.steps import holder
from tasks.store import Store

REQUEST_LOG = "request_log"  # folder of the gateway's log in its own folder
_PAGE = 200  # variables in one answer of Prefect


class Comparison(NamedTuple):
    """What a comparison has come to: a report, or why there is none."""

    report: DriftReport | None
    reference: WindowFacts | None
    current: WindowFacts | None
    why_not: str


@task(name="read windows", persist_result=False, cache_policy=NO_CACHE)
def read_request_windows(spec: MonitorSpec) -> Seen:
    """Draw the requests of both windows from the log."""
    seen = read_windows(log_of(spec), spec, datetime.now(UTC))
    if seen.windows is None:
        say_done("read windows", seen.why_not, reused=False)
    else:
        then, now = seen.windows.reference_facts, seen.windows.current_facts
        say_done("read windows", f"{then.rows:,} requests then, {now.rows:,} now", reused=False)
    return seen


def log_of(spec: MonitorSpec) -> Log:
    """The log that the spec or the environment names.

    Raises:
        StoreError: none is named, and the store, where a gateway would keep it, is remote.
    """
    if spec.log is not None:
        return ParquetLog(Path(spec.log))
    address = os.environ.get(LOG_DB)
    if address:
        return PostgresLog(address)
    store = Store(spec.execution.store)
    if not store.local:
        raise StoreError(
            "No request log is named, and the store is remote; no gateway keeps its log there.",
            where=store.root,
            fix=f"set `log` to the folder of the gateway's request log, or {LOG_DB} to its database",
        )
    return ParquetLog(Path(store.root, "serving", REQUEST_LOG))


@task(name="compare", persist_result=False, cache_policy=NO_CACHE)
def compare(seen: Seen, spec: MonitorSpec) -> Comparison:
    """Test whether requests, or what is answered to them, are still what they were."""
    if seen.windows is None:
        return Comparison(None, None, None, seen.why_not)
    reference, current, reference_facts, current_facts, notes = seen.windows
    try:
        report = compare_windows(reference, current, spec.drift)
    except TooLittleError as error:
        say_done("compare", "too little to compare", reused=False)
        why = f"{error.what} To fix: {error.fix}."
        return Comparison(None, reference_facts, current_facts, why)
    left_out = {what: notes.get(what, why) for what, why in report.left_out.items()}
    say_done("compare", report.reason, reused=False)
    return Comparison(report.model_copy(update={"left_out": left_out}), reference_facts, current_facts, "")


@task(name="may it retrain", persist_result=False, cache_policy=NO_CACHE)
def permit_retrain(comparison: Comparison, spec: MonitorSpec) -> RetrainPermit | None:
    """Claim the retrain that drift calls for, unless one was started not long ago; None where none is called for."""
    if comparison.report is None or not comparison.report.drifted or spec.retrain is None or spec.report_only:
        return None
    if PREFECT_API_URL.value() is None:
        why = "No Prefect server is up, so nobody would hear of it: `goldgate up`, or `goldgate run` by hand."
        permit = RetrainPermit(allowed=False, next_at=None, why=why)
    else:
        permit = claim_retrain(
            PrefectClaims(spec.name), datetime.now(UTC), spec.drift, by=holder(), reason=comparison.report.reason
        )
    say_done("may it retrain", "yes" if permit.allowed else permit.why, reused=False)
    return permit


@task(name="announce drift", persist_result=False, cache_policy=NO_CACHE)
def announce_drift(comparison: Comparison, permit: RetrainPermit | None, spec: MonitorSpec) -> bool:
    """Tell whoever listens that requests have drifted; the deployment `retrain/<name>` starts. Return whether it was.

    Raises:
        ServiceError: Prefect did not take the event.
    """
    if permit is None or not permit.allowed or comparison.report is None or spec.retrain is None:
        return False
    emitted = emit_event(
        event=DRIFTED_EVENT,
        resource={"prefect.resource.id": f"goldgate.model.{spec.name}", "prefect.resource.name": spec.name},
        payload={
            "spec": spec.retrain.model_dump(mode="json"),
            "reason": comparison.report.reason,
            "report": comparison.report.model_dump(mode="json"),
        },
    )
    if emitted is None:
        raise ServiceError(
            "The event that starts a retrain was not emitted.",
            where=DRIFTED_EVENT,
            fix="look into Prefect's settings for events; the next try is after `drift.retrain_at_most_every_hours`, "
            "or start the retrain by hand",
        )
    say_done("announce drift", comparison.report.reason, reused=False)
    return True


def result_of(comparison: Comparison, permit: RetrainPermit | None, started: bool, spec: MonitorSpec) -> MonitorResult:
    """All that a look has found."""
    return MonitorResult(
        name=spec.name,
        report=comparison.report,
        reference=comparison.reference,
        current=comparison.current,
        why_not=comparison.why_not,
        permit=permit,
        started=started,
    )


@task(name="publish look", persist_result=False, cache_policy=NO_CACHE)
def publish_look(result: MonitorResult) -> None:
    """Show each test, its effect and its limit on the page of the run."""
    key = f"{result.name.replace('_', '-')}-monitor"
    link = _page_of_retrains(result.name) if result.started else None
    create_markdown_artifact(monitor_markdown(result, link), key=key, description=headline(result))
    say_done("monitor", headline(result), reused=False)


def _page_of_retrains(name: str) -> str | None:
    """Where the runs of `retrain/<name>` are shown; None where Prefect knows no such deployment."""
    with get_client(sync_client=True) as client:
        try:
            deployment = client.read_deployment_by_name(f"retrain/{name}")
        except ObjectNotFound:
            return None
    return f"/v2/deployments/deployment/{deployment.id}"


def monitor_state(result: MonitorResult) -> State[MonitorResult]:
    """The run's final state: completed, named for what came of it."""
    return Completed(name=state_name(result), message=headline(result), data=result)


class PrefectClaims:
    """Claims as Prefect variables `goldgate-drift-<name>-<number>`.

    The server that starts the retrains is what all looks share, wherever their workers and store are. The names of its
    variables are unique, by a constraint of its database, so of two that claim a number one gets it. Nothing is ever
    changed or deleted: the variables are also the history.
    """

    def __init__(self, name: str) -> None:
        self._prefix = f"goldgate-drift-{name}-"

    def last(self) -> Claim | None:
        """The one with the highest number; None for none.

        Raises:
            ServiceError: a variable of such a name holds something else.
        """
        named = re.compile(re.escape(self._prefix) + r"(\d+)")
        highest: tuple[int, object] | None = None
        offset = 0
        with get_client(sync_client=True) as client:
            while True:
                # By its pattern `_` stands for any character, and other names may go on behind ours: looked at below.
                asked = {"variables": {"name": {"like_": self._prefix}}, "limit": _PAGE, "offset": offset}
                answer = client.request("POST", "/variables/filter", json=asked)
                found = answer.json()
                for variable in found:
                    fits = named.fullmatch(variable["name"])
                    if fits is not None and (highest is None or int(fits[1]) > highest[0]):
                        highest = int(fits[1]), variable["value"]
                if len(found) < _PAGE:
                    break
                offset += _PAGE
        return None if highest is None else self._read(*highest)

    def add(self, claim: Claim) -> bool:
        """Keep it; False where its number is taken."""
        value = json.dumps({"at": claim.at.isoformat(), "by": claim.by, "reason": claim.reason})
        variable = VariableCreate(name=f"{self._prefix}{claim.number}", value=value, tags=["goldgate"])
        with get_client(sync_client=True) as client:
            try:
                client.create_variable(variable)
            except ObjectAlreadyExists:
                return False
            except httpx.HTTPStatusError as error:
                raise ServiceError(
                    f"Prefect refuses to keep that a retrain is started ({error.response.status_code}), so none is.",
                    where=variable.name,
                    fix="see that the worker may write variables, then look again",
                ) from error
        return True

    def _read(self, number: int, value: object) -> Claim:
        try:
            record = json.loads(value) if isinstance(value, str) else value
            return Claim(number, datetime.fromisoformat(record["at"]), record["by"], record["reason"])  # type: ignore[index]
        except (ValueError, TypeError, KeyError) as error:
            raise ServiceError(
                "This variable of Prefect does not say when drift started a retrain, so none is started.",
                where=f"{self._prefix}{number}",
                fix="delete it; it is written anew with the next retrain that drift starts",
            ) from error
