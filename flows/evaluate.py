"""Score any model on a golden set, without a verdict."""

from __future__ import annotations

from prefect import flow
from tasks.data.steps import open_golden_set
from tasks.evaluation.steps import evaluate_system, system_of
from tasks.report.steps import publish_evaluation

from tasks.contracts.references import EvaluationRef
from tasks.contracts.spec import ModelUri, RetrainSpec


@flow(name="evaluate", flow_run_name="evaluate {model}", persist_result=False)
def evaluate(spec: RetrainSpec, model: ModelUri) -> EvaluationRef:
    """Ask a model every golden item and keep each answer with its scores."""
    golden = open_golden_set(spec)
    result = evaluate_system(system_of(model, spec), golden, spec)
    publish_evaluation(spec, result)
    return result
