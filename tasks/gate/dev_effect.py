"""Two models on the same dev rows, by the gate's own statistics. No verdict: dev decides nothing, and is no look."""

from __future__ import annotations

from collections.abc import Sequence

from tasks.contracts.references import ItemOutcome, MetricComparison
from tasks.contracts.spec import Policy
from tasks.gate.comparable import check_outcomes
from tasks.gate.decide import compare_metrics
from tasks.gate.effects import difference_of
from tasks.gate.pairs import make_pairs

LEVEL = 0.025  # one-sided, of each end: the intervals hold 95 %


def compare_on_dev(
    before: Sequence[ItemOutcome], after: Sequence[ItemOutcome], metric: str, labels: Sequence[str]
) -> tuple[MetricComparison, ...]:
    """Every metric of both models, `metric` first, then its slices; paired, with 95 % intervals, `before` as baseline.

    Args:
        before: outcomes of the model that is compared with.
        after: outcomes of the other one, on the same rows.
        metric: the one that decides.
        labels: the classes there are (classify); empty for none.

    Raises:
        NotComparableError: the two do not hold the same rows, or do not have the metric.
    """
    left, right = check_outcomes(before, after)
    pairs = make_pairs(left, right, labels)
    deciding = difference_of(pairs, metric, LEVEL)
    return compare_metrics(pairs, {}, Policy(metric=metric), LEVEL, deciding)
