"""A look at live requests: are they still what they were, and if not, may that start a retrain?"""

from __future__ import annotations

from prefect import flow
from prefect.client.schemas.objects import State

from tasks.contracts.monitor import MonitorResult, MonitorSpec
from tasks.serving.monitor_steps import (
    announce_drift,
    compare,
    monitor_state,
    permit_retrain,
    publish_look,
    read_request_windows,
    result_of,
)


@flow(name="monitor", flow_run_name="monitor {spec.name}", persist_result=False)
def monitor(spec: MonitorSpec) -> State[MonitorResult]:
    """Compare the last requests with those of when the version went live; drift emits an event that starts a retrain.

    Ends Completed under the name of what came of it: "Drifted, retrain started", "Drifted, too soon", "Drifted" (where
    it only reports), "No drift", or "Not enough to compare". Of looks that find drift at once, one starts a retrain,
    and then none for a set time.

    Args:
        spec: everything that the look needs to know.
    """
    seen = read_request_windows(spec)
    comparison = compare(seen, spec)
    permit = permit_retrain(comparison, spec)
    started = announce_drift(comparison, permit, spec)
    result = result_of(comparison, permit, started, spec)
    publish_look(result)
    return monitor_state(result)
