"""The Prefect task that compares two models on dev."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.contracts.dev import DevResult
from tasks.contracts.numbers import metric_name, points
from tasks.contracts.references import ItemOutcome, MetricComparison
from tasks.contracts.spec import RetrainSpec
from tasks.runtime import open_store, say_done


@task(name="compare on dev", persist_result=False, cache_policy=NO_CACHE)
def compare_dev(before: DevResult, after: DevResult, spec: RetrainSpec) -> tuple[MetricComparison, ...]:
    """Every metric of both on the same dev rows with paired 95 % intervals, the policy's first.

    Raises:
        NotComparableError: the two were not asked the same rows.
    """
    from tasks.gate.dev_effect import compare_on_dev

    found = compare_on_dev(_outcomes(before, spec), _outcomes(after, spec), spec.policy.metric, spec.task.labels)
    first = found[0]
    summary = f"{metric_name(first.metric)} {points(first.difference)} ({points(first.low)} to {points(first.high)})"
    say_done("compare on dev", f"{summary} on {first.n:,} rows", reused=False)
    return found


def _outcomes(result: DevResult, spec: RetrainSpec) -> list[ItemOutcome]:
    store = open_store(spec.execution)
    with (store.files(store.open(result.uri)) / "items.jsonl").open(encoding="utf-8") as lines:
        return [ItemOutcome.model_validate_json(line) for line in lines]
