"""A search in words: the same on the run's page and in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from tasks.contracts.numbers import metric_name, percent
from tasks.contracts.sweep import RetrainNoise, Spread, SweepRef, SweepSpec, Trial, TrialState
from tasks.training.sweep import no_different, varied

_NAMES = {"lora_rank": "rank", "learning_rate": "learning rate"}


def trials_table(spec: SweepSpec, trials: Sequence[Trial], winner: int) -> list[list[str]]:
    """The trials as rows of text, the names of the columns first; what there is not is empty."""
    own = list(varied(trials[0].recipe, spec.space))
    head = [
        "trial",
        *(_NAMES.get(name, name) for name in own),
        "dev loss",
        "steps",
        "tokens",
        "seconds",
        "how it ended",
    ]
    rows = []
    for trial in trials:
        best = trial.dev_loss if trial.dev_loss is not None else min(trial.dev_losses, default=None)
        rows.append(
            [
                str(trial.number),
                *(f"{value:g}" for value in varied(trial.recipe, spec.space).values()),
                "" if best is None else f"{best:.4f}",
                "" if trial.steps is None else f"{trial.steps} of {trial.planned_steps}",
                "" if trial.tokens is None else f"{trial.tokens:,}",
                "" if trial.seconds is None else f"{trial.seconds:,.0f}",
                _ending(trial, winner),
            ]
        )
    return [head, *rows]


def noise_sentences(noise: RetrainNoise) -> list[str]:
    """What another seed does to the winner, and what follows for differences."""
    match, loss = noise.exact_match, noise.dev_loss
    seeds = ", ".join(str(seed) for seed in noise.seeds)
    values = ", ".join(percent(value) for value in match.values)
    said = [f"{len(noise.seeds)} trainings of the winner, with the seeds {seeds}: dev exact match {values}."]
    said.append(noise.sentence())
    if match.deviation > 0:
        said.append(
            f"From {len(noise.seeds)} trainings the ±{_points(match.deviation)} is itself known only roughly: "
            f"{_points(match.deviation_low)} to {_points(match.deviation_high)} (95 %)."
        )
    said.append(f"Dev loss: {_numbers(loss)}. The first seed is the one that was chosen for its dev loss.")
    return said


def winner_sentences(spec: SweepSpec, result: SweepRef) -> list[str]:
    """Which trial is best, what it reaches on dev, and which others may be as good."""
    winner = result.trials[result.winner - 1]
    own = ", ".join(f"{_NAMES.get(name, name)} {value:g}" for name, value in varied(winner.recipe, spec.space).items())
    metrics = ", ".join(
        f"{metric_name(name).lower()} {percent(value)}" for name, value in result.metrics.items() if ":" not in name
    )
    said = [f"Trial {winner.number} is best on dev: {own}; dev loss {winner.dev_loss:.4f}, {metrics}."]
    finished = [trial for trial in result.trials if trial.state is TrialState.FINISHED]
    if result.noise is not None and len(finished) > 1:
        near = no_different(result.trials, winner, result.noise)
        reach = result.noise.dev_loss.between_two
        if near:
            numbers = ", ".join(str(trial.number) for trial in near)
            said.append(
                f"Trial{'s' if len(near) > 1 else ''} {numbers} may be as good: the dev loss is higher by less than "
                f"{reach:.4f}, which is what another seed moves."
            )
        else:
            said.append(f"Every other finished trial is behind by more than another seed moves ({reach:.4f}).")
    said.append(
        "Dev has chosen the winner, so what it reaches there is a little too good. No golden item was looked at."
    )
    return said


def sweep_markdown(spec: SweepSpec, result: SweepRef) -> str:
    """The page of a search."""
    head, *rows = trials_table(spec, result.trials, result.winner)
    lines = [
        f"# A search over {len(result.trials)} recipes",
        "",
        *(f"{sentence}\n" for sentence in winner_sentences(spec, result)),
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows),
        "",
    ]
    if result.noise is not None:
        lines += ["## Retrain noise", "", *(f"{sentence}\n" for sentence in noise_sentences(result.noise))]
    lines.append(f"Kept in `{result.folder}`.")
    return "\n".join(lines)


def _ending(trial: Trial, winner: int) -> str:
    match trial.state:
        case TrialState.FINISHED:
            return "winner" if trial.number == winner else "finished"
        case TrialState.PRUNED:
            return f"pruned at look {len(trial.dev_losses)}"
        case TrialState.FAILED:
            return f"failed: {(trial.reason or '').splitlines()[0]}"


def _points(share: float) -> str:
    return percent(share).removesuffix(" %")


def _numbers(spread: Spread) -> str:
    values = ", ".join(f"{value:.4f}" for value in spread.values)
    return f"{values} (mean {spread.mean:.4f}, standard deviation {spread.deviation:.4f})"
