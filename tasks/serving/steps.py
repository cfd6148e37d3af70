"""Serving's Prefect tasks: the new engine beside the old one, the check, the switch, and what a run shows of it."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from typing import NamedTuple
from uuid import uuid4

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.events import emit_event
from prefect.states import Completed

from tasks.contracts.references import RegisteredModelRef
from tasks.contracts.serving import (
    PROMOTED_EVENT,
    ROLLED_OUT_EVENT,
    CheckResult,
    EngineState,
    Intent,
    Phase,
    Proof,
    RolloutResult,
    RolloutSpec,
    VersionRef,
)
from tasks.contracts.spec import RetrainSpec
from tasks.runtime import say, say_done
from tasks.serving.checks import SmokeItem, ask_smoke_items, draw_smoke_items, judge_replies
from tasks.serving.client import ConflictError, gateway_of
from tasks.serving.transaction import Attempt, Ended, Means, Registry, finish_left, under_way
from tasks.serving.trial import run_trial
from tasks.serving.words import headline, rollout_markdown, state_name, trial_line

_POLL_SECONDS = 0.5
_FETCH_SECONDS = 1800.0  # for the files of a version, which are fetched before its engine starts


def means_of(spec: RolloutSpec, registry: Registry) -> Means:
    """What a rollout is made with.

    Raises:
        ServiceError: no gateway is known.
    """
    return Means(gateway_of(spec.execution), registry, spec.settings.drain_seconds, partial(say, "rollout"))


class Found(NamedTuple):
    """What a rollout finds before it looks at anything else.

    Attributes:
        ended: the change that it was asked for, if that has ended already.
        last: id of the change of this name that ended last; empty for none.
    """

    ended: Ended | None
    last: str


@task(name="finish what was left", persist_result=False, cache_policy=NO_CACHE)
def finish_what_was_left(means: Means, spec: RolloutSpec, wait_seconds: float) -> Found:
    """Bring a change to its end whose process was killed, which may be all that this run is asked for."""
    left = finish_left(means, spec.name, holder(), wait_seconds=wait_seconds)
    if left is not None:
        say_done("finish what was left", f"{left.intent.to.label} is {left.intent.phase.value}", reused=False)
    waits = means.registry.aliases(spec.name).promoted
    if left is not None and left.intent.kind == "rollout" and left.intent.phase is not Phase.UNDONE:
        number = left.intent.to.version
        if spec.version == number or (spec.version is None and waits is None):
            return Found(left, left.intent.id)
    history = means.gateway.history(spec.name)
    # This very run may have been killed after its change had ended, and be here again.
    mine = next((one for one in history if one.id.startswith(_run_id())), None)
    ended = Ended(mine, None) if mine is not None and mine.phase is not Phase.UNDONE else None
    return Found(ended, history[0].id if history else "")


@task(name="draw smoke items", persist_result=False, cache_policy=NO_CACHE)
def draw_items(proof: Proof | None, spec: RolloutSpec) -> tuple[SmokeItem, ...]:
    """The golden items that the new engine is asked, with the answers of the evaluation."""
    items = draw_smoke_items(spec.golden, proof, spec.settings.smoke_items)
    say_done("draw smoke items", f"{len(items):,} of the golden set", reused=False)
    return items


@task(name="begin", persist_result=False, cache_policy=NO_CACHE)
def begin_change(
    means: Means, version: VersionRef, proof: Proof | None, last: str, spec: RolloutSpec, by: str
) -> Intent:
    """Announce the rollout, so that no other moves the same things.

    Args:
        means: what it is made with.
        version: the version that is to go live.
        proof: what its certificate says; None for a baseline.
        last: the change that had ended last before `version` was resolved.
        spec: of the rollout.
        by: who wants it.

    Raises:
        ServiceError: another change is under way.
        ConflictError: another has ended since then, so what was read may not hold any more.
    """
    traffic = means.gateway.traffic(spec.name)
    intent = Intent(
        id=f"{_run_id()}.{uuid4().hex[:8]}",  # each attempt of a run is a change of its own
        name=spec.name,
        kind="rollout",
        to=version,
        was=traffic.live if traffic is not None else None,
        was_previous=traffic.previous if traffic is not None else None,
        phase=Phase.CHECKING,
        by=by,
        why=proof.release if proof is not None else "set as baseline by a person, without a certificate",
        at=datetime.now(UTC),
        holder=holder(),
        aliases=means.registry.aliases(spec.name),
        after=last,
    )
    try:
        begun = means.gateway.begin(intent)
    except ConflictError as conflict:
        if conflict.open is None:
            raise
        raise under_way(conflict.open, conflict.lease_left) from conflict
    was = f", {begun.was.label} answers now" if begun.was is not None else ", nothing answers now"
    say_done("begin", f"{version.label}{was}", reused=False)
    return begun


@task(name="start engine", persist_result=False, cache_policy=NO_CACHE)
def start_engine(change: Attempt, spec: RolloutSpec) -> str | None:
    """Start the new engine beside the old one and wait for its first answer; return why it failed, if it did."""
    gateway, version = change.means.gateway, change.intent.to
    status = gateway.start_engine(version, spec.settings.engine)
    until = time.monotonic() + spec.settings.engine.start_seconds + _FETCH_SECONDS
    while status.state is EngineState.STARTING and time.monotonic() < until:
        time.sleep(_POLL_SECONDS)
        change.lease.check()
        status = gateway.engine(version.engine) or status
    if status.state is not EngineState.READY:
        return f"Its engine is {status.state.value}: {status.why or 'it never answered'}"
    took = f" after {status.ready_seconds:.1f} s" if status.ready_seconds is not None else ""
    say_done("start engine", f"{version.label} answers{took}", reused=False)
    return None


@task(name="check engine", persist_result=False, cache_policy=NO_CACHE)
def check_engine(change: Attempt, items: Sequence[SmokeItem], spec: RolloutSpec) -> CheckResult:
    """Ask the new engine golden items through the gateway, and compare with how they were evaluated."""
    version = change.intent.to
    check = judge_replies(ask_smoke_items(partial(change.means.gateway.ask, version), items), version, spec)
    change.lease.check()
    said = f"{check.same:,} of {check.asked:,} as expected, 95th percentile {check.latency_p95_ms:,.0f} ms"
    say_done("check engine", said, reused=False)
    return check


@task(name="decide", persist_result=False, cache_policy=NO_CACHE)
def decide(change: Attempt, failure: str | None, check: CheckResult | None) -> None:
    """Record what the check has shown: the version may go live, or will be refused."""
    problems = (failure,) if failure is not None else check.problems if check is not None else ()
    found = change.intent.model_copy(update={"check": check, "problems": problems})
    if problems:
        say_done("decide", f"refused: {' '.join(problems)}", reused=False)
        change.write(found)
        return
    change.write(found.model_copy(update={"phase": Phase.CHECKED}))
    say_done("decide", "it may go live", reused=False)


def is_tried_first(change: Attempt, spec: RolloutSpec) -> bool:
    """Whether a share of the traffic tries the version out: one was asked for, the check is passed, others answer."""
    intent = change.intent
    other_answers = intent.was is not None and intent.was.engine != intent.to.engine
    return spec.settings.canary is not None and intent.phase is Phase.CHECKED and other_answers


@task(name="try canary", persist_result=False, cache_policy=NO_CACHE)
def try_canary(change: Attempt, spec: RolloutSpec) -> None:
    """Let the version answer a share of the requests; record whether it may have the others.

    The gateway takes it back by itself as soon as it is shown to be worse. Here it is waited until then, until it has
    answered enough requests for long enough, or until there is no more patience for that.
    """
    asked, gateway, intent = spec.settings.canary, change.means.gateway, change.intent
    if asked is None:
        raise RuntimeError("no canary was asked for")
    tried = run_trial(gateway, intent, asked, change.lease)
    said = trial_line(intent.to.label, tried.result) if tried.result is not None else " ".join(tried.problems)
    say_done("try canary", said, reused=False)
    change.write(intent.model_copy(update={"trial": tried.result, "problems": tried.problems}))


def move_traffic_and_champion(change: Attempt) -> None:
    """Move both, or put everything back as it was; what was refused has its engine ended. See `transaction`."""
    if change.intent.phase is Phase.CHECKED and not change.intent.problems:
        change.write(change.intent.model_copy(update={"phase": Phase.SWITCHING}))
    change.bring_to_end()


def result_of(ended: Ended) -> RolloutResult:
    """What a change has come to."""
    intent = ended.intent
    return RolloutResult(
        name=intent.name,
        phase=intent.phase,
        version=intent.to,
        was=intent.was,
        check=intent.check,
        problems=intent.problems,
        switch_seconds=ended.switch_seconds,
        trial=intent.trial,
    )


@task(name="publish rollout", persist_result=False, cache_policy=NO_CACHE)
def publish_rollout(result: RolloutResult) -> None:
    """Show the check on the page of the run, and tell whoever listens that a version has gone live."""
    key = f"{result.name.replace('_', '-')}-rollout"
    create_markdown_artifact(rollout_markdown(result), key=key, description=headline(result))
    if result.phase is Phase.DONE:
        emit_event(
            event=ROLLED_OUT_EVENT,
            resource=_model(result.name),
            payload={"version": result.version.version, "digest": result.version.digest},
        )
    say_done("rollout", headline(result), reused=False)


def rollout_state(result: RolloutResult) -> State[RolloutResult]:
    """The run's final state: completed, named for what came of it."""
    return Completed(name=state_name(result), message=headline(result), data=result)


@task(name="announce", persist_result=False, cache_policy=NO_CACHE)
def announce_promotion(registered: RegisteredModelRef | None, spec: RetrainSpec) -> None:
    """Tell whoever listens that a version waits for its rollout; the deployment `rollout/promoted` does."""
    if registered is None or registered.alias != "promoted":
        return
    asked = RolloutSpec.of(spec)
    emit_event(
        event=PROMOTED_EVENT,
        resource=_model(spec.name),
        payload={"version": registered.version, "digest": registered.digest, "spec": asked.model_dump(mode="json")},
    )
    say_done("announce", f"{registered.name} v{registered.version} waits for its rollout", reused=False)


def holder() -> str:
    """Who works on a change: unlike that of any other process or run, and a person can find it."""
    context = FlowRunContext.get()
    run = context.flow_run if context is not None else None
    who = f"flow run {run.name} {run.id}" if run is not None else f"command {uuid4().hex[:8]}"
    return f"{who} on {socket.gethostname()}, process {os.getpid()}"


def _run_id() -> str:
    context = FlowRunContext.get()
    run = context.flow_run if context is not None else None
    return str(run.id) if run is not None else uuid4().hex


def _model(name: str) -> dict[str, str]:
    return {"prefect.resource.id": f"goldgate.model.{name}", "prefect.resource.name": name}
