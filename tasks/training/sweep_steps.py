"""What a search for a recipe does in Prefect: trials side by side, the run that holds them, and what is kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from tasks.contracts.dev import DevResult
from tasks.contracts.errors import PrunedError, TrainingError
from tasks.contracts.references import BaseModelRef, SplitsRef, TrainedModelRef, TrainRequest
from tasks.contracts.spec import ExecutionSpec, TrainSpec
from tasks.contracts.sweep import PrunedRef, RetrainNoise, SweepRef, SweepSpec, Trial, TrialState
from tasks.runtime import open_store, say_done
from tasks.store import fingerprint
from tasks.training.pruned import find_pruned, read_looks

if TYPE_CHECKING:
    from tasks.tracking import TrackedRun

_SWEEP_VERSION = 1  # raise when what is kept of a search changes, or the way in which it proposes recipes

Outcome = TrainedModelRef | PrunedRef | TrainingError
Train = Callable[[TrainRequest], TrainedModelRef]


def sweep_key(spec: SweepSpec, splits: SplitsRef, base: BaseModelRef) -> str:
    """What the search is about, wherever it runs: the key of its run in MLflow."""
    return fingerprint("sweep", _SWEEP_VERSION, _config(spec), {"base": base.digest, "splits": splits.digest})


@contextmanager
def tracked_sweep(spec: SweepSpec, key: str) -> Iterator[TrackedRun]:
    """The search's run in MLflow, in which those of its trainings are nested; a search that goes on continues it."""
    from tasks.tracking import open_run

    training = spec.training
    with open_run(
        training.execution,
        training.name,
        "sweep",
        key=key,
        tags={"goldgate.step": "sweep", "goldgate.base_model": training.base_model},
        params={
            "trials": spec.trials,
            "startup_trials": spec.startup_trials,
            "prune": spec.prune,
            "at_once": spec.at_once,
            "seed": spec.seed,
            "noise_seeds": spec.noise_seeds,
            "space": spec.space.model_dump(mode="json"),
        },
    ) as run:
        yield run


def train_side_by_side(train: Train, requests: Sequence[TrainRequest]) -> list[Outcome]:
    """Have each request trained, all at the same time; what each came to, in their order.

    A training that fails is an outcome like another. What is wrong with more than one training (a store that is full, a
    server that does not answer) ends them all.
    """
    if len(requests) == 1:  # in this thread, which hears an interrupt
        return [_outcome_of(train, requests[0])]
    with ThreadPoolExecutor(max_workers=len(requests)) as pool:
        # Each thread knows the run that it belongs to by a copy of this one's context.
        running = [pool.submit(copy_context().run, _outcome_of, train, request) for request in requests]
        return [one.result() for one in running]


def _outcome_of(train: Train, request: TrainRequest) -> Outcome:
    known = find_pruned(request)
    if known is not None:
        return known
    try:
        return train(request)
    except PrunedError:
        pruned = find_pruned(request)
        if pruned is None:
            raise TrainingError(
                "A trial was given up, and nothing in the store of this run says where.",
                where=request.execution.store,
                fix="give all workers one `execution.store` that all can reach, and the same version of Goldgate",
            ) from None
        return pruned.model_copy(update={"reused": False})  # it was trained, just now
    except TrainingError as error:
        return error


def as_trial(number: int, recipe: TrainSpec, outcome: Outcome, spec: SweepSpec) -> Trial:
    """What a trial came to, as the search goes by it; said on the run's page."""
    from tasks.training.sweep import varied

    if isinstance(outcome, TrainedModelRef):
        trial = _finished(number, recipe, outcome, spec.training.execution)
        ended, reused = f"dev loss {trial.dev_loss:.4f}", outcome.reused
    elif isinstance(outcome, PrunedRef):
        trial = Trial(
            number=number,
            recipe=recipe,
            state=TrialState.PRUNED,
            dev_losses=outcome.dev_losses,
            steps=outcome.steps,
            planned_steps=outcome.planned_steps,
            reason=outcome.reason,
        )
        ended, reused = f"pruned after {trial.steps} of {trial.planned_steps} steps", outcome.reused
    else:
        trial = Trial(number=number, recipe=recipe, state=TrialState.FAILED, reason=outcome.what)
        ended, reused = f"failed: {outcome.what}", False
    own = ", ".join(f"{name} {value:g}" for name, value in varied(recipe, spec.space).items())
    say_done(f"trial {number}", f"{own}: {ended}", reused=reused)
    return trial


def _finished(number: int, recipe: TrainSpec, trained: TrainedModelRef, execution: ExecutionSpec) -> Trial:
    from tasks.training.checkpoints import CURVES

    store = open_store(execution)
    artefact = store.open(trained.uri)
    losses, _ = read_looks(store.files(artefact) / CURVES)
    facts = artefact.manifest.facts
    return Trial(
        number=number,
        recipe=recipe,
        state=TrialState.FINISHED,
        dev_losses=tuple(losses),
        dev_loss=trained.dev_loss,
        steps=trained.steps,
        planned_steps=facts["planned_steps"],
        tokens=facts["tokens"],
        seconds=trained.seconds,
        mlflow_run_id=facts["mlflow_run_id"],
    )


def trained_again(recipes: Sequence[TrainSpec], outcomes: Sequence[Outcome]) -> list[TrainedModelRef]:
    """The models of trainings that all have to be there.

    Raises:
        TrainingError: one of them failed.
    """
    models = []
    for recipe, outcome in zip(recipes, outcomes, strict=True):
        if not isinstance(outcome, TrainedModelRef):
            raise TrainingError(
                f"The winner's recipe could not be trained with the seed {recipe.seed}: "
                f"{outcome.what if isinstance(outcome, TrainingError) else outcome.reason}",
                where="noise_seeds",
                fix="run again, and finished trainings are reused; or set `noise_seeds` to 0",
            )
        models.append(outcome)
    return models


def noise_of(
    recipes: Sequence[TrainSpec], models: Sequence[TrainedModelRef], answers: Sequence[DevResult]
) -> RetrainNoise | None:
    """What another seed does to a recipe; None where it was trained once."""
    from tasks.training.sweep import spread_of

    if len(models) < 2:
        return None
    return RetrainNoise(
        seeds=tuple(recipe.seed for recipe in recipes),
        dev_loss=spread_of([model.dev_loss for model in models]),
        exact_match=spread_of([answer.metrics["exact_match"] for answer in answers]),
        dev_items=answers[0].items,
    )


@task(name="keep sweep", persist_result=False, cache_policy=NO_CACHE)
def keep_sweep(
    spec: SweepSpec,
    splits: SplitsRef,
    base: BaseModelRef,
    trials: Sequence[Trial],
    winner: Trial,
    on_dev: DevResult,
    noise: RetrainNoise | None,
) -> SweepRef:
    """Keep trials, winner and noise in the store, and show them on the page of the run."""
    from tasks.training.sweep import varied
    from tasks.training.sweep_words import sweep_markdown

    store = open_store(spec.training.execution)
    result = {"winner": winner.number, "metrics": on_dev.metrics, "dev_items": on_dev.items}
    config = {
        "sweep": _config(spec),
        "trials": list(trials),
        "noise": noise.model_dump(mode="json") if noise is not None else None,
        **result,
    }

    def make(out: Path) -> Mapping[str, Any]:
        (out / "trials.jsonl").write_text("".join(f"{trial.model_dump_json()}\n" for trial in trials), encoding="utf-8")
        asked = _config(spec) | result | {"recipe": winner.recipe.model_dump(mode="json")}
        (out / "sweep.json").write_text(json.dumps(asked, indent=2) + "\n", encoding="utf-8")
        if noise is not None:
            (out / "noise.json").write_text(noise.model_dump_json(indent=2) + "\n", encoding="utf-8")
        return {"recipe": winner.recipe.model_dump(mode="json"), "noise": config["noise"], **result}

    artefact = store.produce("sweep", _SWEEP_VERSION, config, {"base": base.digest, "splits": splits.digest}, make)
    folder = store.files(artefact)
    kept = SweepRef(
        **artefact.reference(),
        folder=str(folder),
        trials=tuple(trials),
        winner=winner.number,
        metrics=on_dev.metrics,
        noise=noise,
    )
    own = ", ".join(f"{name} {value:g}" for name, value in varied(winner.recipe, spec.space).items())
    create_markdown_artifact(
        sweep_markdown(spec, kept),
        key=f"{spec.training.name.replace('_', '-')}-sweep",
        description=f"{len(trials)} trials for {spec.training.name}: {own} is best on dev",
    )
    say_done(
        "sweep",
        f"trial {winner.number} of {len(trials)} is best on dev: {own}, dev loss {winner.dev_loss:.4f}, "
        f"exact match {on_dev.metrics['exact_match']:.3f} on {on_dev.items:,} rows",
        reused=artefact.reused,
    )
    return kept


def log_sweep(run: TrackedRun, spec: SweepSpec, result: SweepRef) -> None:
    """Keep trials, winner and noise in the search's run of MLflow."""
    from tasks.training.sweep import varied

    winner, noise = result.trials[result.winner - 1], result.noise
    run.log_table(
        "trials",
        [
            {"trial": trial.number, **varied(trial.recipe, spec.space), "state": trial.state.value}
            | trial.model_dump(mode="json", include={"dev_loss", "steps", "planned_steps", "tokens", "reason"})
            | {"mlflow_run": trial.mlflow_run_id}
            for trial in result.trials
        ],
    )
    run.set_tags(
        {"goldgate.winner": str(winner.number), "goldgate.winner_recipe": json.dumps(varied(winner.recipe, spec.space))}
    )
    if winner.dev_loss is not None:
        run.log_metrics({"best_dev_loss": winner.dev_loss})
    run.log_metrics({f"dev.{name.replace(':', '.')}": value for name, value in result.metrics.items()})
    if noise is not None:
        run.log_metrics({"noise.dev_loss": noise.dev_loss.deviation, "noise.exact_match": noise.exact_match.deviation})
    run.log_artifact(Path(result.folder), into="sweep")


def _config(spec: SweepSpec) -> dict[str, Any]:
    """What of a search its trials depend on."""
    training = spec.training
    return {
        "task": training.task.model_dump(mode="json"),
        "recipe": training.train.model_dump(mode="json"),
        **spec.model_dump(mode="json", include={"trials", "space", "startup_trials", "prune", "at_once", "seed"}),
    }
