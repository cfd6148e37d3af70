"""From raw rows to a registered model, or to an honest rejection."""

from __future__ import annotations

from prefect import flow
from prefect.client.schemas.objects import State

from flows.train import train_where_told
from tasks.contracts.references import Outcome, RunResult, TrainRequest
from tasks.contracts.spec import RetrainSpec
from tasks.data.steps import curate_dataset, ingest_dataset, open_golden_set, validate_dataset
from tasks.evaluation.steps import candidate_system, check_engine_is_there, choose_baseline_prompt, evaluate_system
from tasks.gate.steps import judge
from tasks.registry.steps import find_system_to_beat, register_champion
from tasks.report.steps import named_state, publish_verdict, write_run_folder
from tasks.training.steps import fetch_base_model


@flow(name="retrain", flow_run_name="retrain {spec.name}", persist_result=False)
def retrain(spec: RetrainSpec) -> State[RunResult]:
    """Train a candidate, compare it with what runs today on the golden set, and register it only if it is better.

    Ends Completed under the verdict's name: Promoted, Rejected or Inconclusive.
    """
    asked = spec.evaluation()
    golden = open_golden_set(asked)  # first: a changed golden set stops the run before any compute is spent
    check_engine_is_there(asked, spec.base_model)
    raw = ingest_dataset(spec)
    valid = validate_dataset(raw, spec)
    splits = curate_dataset(valid, golden, spec)

    base = fetch_base_model(spec)
    trained = train_where_told(TrainRequest.of(spec, splits, base))

    candidate = candidate_system(trained, spec)
    baseline = find_system_to_beat(trained, spec) or choose_baseline_prompt(spec, base, splits)
    baseline_result = evaluate_system(baseline, golden, asked)
    candidate_result = evaluate_system(candidate, golden, asked)

    verdict = judge(baseline_result, candidate_result, splits, golden, spec)
    promoted = verdict.verdict.outcome is Outcome.PROMOTE
    registered = register_champion(verdict, trained, spec) if promoted else None

    folder = write_run_folder(spec, raw, valid, splits, trained, baseline_result, candidate_result, verdict, registered)
    publish_verdict(spec, verdict, registered, valid, folder)
    return named_state(spec, verdict, registered, folder)
