"""A small search for a recipe, judged on dev; only its winner may look at the golden set."""

from __future__ import annotations

from prefect import flow

from flows.retrain import retrain
from flows.train import train_where_told
from tasks.contracts.references import RunResult, TrainRequest
from tasks.contracts.spec import TrainSpec
from tasks.contracts.sweep import SweepRef, SweepSpec, Trial
from tasks.data.steps import curate_dataset, ingest_dataset, open_golden_set, validate_dataset
from tasks.evaluation.dev_steps import ask_dev
from tasks.evaluation.steps import candidate_system, check_engine_is_there
from tasks.gate.steps import check_gate
from tasks.training.steps import check_training_device, fetch_base_model
from tasks.training.sweep import check_trials, next_recipes, noise_recipes, pick_winner, stop_limits
from tasks.training.sweep_steps import (
    as_trial,
    keep_sweep,
    log_sweep,
    noise_of,
    sweep_key,
    tracked_sweep,
    train_side_by_side,
    trained_again,
)


@flow(name="sweep", flow_run_name="sweep {spec.training.name}", persist_result=False)
def sweep(spec: SweepSpec) -> SweepRef:
    """Try recipes, each a training of its own, and keep the one with the lowest dev loss.

    A trial that is worse than the others were by then is given up. The winner is trained again with other seeds, to see
    how much chance moves. The golden set is opened to keep its items out of the data, and read no more unless the spec
    sends the winner through the gate. A search that was killed goes on: finished and pruned trials are found again.
    """
    training = spec.training
    asked = training.evaluation()
    golden = open_golden_set(asked)
    if spec.then_gate:
        check_gate(golden, training)
    check_engine_is_there(asked, training.base_model)
    check_training_device(training)
    raw = ingest_dataset(training)
    base = fetch_base_model(training)
    valid = validate_dataset(raw, base, training)
    # The guards look at the learning rate, and the splits say what they found: all that there will be are made here,
    # and each trial finds its own. So the winner's are those that a run of its own has, which then reuses the training.
    curated = [curate_dataset(valid, golden, spec.with_recipe(one)) for one in spec.extremes()]
    alike = len({splits.digest for splits in curated}) == 1
    key = sweep_key(spec, curated[0], base)

    def request(recipe: TrainSpec, trials: list[Trial] | None = None) -> TrainRequest:
        splits = curated[0] if alike else curate_dataset(valid, golden, spec.with_recipe(recipe))
        limits = stop_limits(spec, recipe, trials) if trials is not None else ()
        whole = TrainRequest.of(spec.with_recipe(recipe), splits, base)
        return whole.model_copy(update={"stop_above": limits, "within": key})

    with tracked_sweep(spec, key) as run:
        trials: list[Trial] = []
        while recipes := next_recipes(spec, trials):
            outcomes = train_side_by_side(train_where_told, [request(recipe, trials) for recipe in recipes])
            for recipe, outcome in zip(recipes, outcomes, strict=True):
                trials.append(as_trial(len(trials) + 1, recipe, outcome, spec))
            check_trials(spec, trials)
        winner = pick_winner(trials)

        again = noise_recipes(spec, winner) or [winner.recipe]
        requests = [request(recipe) for recipe in again]
        models = []
        for start in range(0, len(requests), spec.at_once):
            models += train_side_by_side(train_where_told, requests[start : start + spec.at_once])
        trained = trained_again(again, models)
        answers = [
            ask_dev(candidate_system(model, training), one.splits, training)
            for model, one in zip(trained, requests, strict=True)
        ]
        noise = noise_of(again, trained, answers)
        result = keep_sweep(spec, curated[0], base, trials, winner, answers[0], noise)
        log_sweep(run, spec, result)

    if not spec.then_gate:
        return result
    judged = retrain(spec.with_recipe(winner.recipe), return_state=True).result()
    if not isinstance(judged, RunResult):
        raise TypeError(f"the flow handed back a {type(judged).__name__}, not a RunResult")
    return result.model_copy(update={"gate": judged})
