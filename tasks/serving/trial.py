"""A canary from the side of its rollout: begun, waited for, and what follows from it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from tasks.contracts.observe import CanaryFinding
from tasks.contracts.serving import Canary, CanaryStatus, Intent, TrialResult
from tasks.contracts.spec import CanarySpec
from tasks.serving.client import ConflictError, GatewayClient, Lease

ANSWERS_NEEDED = 100  # of the live version, before the gateway can say what is slow

_POLL_SECONDS = 1.0
_HOUR = 3600.0
_TRIES = 5  # to begin while somebody else changes a shadow


class Tried(NamedTuple):
    """What a trial has come to.

    Attributes:
        result: what has happened; None where it could not begin.
        problems: why the version may not go live, a sentence each; empty where it may.
    """

    result: TrialResult | None
    problems: tuple[str, ...]


def run_trial(
    gateway: GatewayClient,
    change: Intent,
    spec: CanarySpec,
    lease: Lease,
    *,
    poll_seconds: float = _POLL_SECONDS,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Tried:
    """Put a checked version on trial and wait for its end; it stays in traffic, for whoever moves that next.

    Without `slow_ms` it begins when the live version has answered a hundred requests since the gateway was started.
    That waiting counts against `max_hours`: on a name that nobody asks there is no evidence, however long one waits.

    Args:
        gateway: where it is tried out.
        change: the rollout, whose lease is held; it is CHECKED.
        spec: the share, and how long.
        lease: of the rollout.
        poll_seconds: so often it is looked at.
        clock: seconds that only ever grow.
        sleep: waits for so many.

    Raises:
        ConflictError: it is on trial no more, as after a rollback.
        LeaseLostError: somebody else may be at work on the rollout.
        ServiceError: the gateway does not answer.
    """
    asked, until = clock(), clock() + spec.max_hours * _HOUR
    begun: float | None = None
    while True:
        lease.check()
        status = gateway.canary(change.name)
        if begun is None:
            if spec.slow_ms is not None or status.live_answers >= ANSWERS_NEEDED:
                _begin(gateway, change, spec)
                begun = clock()
                continue
            if clock() >= until:
                return Tried(None, (_too_few_answers(change, status.live_answers, (clock() - asked) / _HOUR),))
            sleep(poll_seconds)
            continue
        canary, finding = _still_there(status, change)
        hours = (clock() - begun) / _HOUR
        enough = canary.state.canary_requests >= spec.min_requests and hours >= spec.min_hours
        if canary.finding is not None or enough or clock() >= until:
            result = TrialResult(spec=spec, state=canary.state, finding=finding, hours=hours)
            return Tried(result, trial_problems(change.to.label, result))
        sleep(poll_seconds)


def trial_problems(label: str, trial: TrialResult) -> tuple[str, ...]:
    """Why a version may not go live after its trial, a sentence each; empty where it may."""
    if trial.finding.abort:
        return trial.finding.reasons
    came = trial.state.canary_requests
    if came < trial.spec.min_requests:
        return (
            f"{label} has answered {came:,} requests on trial in {trial.hours:.1f} h, {trial.spec.min_requests:,} are "
            "needed to judge it.",
        )
    if trial.hours < trial.spec.min_hours:
        return (f"{label} was on trial for {trial.hours:.1f} h, {trial.spec.min_hours:g} are needed.",)
    return ()


def _too_few_answers(change: Intent, answers: int, hours: float) -> str:
    return (
        f"{change.to.label} could not be tried out: {change.was.label if change.was else 'the live version'} has "
        f"answered {answers:,} requests in {hours:.1f} h, and {ANSWERS_NEEDED} are needed to say what is slow (or set "
        "`canary.slow_ms`)."
    )


def _begin(gateway: GatewayClient, change: Intent, spec: CanarySpec) -> None:
    """Traffic may be another revision by now, since a shadow begins or ends beside this; then it is read again."""
    for tries_left in reversed(range(_TRIES)):
        traffic = gateway.traffic(change.name)
        try:
            gateway.begin_canary(change, spec, from_revision=traffic.revision if traffic is not None else 0)
            return
        except ConflictError:
            if not tries_left or gateway.traffic(change.name) == traffic:
                raise


def _still_there(status: CanaryStatus, change: Intent) -> tuple[Canary, CanaryFinding]:
    if status.canary is None or status.finding is None or status.canary.salt != change.id:
        raise ConflictError(
            f"{change.to.label} is on trial no more.",
            where=f"change {change.id}",
            fix=f"see what has happened: `goldgate rollout --show {change.name}`",
        )
    return status.canary, status.finding
