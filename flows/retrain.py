"""From raw rows to a registered model, or to an honest rejection."""

from __future__ import annotations

from prefect import flow
from prefect.client.schemas.objects import State

from flows.prefer import prefer_further
from flows.train import train_where_told
from tasks.contracts.references import Approval, RunResult, TrainRequest
from tasks.contracts.spec import Override, RetrainSpec
from tasks.data.steps import (
    curate_dataset,
    ingest_dataset,
    open_golden_set,
    open_suites,
    report_data,
    validate_dataset,
)
from tasks.evaluation.dev_steps import ask_dev, dev_outcomes
from tasks.evaluation.steps import (
    candidate_system,
    check_engine_is_there,
    choose_baseline_prompt,
    evaluate_on_suites,
    evaluate_system,
)
from tasks.gate.steps import certify_promotion, check_budget, check_gate, decide_release, judge
from tasks.registry.steps import find_system_to_beat, register_champion, release_of_baseline
from tasks.report.steps import named_state, publish_verdict, retrain_run_name, write_run_folder
from tasks.serving.steps import announce_promotion
from tasks.serving.trust_steps import has_trust, learn_trust, part_to_learn_from
from tasks.training.prefer_steps import check_can_prefer
from tasks.training.steps import check_training_device, fetch_base_model


@flow(name="retrain", flow_run_name=retrain_run_name, persist_result=False)
def retrain(
    spec: RetrainSpec, override: Override | None = None, approval: Approval | None = None, reason: str | None = None
) -> State[RunResult]:
    """Train a candidate, compare it with what runs today on the golden set, and register it only if it is better.

    Ends Completed under the name of what came of it: Promoted, Rejected, Inconclusive, Awaiting approval, Declined, or
    Forced promotion.

    Args:
        spec: everything that the run needs to know.
        override: promotes against the verdict; kept under that person's name.
        approval: answers where the policy asks a person; kept under that person's name.
        reason: why it was started; stands in the run's name.
    """
    asked = spec.evaluation()
    golden = open_golden_set(asked)  # first: what can be refused is refused before any compute is spent
    suites = open_suites(spec)
    if spec.preference is not None:
        check_can_prefer(spec)
    check_gate(golden, spec)
    check_engine_is_there(asked, spec.base_model)
    check_training_device(spec)
    raw = ingest_dataset(spec)
    base = fetch_base_model(spec)  # its tokenizer says how long a row is
    valid = validate_dataset(raw, base, spec)
    splits = curate_dataset(valid, golden, spec)
    data_page = report_data(raw, valid, splits, spec)

    check_budget(golden, splits, base, spec)
    trained = train_where_told(TrainRequest.of(spec, splits, base))
    if spec.preference is not None:
        trained = prefer_further(trained, splits, base, spec)

    candidate = candidate_system(trained, spec)
    baseline = find_system_to_beat(trained, spec) or choose_baseline_prompt(spec, base, splits)
    baseline_result = evaluate_system(baseline, golden, asked)
    candidate_result = evaluate_system(candidate, golden, asked)
    baseline_suites = evaluate_on_suites(baseline, suites, spec)
    candidate_suites = evaluate_on_suites(candidate, suites, spec)

    verdict = judge(baseline_result, candidate_result, baseline_suites, candidate_suites, splits, trained, golden, spec)
    release = decide_release(verdict, spec, override, approval)
    registered = trust = None
    if release.promoted:
        if has_trust(spec):  # not before: how far a rejected candidate could be trusted is nobody's question
            dev = ask_dev(candidate, splits, spec, part_to_learn_from(spec))
            trust = learn_trust(dev, dev_outcomes(dev, spec.execution), spec)
        certificate = certify_promotion(verdict, release, trained, golden, trust, spec)
        registered = register_champion(verdict, certificate, trained, spec, trust)
        announce_promotion(registered, spec)

    placed = release_of_baseline(baseline, spec)
    folder = write_run_folder(
        spec, raw, valid, splits, trained, baseline_result, candidate_result, verdict, release, registered, placed,
        data_page, trust,
    )  # fmt: skip
    publish_verdict(spec, verdict, release, registered, valid, folder, placed, data_page, trust)
    return named_state(spec, verdict, release, registered, folder)
