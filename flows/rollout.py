"""From a registered version to the one that answers, or to a refusal that leaves the old one where it is."""

from __future__ import annotations

from functools import partial

from prefect import flow
from prefect.client.schemas.objects import State

from tasks.contracts.serving import RolloutResult, RolloutSpec
from tasks.gate.steps import asked_by, check_certificate
from tasks.registry.steps import move_champion, read_aliases, refuse_version, resolve, restore_aliases
from tasks.serving.steps import (
    begin_change,
    check_engine,
    decide,
    draw_items,
    finish_what_was_left,
    is_tried_first,
    means_of,
    move_traffic_and_champion,
    publish_rollout,
    result_of,
    rollout_state,
    start_engine,
    try_canary,
)
from tasks.serving.transaction import Registry, attempt


@flow(name="rollout", flow_run_name="rollout {spec.name}", persist_result=False)
def rollout(spec: RolloutSpec, wait_seconds: float = 60.0) -> State[RolloutResult]:
    """Start a version beside the one that answers, ask it golden items, and move traffic and alias to it together.

    In between, a share of the traffic may try it out.

    Ends Completed under the name of what came of it: Rolled out, Refused, or Undone. A change whose process was killed
    is brought to its end first.

    Args:
        spec: everything that the rollout needs to know.
        wait_seconds: how long to wait for another change of this name to end, or for the lease of a killed one.
    """
    registry = Registry(
        partial(read_aliases, spec=spec),
        partial(move_champion, spec=spec),
        partial(restore_aliases, spec=spec),
        partial(refuse_version, spec=spec),
    )
    means = means_of(spec, registry)
    found = finish_what_was_left(means, spec, wait_seconds)
    ended = found.ended
    if ended is None:
        version = resolve(spec)
        proof = check_certificate(version, spec.execution)
        items = draw_items(proof, spec)
        with attempt(means, begin_change(means, version, proof, found.last, spec, asked_by())) as change:
            failure = start_engine(change, spec)
            check = check_engine(change, items, spec) if failure is None else None
            decide(change, failure, check)
            if is_tried_first(change, spec):
                try_canary(change, spec)
            move_traffic_and_champion(change)
        ended = change.ended
    result = result_of(ended)
    publish_rollout(result)
    return rollout_state(result)
