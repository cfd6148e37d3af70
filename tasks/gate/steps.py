"""The gate as a Prefect task."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.contracts.references import EvaluationRef, GoldenSetRef, SplitsRef, VerdictRef
from tasks.contracts.spec import RetrainSpec
from tasks.runtime import open_store, say_done


@task(name="judge", persist_result=False, cache_policy=NO_CACHE)
def judge(
    baseline: EvaluationRef, candidate: EvaluationRef, splits: SplitsRef, golden: GoldenSetRef, spec: RetrainSpec
) -> VerdictRef:
    """Give the verdict on a candidate, and keep it with the outcomes that it rests on."""
    from tasks.gate.keep import keep_verdict

    kept = keep_verdict(open_store(spec.execution), baseline, candidate, splits, golden, spec.policy)
    say_done("judge", f"{kept.verdict.outcome.value.upper()}: {kept.verdict.reasons[0]}", reused=kept.reused)
    return kept
