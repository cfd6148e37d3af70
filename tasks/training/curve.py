"""The training's curve in MLflow: one value for each step, whatever happened on the way."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from tasks.contracts.spec import ExecutionSpec
from tasks.tracking import TrackedRun, connect
from tasks.tracking.runs import KEY

log = logging.getLogger("goldgate.training")

PLAN_TAG = "goldgate.plan"  # digest of the plan that a run's curve belongs to


@dataclass(frozen=True)
class Curve:
    """A run's metrics, of which each step has one value; written as those of a `TrackedRun`.

    `known` is, for each metric, the steps that the run has.

    MLflow would keep two values of a step that was taken twice. The first one stays: a step that is taken again after
    a kill gives the same losses, and what differs (speed, memory) is of a process that is no more.
    """

    run: TrackedRun
    known: dict[str, set[int]] = field(default_factory=dict)

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Keep numbers, by name, at a step; those that are there already are left out."""
        new = {name: value for name, value in metrics.items() if step not in self.known.get(name, ())}
        if new:
            self.run.log_metrics(new, step)
        for name in new:
            self.known.setdefault(name, set()).add(step)


def continue_curve(run: TrackedRun) -> Curve:
    """The curve of a run, with what earlier processes wrote."""
    names = run.client.get_run(run.id).data.metrics
    return Curve(run, {name: {point.step for point in run.client.get_metric_history(run.id, name)} for name in names})


def set_aside_other_plans(execution: ExecutionSpec, experiment: str, key: str, plan_digest: str) -> list[str]:
    """Let go of runs of this key whose steps are not those of this plan, so that it gets a run of its own.

    A training that starts over on another number of devices takes other steps; MLflow cannot take back those that its
    run has. Such a run stays, ended, under another key. Call it before `open_run`, to which the tag `goldgate.plan`
    is given.

    Returns:
        Ids of the runs.
    """
    client = connect(execution)
    there = client.get_experiment_by_name(experiment)
    if there is None:
        return []
    aside = []
    for run in client.search_runs([there.experiment_id], f"tags.\"{KEY}\" = '{key}'"):
        if run.data.metrics and run.data.tags.get(PLAN_TAG, plan_digest) != plan_digest:
            client.set_tag(run.info.run_id, KEY, f"{key} (plan {run.data.tags[PLAN_TAG][:8]})")
            if run.info.status != "FINISHED":
                client.set_terminated(run.info.run_id, "KILLED")
            log.info("training starts over with another plan, in a new MLflow run; the old one is %s", run.info.run_id)
            aside.append(run.info.run_id)
    return aside
