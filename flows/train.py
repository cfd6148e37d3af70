"""Train one candidate: a run of its own on the `gpu` pool, or a step of `retrain`."""

from __future__ import annotations

from typing import cast

from prefect import flow
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment

from tasks.contracts.errors import TrainingError
from tasks.contracts.references import TrainedModelRef, TrainRequest
from tasks.training.steps import find_trained, train_adapter


@flow(name="train", flow_run_name="train {request.name}", persist_result=False)
def train(request: TrainRequest) -> TrainedModelRef:
    """QLoRA training in a process of its own; finished work is reused, interrupted work goes on."""
    return train_adapter(request)


def train_where_told(request: TrainRequest) -> TrainedModelRef:
    """Train inside this run, or hand the training to a deployment and wait for it.

    Nothing but the request passes through Prefect: the result is found in the store by its fingerprint.
    """
    deployment = request.execution.train_deployment
    if deployment is None:
        return train(request)
    run = cast(
        FlowRun,  # in a synchronous flow; Prefect's type says that it may be a coroutine
        run_deployment(
            deployment,
            parameters={"request": request.model_dump(mode="json")},
            timeout=None,
            poll_interval=2,
        ),
    )
    if run.state is None or not run.state.is_completed():
        raise TrainingError(
            f"The training run ended as {run.state.name if run.state else 'unknown'}: "
            f"{(run.state.message if run.state else None) or 'no message'}",
            where=f"flow run {run.name} ({run.id}) of deployment {deployment}",
            fix="read that run's log; a new run goes on from the last checkpoint",
        )
    return find_trained(request)
