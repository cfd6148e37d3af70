"""What the preference stage takes and hands on: pairs from dev, the tuned model, and what it did on held-out dev."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from tasks.contracts.dev import DevResult
from tasks.contracts.references import (
    ArtefactRef,
    BaseModelRef,
    MetricComparison,
    SplitsRef,
    TrainedModelRef,
)
from tasks.contracts.spec import ExecutionSpec, Frozen, PreferenceSpec, RetrainSpec, TaskSpec, TrainSpec


class PairsRef(ArtefactRef):
    """Preference pairs (`pairs.jsonl`): a dev row, whose target is chosen, and the model's own wrong answer, rejected.

    Attributes:
        asked: rows of the mined part of dev.
        wrong: those that the model got wrong.
        pairs: those of them that make a pair.
        too_few: why the stage stops here; None where there are pairs enough.
    """

    kind: Literal["pairs"] = "pairs"
    asked: int
    wrong: int
    pairs: int
    too_few: str | None = None


class PreferRequest(Frozen):
    """Everything that preference tuning needs, wherever it runs."""

    name: str
    task: TaskSpec
    splits: SplitsRef
    base: BaseModelRef
    trained: TrainedModelRef
    pairs: PairsRef
    recipe: TrainSpec
    preference: PreferenceSpec
    execution: ExecutionSpec

    @classmethod
    def of(
        cls, spec: RetrainSpec, splits: SplitsRef, base: BaseModelRef, trained: TrainedModelRef, pairs: PairsRef
    ) -> PreferRequest:
        """The stage that a whole run asks for."""
        return cls(
            name=spec.name,
            task=spec.task,
            splits=splits,
            base=base,
            trained=trained,
            pairs=pairs,
            recipe=spec.train,
            preference=spec.preference or PreferenceSpec(),
            execution=spec.execution,
        )


class DevEffect(StrEnum):
    """What a change did on held-out dev, by the interval of the difference."""

    GAIN = "gain"
    LOSS = "loss"
    NONE_SHOWN = "none_shown"
    NOT_TUNED = "not_tuned"


class PreferResult(Frozen):
    """What the preference stage did.

    Attributes:
        trained: the model before.
        tuned: the model after; None where there was nothing to learn from.
        before: answers of `trained` to held-out dev.
        after: answers of `tuned` to the same rows.
        comparisons: each metric before and after with the interval of the difference, the deciding one first.
        effect: what the deciding metric says.
        sentence: the same in words.
    """

    name: str
    trained: TrainedModelRef
    tuned: TrainedModelRef | None
    pairs: PairsRef
    before: DevResult
    after: DevResult | None
    comparisons: tuple[MetricComparison, ...]
    effect: DevEffect
    sentence: str
