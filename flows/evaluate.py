"""Score any model on a golden set, without a verdict."""

from __future__ import annotations

from prefect import flow

from tasks.contracts.references import EvaluationRef
from tasks.contracts.spec import EvaluationSpec, ModelUri, PromptKind
from tasks.data.steps import open_golden_set
from tasks.evaluation.steps import check_engine_is_there, evaluate_system, system_of
from tasks.report.steps import publish_evaluation


@flow(name="evaluate", flow_run_name="evaluate {model}", persist_result=False)
def evaluate(
    spec: EvaluationSpec, model: ModelUri, prompt: PromptKind = PromptKind.TUNED, again: int = 0
) -> EvaluationRef:
    """Ask a model every golden item and keep each answer with its scores.

    `again` numbers a repetition, to see how much the engine's answers differ from run to run.
    """
    golden = open_golden_set(spec)
    check_engine_is_there(spec, model)
    result = evaluate_system(system_of(model, spec, prompt), golden, spec, again=again)
    if not spec.withhold_scores:
        publish_evaluation(spec, result)
    return result
