"""A second stage of training on what the first gets wrong on dev, and what it did on dev rows that it never saw."""

from __future__ import annotations

from prefect import flow

from flows.train import train_where_told, tune_where_told
from tasks.contracts.dev import DevPart
from tasks.contracts.prefer import PairsRef, PreferRequest, PreferResult
from tasks.contracts.references import BaseModelRef, SplitsRef, TrainedModelRef, TrainRequest
from tasks.contracts.spec import RetrainSpec
from tasks.data.steps import curate_dataset, ingest_dataset, open_golden_set, validate_dataset
from tasks.evaluation.dev_steps import ask_dev
from tasks.evaluation.steps import candidate_system, check_engine_is_there
from tasks.gate.dev_steps import compare_dev
from tasks.report.preference import conclude, publish_preference
from tasks.training.prefer_steps import check_can_prefer, mine_pairs
from tasks.training.steps import fetch_base_model


@flow(name="prefer", flow_run_name="prefer {spec.name}", persist_result=False)
def prefer(spec: RetrainSpec) -> PreferResult:
    """Train, mine pairs from one part of dev, tune on them (DPO), and compare before and after on the other part.

    The golden set is opened so that its items are taken out of the data, and for nothing else: no model is asked one.
    Nothing is registered; `preference` in the configuration of `retrain` sends the tuned model to the gate.
    """
    check_can_prefer(spec)
    asked = spec.evaluation()
    golden = open_golden_set(asked)
    check_engine_is_there(asked, spec.base_model)
    raw = ingest_dataset(spec)
    base = fetch_base_model(spec)
    valid = validate_dataset(raw, base, spec)
    splits = curate_dataset(valid, golden, spec)

    trained = train_where_told(TrainRequest.of(spec, splits, base))
    before = ask_dev(candidate_system(trained, spec), splits, spec, DevPart.HELD_OUT)
    pairs = _pairs_of(trained, splits, spec)
    if pairs.too_few:
        result = conclude(spec, trained, None, pairs, before, None, ())
    else:
        tuned = tune_where_told(PreferRequest.of(spec, splits, base, trained, pairs))
        after = ask_dev(candidate_system(tuned, spec), splits, spec, DevPart.HELD_OUT)
        compared = compare_dev(before, after, spec)
        result = conclude(spec, trained, tuned, pairs, before, after, compared)
    publish_preference(result)
    return result


def prefer_further(
    trained: TrainedModelRef, splits: SplitsRef, base: BaseModelRef, spec: RetrainSpec
) -> TrainedModelRef:
    """The tuned model; `trained` itself where it got too few dev rows wrong to learn from, which is logged."""
    pairs = _pairs_of(trained, splits, spec)
    if pairs.too_few:
        return trained
    return tune_where_told(PreferRequest.of(spec, splits, base, trained, pairs))


def _pairs_of(trained: TrainedModelRef, splits: SplitsRef, spec: RetrainSpec) -> PairsRef:
    return mine_pairs(ask_dev(candidate_system(trained, spec), splits, spec, DevPart.MINED), splits, spec)
