"""Training answers rewritten by a teacher: train on both, and compare on dev."""

from __future__ import annotations

from prefect import flow

from flows.train import train_where_told
from tasks.contracts.distill import DistillResult, DistillSpec
from tasks.contracts.references import TrainRequest
from tasks.data.distill.steps import report_distillation, rewrite_training_answers
from tasks.data.steps import curate_dataset, ingest_dataset, open_golden_set, validate_dataset
from tasks.evaluation.dev_steps import ask_dev
from tasks.evaluation.steps import candidate_system, check_engine_is_there
from tasks.gate.dev_steps import compare_dev
from tasks.training.steps import fetch_base_model


@flow(name="distill", flow_run_name="distill {spec.training.name}", persist_result=False)
def distill(spec: DistillSpec) -> DistillResult:
    """Have a teacher rewrite the answers of the training rows, train on both versions, and say what it did on dev.

    The teacher is shown training rows that passed validation, never one of dev or of the golden set. Dev keeps its
    answers, so both models are asked the same. The golden set is not asked: what is better on dev is sent to the gate
    as a run of its own, on the rewritten rows as its source.
    """
    training = spec.training
    golden = open_golden_set(training.evaluation())
    check_engine_is_there(training.evaluation(), training.base_model)
    raw = ingest_dataset(training)
    base = fetch_base_model(training)
    valid = validate_dataset(raw, base, training)
    splits = curate_dataset(valid, golden, training)
    rewritten = rewrite_training_answers(splits, valid, golden, base, spec)

    on_original = train_where_told(TrainRequest.of(training, splits, base))
    on_rewritten = train_where_told(TrainRequest.of(training, rewritten.splits, base))

    # Both are asked the dev rows of the original splits, which are those of the rewritten ones byte for byte.
    before = ask_dev(candidate_system(on_original, training), splits, training)
    after = ask_dev(candidate_system(on_rewritten, training), splits, training)
    comparisons = compare_dev(before, after, training)
    return report_distillation(spec, rewritten, (on_original, on_rewritten), (before, after), comparisons)
