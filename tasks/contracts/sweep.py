"""A small search over recipes: what a person sets, and what comes of it."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from tasks.contracts.numbers import percent
from tasks.contracts.references import ArtefactRef, RunResult
from tasks.contracts.spec import Frozen, RetrainSpec, TrainMethod, TrainSpec, knob


class LearningRates(Frozen):
    """A range of learning rates, searched on a logarithmic scale."""

    low: float = knob(0, "Smallest learning rate.", default=1e-4, gt=0.0, le=1e-2)
    high: float = knob(1, "Largest learning rate.", default=1e-3, gt=0.0, le=1e-2)

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.low >= self.high:
            raise ValueError("low must be below high; for one rate alone set `train.learning_rate` and leave this out")
        return self


class SearchSpace(Frozen):
    """What trials differ in; what is left empty is as the recipe says."""

    lora_rank: tuple[Annotated[int, Field(ge=1, le=256)], ...] = knob(
        0, "Ranks to choose from; empty takes the recipe's.", default=(8, 16, 32)
    )
    learning_rate: LearningRates | None = knob(
        1, "Range of learning rates; none takes the recipe's.", default=LearningRates()
    )
    epochs: tuple[Annotated[float, Field(gt=0.0, le=50.0)], ...] = knob(
        2, "Passes over the rows to choose from; empty takes the recipe's.", default=()
    )
    seed: tuple[Annotated[int, Field(ge=0, le=2**31 - 1)], ...] = knob(
        3,
        "Seeds to choose from; empty takes the recipe's. The best of several seeds is mostly the luckiest.",
        default=(),
    )

    @property
    def choices(self) -> dict[str, tuple[Any, ...]]:
        """The fields of the recipe that are chosen from a list, with the list."""
        lists: dict[str, tuple[Any, ...]] = {"lora_rank": self.lora_rank, "epochs": self.epochs, "seed": self.seed}
        return {name: values for name, values in lists.items() if values}

    @model_validator(mode="after")
    def _varies(self) -> Self:
        for name, values in self.choices.items():
            if len(set(values)) != len(values):
                raise ValueError(f"{name} names a value twice")
        recipes = 1
        for values in self.choices.values():
            recipes *= len(values)
        if self.learning_rate is None and recipes == 1:
            raise ValueError("the space holds one recipe only; give a range of learning rates, or several values")
        return self


class SweepSpec(Frozen):
    """A search for a recipe: trials are compared on dev, and the golden set is left alone."""

    trials: int = knob(0, "How many recipes are tried.", default=8, ge=2, le=500)
    space: SearchSpace = knob(1, "What they differ in.", default=SearchSpace())
    startup_trials: int = knob(
        2, "So many are drawn at random and trained to their end, before others are chosen or given up by them.",
        default=4, ge=1, le=500,
    )  # fmt: skip
    prune: bool = knob(
        3,
        "Give up a trial whose best dev loss is above the median of the finished ones at the same look.",
        default=True,
    )
    at_once: int = knob(
        4, "Trials that run at the same time; more than one needs as many devices.", default=1, ge=1, le=64
    )
    seed: int = knob(5, "Seed of the search: the same one tries the same recipes.", default=17, ge=0, le=2**31 - 1)
    noise_seeds: int = knob(
        6, "Trainings of the winner, each with another seed, that show how much chance moves; 0 leaves them out.",
        default=3, ge=0, le=20,
    )  # fmt: skip
    then_gate: bool = knob(7, "Send the winner through the gate: a look at the golden set.", default=False)
    training: RetrainSpec = knob(8, "The training that is searched: everything but what `space` varies.")

    @model_validator(mode="after")
    def _can_be_trained(self) -> Self:
        if self.noise_seeds == 1:
            raise ValueError("noise_seeds is 1, and one training shows no noise; set 0, or 2 and more")
        if self.training.train.method is TrainMethod.FULL and self.space.lora_rank:
            raise ValueError("method full trains no adapter; leave `space.lora_rank` empty")
        return self

    def extremes(self) -> tuple[TrainSpec, ...]:
        """The recipe at the highest and at the lowest learning rate, between which all trials lie for the guards."""
        rates = self.space.learning_rate
        if rates is None:
            return (self.training.train,)
        return tuple(self.training.train.model_copy(update={"learning_rate": rate}) for rate in (rates.high, rates.low))

    def with_recipe(self, recipe: TrainSpec) -> RetrainSpec:
        """The whole training with this recipe."""
        return self.training.model_copy(update={"train": recipe})


class PrunedRef(ArtefactRef):
    """A training that was given up at a look, as the request asked (`curves.jsonl`).

    Attributes:
        reason: why, in one sentence.
        dev_losses: dev loss at each look, nats per answer token; the last one is the look at which it was given up.
        steps: optimiser steps taken.
        planned_steps: how many it would have taken.
    """

    kind: Literal["pruned"] = "pruned"
    reason: str
    dev_losses: tuple[float, ...]
    steps: int
    planned_steps: int


class TrialState(StrEnum):
    """How a trial ended."""

    FINISHED = "finished"
    PRUNED = "pruned"
    FAILED = "failed"


class Trial(Frozen):
    """One recipe and what came of it.

    Attributes:
        number: from 1, in the order in which they were proposed.
        recipe: what was trained.
        state: how it ended.
        dev_losses: dev loss at each look, nats per answer token.
        dev_loss: the best of them; None where the trial did not finish.
        steps: optimiser steps taken; `planned_steps` it would have taken. None where it failed.
        tokens: trained on, prompts and answers; None where it did not finish.
        seconds: wall time of training, when it was trained; None where it did not finish.
        reason: why it was pruned or failed.
        mlflow_run_id: its run; None where it did not finish.
    """

    number: int
    recipe: TrainSpec
    state: TrialState
    dev_losses: tuple[float, ...] = ()
    dev_loss: float | None = None
    steps: int | None = None
    planned_steps: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    reason: str | None = None
    mlflow_run_id: str | None = None


class Spread(Frozen):
    """A few values of one quantity, and how far they lie apart.

    Attributes:
        values: as measured.
        mean: their mean.
        deviation: their standard deviation (n − 1).
        deviation_low: 95 % confidence bounds of the deviation, were the values normally distributed: from three values
            it is known only roughly. 0 where all values are the same.
        deviation_high: the upper bound.
    """

    values: tuple[float, ...]
    mean: float
    deviation: float
    deviation_low: float
    deviation_high: float

    @property
    def between_two(self) -> float:
        """How far two of them typically lie apart: sqrt(2) standard deviations."""
        return math.sqrt(2) * self.deviation


class RetrainNoise(Frozen):
    """What another seed does to the same recipe (`noise.json`).

    Attributes:
        seeds: the first is the winner's own, which was chosen for its dev loss.
        dev_loss: best dev loss of each training, nats per answer token.
        exact_match: share of the dev rows answered exactly right by each.
        dev_items: how many rows these are.
    """

    seeds: tuple[int, ...]
    dev_loss: Spread
    exact_match: Spread
    dev_items: int

    def sentence(self) -> str:
        """What follows for differences of exact match."""
        match = self.exact_match
        if match.deviation == 0:
            return (
                f"Another seed changed nothing in how many of the {self.dev_items:,} dev rows are answered right "
                f"({len(self.seeds)} trainings). That does not show that it never does."
            )
        moves, apart = (percent(share).removesuffix(" %") for share in (match.deviation, match.between_two))
        return (
            f"A retrain with another seed moves dev exact match by about ±{moves} points (standard deviation of "
            f"{len(self.seeds)} trainings, {self.dev_items:,} rows). Two trainings that differ in nothing but their "
            f"seed lie about {apart} points apart; a difference below that between two recipes is no difference."
        )


class SweepRef(ArtefactRef):
    """A finished search: `trials.jsonl`, `sweep.json`, and `noise.json` where noise was asked for.

    Attributes:
        folder: where these files are.
        trials: in the order in which they were proposed.
        winner: the number of the best one.
        metrics: of the winner on dev, each in [0, 1].
        noise: what another seed does to the winner.
        gate: what the gate said of the winner, where it was asked.
    """

    kind: Literal["sweep"] = "sweep"
    folder: str
    trials: tuple[Trial, ...]
    winner: int
    metrics: dict[str, float]
    noise: RetrainNoise | None
    gate: RunResult | None = None
