"""A search for a recipe, told by its trials alone: which recipe is next, when one is given up, which one wins. Pure.

Nothing is kept between two questions. The next recipe follows from the search's seed and from the trials so far, so a
killed search that finds its trials again goes on as if nothing had happened.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from tasks.contracts.errors import TrainingError
from tasks.contracts.references import DevLossLimit
from tasks.contracts.spec import TrainSpec
from tasks.contracts.sweep import RetrainNoise, SearchSpace, Spread, SweepSpec, Trial, TrialState

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

_ASKS = 100  # proposals after which a space that only brings known recipes counts as exhausted
_DIGITS = 3  # of a learning rate: nobody can tell recipes apart that differ by less
_CONFIDENCE = 0.95


def next_recipes(spec: SweepSpec, trials: Sequence[Trial]) -> list[TrainSpec]:
    """The recipes to try next, at most `at_once` of them; none when the search is over.

    Optuna's tree-structured Parzen estimator (Bergstra et al. 2011) proposes. A pruned trial counts for what it had
    reached, a failed one as worst. A recipe is proposed once; a space without a new one ends the search.
    """
    wanted = min(spec.at_once, spec.trials - len(trials))
    if wanted < 1:
        return []
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it would announce every study, and there is one a question
    try:
        import numpy as np

        draw = int(np.random.SeedSequence([spec.seed, len(trials)]).generate_state(1)[0])
        sampler = optuna.samplers.TPESampler(n_startup_trials=spec.startup_trials, seed=draw)
        study = optuna.create_study(direction="minimize", sampler=sampler)
        space = _distributions(spec.space)
        for trial in trials:
            study.add_trial(_as_told(trial, space))
        known, recipes = [trial.recipe for trial in trials], []
        for _ in range(_ASKS):
            recipe = spec.training.train.model_copy(update=_values(study.ask(space).params, spec.space))
            if recipe not in known:
                known.append(recipe)
                recipes.append(recipe)
            if len(recipes) == wanted:
                break
        return recipes
    finally:
        optuna.logging.set_verbosity(level)


def stop_limits(spec: SweepSpec, recipe: TrainSpec, trials: Sequence[Trial]) -> tuple[DevLossLimit, ...]:
    """At which looks the next trial is given up, and from which dev loss.

    The rule of Optuna's MedianPruner, but that both sides are the best so far: a trial is given up where its best dev
    loss is above the median of the finished trials' best at the same look. A finished trial that stopped early stays at
    its best. Looks are compared by their number: at the same share of the training, where the cosine schedule stands
    the same, and not after as many rows. There is no limit at the last look, where nothing is left to save, nor before
    `startup_trials` have finished.
    """
    finished = [trial for trial in trials if trial.state is TrialState.FINISHED]
    if not spec.prune or len(finished) < spec.startup_trials:
        return ()
    best = [list(accumulate(trial.dev_losses, min)) for trial in finished]
    return tuple(
        DevLossLimit(look=look, dev_loss=statistics.median(losses[min(look, len(losses)) - 1] for losses in best))
        for look in range(1, recipe.evaluations)
    )


def check_trials(spec: SweepSpec, trials: Sequence[Trial]) -> None:
    """End a search that goes wrong from the start.

    Raises:
        TrainingError: as many trials as are drawn at random, or all of them, have failed, and no other has ended.
    """
    if not trials or any(trial.state is not TrialState.FAILED for trial in trials):
        return
    if len(trials) >= min(spec.startup_trials, spec.trials):
        reasons = dict.fromkeys(str(trial.reason) for trial in trials)
        raise TrainingError(
            f"All {len(trials)} trials failed: {'; '.join(reasons)}",
            where="space",
            fix="train the recipe on its own first (`goldgate run`), then search around one that works",
        )


def pick_winner(trials: Sequence[Trial]) -> Trial:
    """The finished trial with the lowest dev loss; of equal ones that with the fewest tokens, then the first.

    Raises:
        TrainingError: none has finished.
    """
    finished = [trial for trial in trials if trial.state is TrialState.FINISHED]
    if not finished:
        raise TrainingError(
            "No trial has finished.", where="space", fix="narrow `space` around a recipe that is known to work"
        )
    return min(finished, key=lambda trial: (_loss(trial), trial.tokens or 0, trial.number))


def noise_recipes(spec: SweepSpec, winner: Trial) -> list[TrainSpec]:
    """The winner's recipe with its own seed and with the seeds after it."""
    seed = winner.recipe.seed
    return [winner.recipe.model_copy(update={"seed": (seed + number) % 2**31}) for number in range(spec.noise_seeds)]


def spread_of(values: Sequence[float]) -> Spread:
    """Mean and standard deviation, with 95 % bounds of the deviation: s·sqrt((n − 1) / χ²), n − 1 degrees of freedom.

    Raises:
        ValueError: fewer than two values.
    """
    deviation = statistics.stdev(values)
    if len(set(values)) == 1:
        deviation = low = high = 0.0
    else:
        from scipy.stats import chi2

        freedom, tail = len(values) - 1, (1 - _CONFIDENCE) / 2
        low, high = (deviation * math.sqrt(freedom / chi2.ppf(share, freedom)) for share in (1 - tail, tail))
    return Spread(
        values=tuple(values),
        mean=statistics.fmean(values),
        deviation=deviation,
        deviation_low=float(low),
        deviation_high=float(high),
    )


def no_different(trials: Sequence[Trial], winner: Trial, noise: RetrainNoise) -> list[Trial]:
    """The finished trials that are behind the winner by no more than another seed may move."""
    reach = noise.dev_loss.between_two
    return [
        trial
        for trial in trials
        if trial.state is TrialState.FINISHED
        and trial.number != winner.number
        and _loss(trial) - _loss(winner) <= reach
    ]


def varied(recipe: TrainSpec, space: SearchSpace) -> dict[str, Any]:
    """What a recipe has of its own in this space."""
    names = [*space.choices, *(["learning_rate"] if space.learning_rate is not None else [])]
    return {name: getattr(recipe, name) for name in TrainSpec.model_fields if name in names}


def _loss(trial: Trial) -> float:
    return math.inf if trial.dev_loss is None else trial.dev_loss


def _distributions(space: SearchSpace) -> dict[str, BaseDistribution]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    found: dict[str, BaseDistribution] = {
        name: CategoricalDistribution(values) for name, values in space.choices.items()
    }
    rates = space.learning_rate
    if rates is not None:
        found["learning_rate"] = FloatDistribution(rates.low, rates.high, log=True)
    return found


def _values(proposed: dict[str, Any], space: SearchSpace) -> dict[str, Any]:
    """What was proposed, as a recipe has it: a learning rate with three digits that is still in its range."""
    rates = space.learning_rate
    if rates is None:
        return proposed
    rounded = float(f"{proposed['learning_rate']:.{_DIGITS}g}")
    return proposed | {"learning_rate": min(max(rounded, rates.low), rates.high)}


def _as_told(trial: Trial, space: dict[str, BaseDistribution]) -> FrozenTrial:
    """A trial as Optuna knows it. One that failed is pruned before its first look: worse than any other."""
    from optuna.trial import TrialState as Told
    from optuna.trial import create_trial

    finished = trial.state is TrialState.FINISHED
    return create_trial(
        params={name: getattr(trial.recipe, name) for name in space},
        distributions=space,
        value=_loss(trial) if finished else None,
        state=Told.COMPLETE if finished else Told.PRUNED,
        intermediate_values=dict(enumerate(accumulate(trial.dev_losses, min), start=1)),
    )
