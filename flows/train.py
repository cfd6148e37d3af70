"""Train one candidate, or tune a trained one: a run of its own on the `gpu` pool, or a step of another flow."""

from __future__ import annotations

import time
from typing import cast

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext
from prefect.deployments import run_deployment
from prefect.states import Completed
from prefect.utilities.urls import url_for

from tasks.contracts.errors import TrainingError
from tasks.contracts.prefer import PreferRequest
from tasks.contracts.references import TrainedModelRef, TrainRequest
from tasks.contracts.sweep import PrunedRef
from tasks.runtime import say
from tasks.training.prefer_steps import fetch_tuned, find_tuned, tune_preferences
from tasks.training.pruned import as_error, find_pruned
from tasks.training.steps import fetch_trained, find_trained, train_adapter

_POLL_SECONDS = 2.0
# A crashed run of the pools is picked up again by an automation, so many times in all and within this time.
_ATTEMPTS = 3
_PICK_UP_SECONDS = 60.0
_ENDED = {
    "train": ("The training run", "a new run goes on from the last checkpoint"),
    "prefer": ("The run that tunes preferences", "a new run starts the tuning anew"),
}


def _run_name() -> str:
    context = FlowRunContext.get()
    if context is None or context.parameters is None:
        raise RuntimeError("a run is named in its own context")
    request = context.parameters["request"]
    return f"{'tune' if isinstance(request, PreferRequest) else 'train'} {request.name}"


@flow(name="train", flow_run_name=_run_name, persist_result=False)
def train(request: TrainRequest | PreferRequest) -> TrainedModelRef | PrunedRef:
    """Training, or the preference tuning after it, in a process of its own; finished work is reused.

    An interrupted training goes on, an interrupted tuning starts anew. A training that is given up, as `stop_above`
    asks, ends Completed under the name Pruned.
    """
    if isinstance(request, PreferRequest):
        return tune_preferences(request)
    made = train_adapter(request)
    if isinstance(made, PrunedRef):
        return cast(PrunedRef, Completed(name="Pruned", message=made.reason, data=made))  # Prefect hands on the data
    return made


def train_where_told(request: TrainRequest) -> TrainedModelRef:
    """Train inside this run, or hand the training to a deployment and wait for it.

    Nothing but the request passes through Prefect: the result is found in the store by its fingerprint. What was
    finished before waits for no worker.

    Raises:
        PrunedError: it was given up, as `stop_above` asks; `tasks.training.pruned.find_pruned` knows where.
        TrainingError: it ended without a model.
    """
    deployment = request.execution.train_deployment
    if deployment is None:
        made = train(request)
        if isinstance(made, PrunedRef):
            raise as_error(made)
        return made
    finished = find_trained(request)
    if finished is not None:
        return finished
    _hand_over(deployment, request, "train")
    pruned = find_pruned(request)
    if pruned is not None and find_trained(request) is None:
        raise as_error(pruned)
    return fetch_trained(request)


def tune_where_told(request: PreferRequest) -> TrainedModelRef:
    """Tune inside this run, or hand the tuning to the deployment that trains and wait for it, as `train_where_told`.

    Raises:
        TrainingError: it ended without a model.
    """
    deployment = request.execution.train_deployment
    if deployment is None:
        return tune_preferences(request)
    finished = find_tuned(request)
    if finished is not None:
        return finished
    _hand_over(deployment, request, "prefer")
    return fetch_tuned(request)


def _hand_over(deployment: str, request: TrainRequest | PreferRequest, step: str) -> None:
    """Have a deployment do it, and wait for its end.

    Raises:
        TrainingError: it did not end well.
    """
    run = cast(
        FlowRun,  # in a synchronous flow; Prefect's type says that it may be a coroutine
        run_deployment(deployment, parameters={"request": request.model_dump(mode="json")}, timeout=0),
    )
    say(step, f"handed to {deployment}, as run {run.name}, which shows its progress: {url_for(run)}")
    with get_client(sync_client=True) as client:
        crashed = 0.0  # seconds
        while (
            run.state is None
            or not run.state.is_final()
            or (run.state.is_crashed() and 0 < run.run_count < _ATTEMPTS and crashed < _PICK_UP_SECONDS)
        ):
            time.sleep(_POLL_SECONDS)
            run = client.read_flow_run(run.id)
            crashed = crashed + _POLL_SECONDS if run.state is not None and run.state.is_crashed() else 0.0
    if not run.state.is_completed():
        what, again = _ENDED[step]
        raise TrainingError(
            f"{what} ended as {run.state.name}: {run.state.message or 'no message'}",
            where=f"flow run {run.name} ({run.id}) of deployment {deployment}",
            fix=f"read that run's log; {again}",
        )
