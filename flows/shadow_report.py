"""A shadow beside the live version: how often they agree, who is right, what it costs, and when that is decided."""

from __future__ import annotations

from prefect import flow

from tasks.contracts.observe import ShadowReportSpec, ShadowResult
from tasks.serving.shadow_steps import compare_pairs, publish_shadow, read_pairs, read_reviews


@flow(name="shadow-report", flow_run_name="shadow report {spec.name}", persist_result=False)
def shadow_report(spec: ShadowReportSpec) -> ShadowResult:
    """Report what a shadow has answered so far, with what people said of the disagreements.

    It may be looked at as often as one likes: what it decides holds at every look.

    Args:
        spec: which comparison.
    """
    result = compare_pairs(read_pairs(read_reviews(spec), spec))
    publish_shadow(result)
    return result
