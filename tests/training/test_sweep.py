"""The search's own rules: what is proposed, when a trial is given up, which one wins, and what noise says."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tasks.contracts.errors import PrunedError, StoreError, TrainingError
from tasks.contracts.progress import Progress
from tasks.contracts.references import BaseModelRef, DevLossLimit, SplitsRef, TrainedModelRef, TrainRequest
from tasks.contracts.spec import DataSpec, ExecutionSpec, GoldenSpec, RetrainSpec, TaskKind, TaskSpec, TrainSpec
from tasks.contracts.sweep import (
    LearningRates,
    PrunedRef,
    RetrainNoise,
    SearchSpace,
    SweepRef,
    SweepSpec,
    Trial,
    TrialState,
)
from tasks.training.job import append_record, write_progress
from tasks.training.pruned import as_error, find_pruned, keep_pruned
from tasks.training.sweep import (
    check_trials,
    next_recipes,
    no_different,
    noise_recipes,
    pick_winner,
    spread_of,
    stop_limits,
    varied,
)
from tasks.training.sweep_steps import Outcome, as_trial, train_side_by_side, trained_again
from tasks.training.sweep_words import noise_sentences, sweep_markdown, trials_table, winner_sentences
from tests.report.example import example_trained

TRAINING = RetrainSpec(
    name="tickets",
    task=TaskSpec(kind=TaskKind.CLASSIFY, instruction="Which team?", labels=("billing", "support")),
    data=DataSpec(source="rows.jsonl"),
    golden=GoldenSpec(path="golden"),
    base_model="base",
    train=TrainSpec(evaluations=4),
)


def search(**changes: Any) -> SweepSpec:
    return SweepSpec.model_validate({"training": TRAINING, **changes})


def finished(number: int, *losses: float, tokens: int = 100, **recipe: Any) -> Trial:
    return Trial(
        number=number,
        recipe=TRAINING.train.model_copy(update=recipe),
        state=TrialState.FINISHED,
        dev_losses=losses,
        dev_loss=min(losses),
        steps=8,
        planned_steps=8,
        tokens=tokens,
        seconds=12.0,
    )


def pruned(number: int, *losses: float, **recipe: Any) -> Trial:
    return Trial(
        number=number,
        recipe=TRAINING.train.model_copy(update=recipe),
        state=TrialState.PRUNED,
        dev_losses=losses,
        steps=2,
        planned_steps=8,
        reason="Given up",
    )


def failed(number: int, reason: str = "It diverged.", **recipe: Any) -> Trial:
    return Trial(number=number, recipe=TRAINING.train.model_copy(update=recipe), state=TrialState.FAILED, reason=reason)


# -- what may be asked ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"space": {"lora_rank": [8], "learning_rate": None}}, "the space holds one recipe only"),
        ({"space": {"lora_rank": [8, 8]}}, "lora_rank names a value twice"),
        ({"space": {"learning_rate": {"low": 1e-3, "high": 1e-3}}}, "low must be below high"),
        ({"space": {"lora_rank": [0, 8]}}, "greater than or equal to 1"),
        ({"noise_seeds": 1}, "one training shows no noise"),
        ({"training": TRAINING.model_dump() | {"train": {"method": "full"}}}, "method full trains no adapter"),
        ({"trails": 3}, "Extra inputs are not permitted"),
    ],
)
def test_a_search_that_makes_no_sense_is_refused(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        search(**changes)


def test_the_guards_are_asked_about_both_ends_of_the_rates() -> None:
    rates = LearningRates(low=1e-4, high=3e-3)
    assert [one.learning_rate for one in search(space=SearchSpace(learning_rate=rates)).extremes()] == [3e-3, 1e-4]
    assert search(space={"learning_rate": None}).extremes() == (TRAINING.train,)


# -- what is proposed -----------------------------------------------------------------------------------------------


def played(spec: SweepSpec, loss: Any) -> list[Trial]:
    """A whole search in which a recipe's dev loss is told by a function."""
    trials: list[Trial] = []
    while recipes := next_recipes(spec, trials):
        trials += [
            finished(len(trials) + at, loss(recipe), **varied(recipe, spec.space))
            for at, recipe in enumerate(recipes, 1)
        ]
    return trials


def high_rank_is_good(recipe: TrainSpec) -> float:
    return 1.0 + abs(recipe.learning_rate - 4e-4) * 1000 + (0.0 if recipe.lora_rank == 16 else 0.5)


def test_a_search_is_its_seeds_and_stays_in_its_space() -> None:
    spec = search(trials=12, space={"lora_rank": [4, 8, 16], "epochs": [1.0, 2.0], "seed": [17, 18]})
    trials = played(spec, high_rank_is_good)
    assert [trial.number for trial in trials] == list(range(1, 13))
    assert trials == played(spec, high_rank_is_good)
    assert trials != played(spec.model_copy(update={"seed": 18}), high_rank_is_good)
    for trial in trials:
        assert set(varied(trial.recipe, spec.space)) == {"epochs", "learning_rate", "lora_rank", "seed"}
        assert trial.recipe.lora_rank in (4, 8, 16)
        assert trial.recipe.epochs in (1.0, 2.0)
        assert trial.recipe.seed in (17, 18)
        assert 1e-4 <= trial.recipe.learning_rate <= 1e-3
        assert float(f"{trial.recipe.learning_rate:.3g}") == trial.recipe.learning_rate
        assert trial.recipe.model_copy(update=varied(TRAINING.train, spec.space)) == TRAINING.train


def test_a_killed_search_goes_on_as_if_nothing_had_happened() -> None:
    spec = search(trials=10, startup_trials=3)
    whole = played(spec, high_rank_is_good)
    for done in range(10):
        assert next_recipes(spec, whole[:done]) == [whole[done].recipe]
    assert next_recipes(spec, whole) == []


def test_after_the_random_ones_proposals_go_by_what_was_found() -> None:
    spec = search(trials=40, startup_trials=10, space={"lora_rank": [4, 8, 16, 32], "learning_rate": {}})
    trials = played(spec, high_rank_is_good)
    late = [trial.recipe.lora_rank == 16 for trial in trials[20:]]
    early = [trial.recipe.lora_rank == 16 for trial in trials[:10]]
    assert sum(late) / len(late) > 2 * sum(early) / len(early)


@pytest.mark.parametrize("bad", [failed, pruned])
def test_a_region_that_fails_or_is_pruned_is_left(bad: Any) -> None:
    spec = search(trials=30, startup_trials=4, space={"lora_rank": [], "learning_rate": {"low": 1e-4, "high": 1e-2}})
    rates = (1e-4, 2e-4, 3e-4, 2e-3, 4e-3, 6e-3, 8e-3)
    trials = [
        finished(at, 1.0 + at / 100, learning_rate=rate) if rate < 1e-3 else bad(at, learning_rate=rate)
        for at, rate in enumerate(rates, 1)
    ]
    proposed = [next_recipes(spec.model_copy(update={"seed": seed}), trials)[0].learning_rate for seed in range(20)]
    assert sum(rate < 1e-3 for rate in proposed) >= 16  # half of the range on the logarithmic scale


def test_several_at_once_are_different_and_the_last_round_is_short() -> None:
    spec = search(trials=5, at_once=2, startup_trials=2)
    trials = played(spec, high_rank_is_good)
    assert [len(next_recipes(spec, trials[:done])) for done in (0, 2, 4, 5)] == [2, 2, 1, 0]
    assert len({trial.recipe.model_dump_json() for trial in trials}) == 5


def test_a_space_without_a_new_recipe_ends_the_search() -> None:
    spec = search(trials=20, space={"lora_rank": [4, 8, 16], "learning_rate": None})
    trials = played(spec, high_rank_is_good)
    assert sorted(trial.recipe.lora_rank for trial in trials) == [4, 8, 16]


# -- when a trial is given up ---------------------------------------------------------------------------------------


def limits(*pairs: tuple[int, float]) -> tuple[DevLossLimit, ...]:
    return tuple(DevLossLimit(look=look, dev_loss=loss) for look, loss in pairs)


THREE = [finished(1, 3.0, 2.0, 1.0, 0.9), finished(2, 2.0, 2.5, 1.8, 1.7), finished(3, 4.0, 3.0, 2.9, 2.8)]


@pytest.mark.parametrize(
    ("changes", "trials", "wanted"),
    [
        ({}, [], ()),
        ({}, THREE[:2], ()),
        ({}, THREE, limits((1, 3.0), (2, 2.0), (3, 1.8))),
        ({"prune": False}, THREE, ()),
        ({}, [*THREE[:2], pruned(3, 9.0)], ()),  # a pruned trial has not finished
        ({}, [*THREE, pruned(4, 0.1), failed(5)], limits((1, 3.0), (2, 2.0), (3, 1.8))),
        ({}, [*THREE, finished(4, 2.6, 1.0)], limits((1, 2.8), (2, 2.0), (3, 1.4))),  # stopped early: stays at 1.0
    ],
    ids=["none yet", "too few", "the median of the best so far", "off", "pruned", "only finished", "stopped early"],
)
def test_limits(changes: dict[str, Any], trials: list[Trial], wanted: tuple[DevLossLimit, ...]) -> None:
    assert stop_limits(search(startup_trials=3, **changes), TRAINING.train, trials) == wanted


def test_one_look_has_no_limit() -> None:
    assert stop_limits(search(startup_trials=3), TrainSpec(evaluations=1), THREE) == ()


def test_limits_agree_with_optunas_pruner_where_losses_only_fall() -> None:
    import optuna

    falling = [finished(1, 3.0, 2.0, 1.0), finished(2, 2.0, 1.9, 1.8), finished(3, 4.0, 3.0, 2.9)]
    by_look = {one.look: one.dev_loss for one in stop_limits(search(startup_trials=3), TRAINING.train, falling)}
    for losses in ((2.9, 1.95, 1.0), (2.9, 2.1), (3.1,)):
        study = optuna.create_study(pruner=optuna.pruners.MedianPruner(n_startup_trials=3))
        for one in falling:
            study.add_trial(
                optuna.create_trial(value=one.dev_loss, intermediate_values=dict(enumerate(one.dev_losses, 1)))
            )
        trial = study.ask()
        for look, loss in enumerate(losses, 1):
            trial.report(loss, look)
        assert bool(trial.should_prune()) is (min(losses) > by_look[len(losses)])


@pytest.mark.parametrize(
    ("trials", "message"),
    [
        ([failed(1), failed(2), failed(3, "No memory.")], "All 3 trials failed: It diverged.; No memory."),
        ([failed(1), failed(2)], None),
        ([failed(1), failed(2), failed(3), finished(4, 1.0)], None),
        ([], None),
    ],
)
def test_a_search_that_fails_from_the_start_ends(trials: list[Trial], message: str | None) -> None:
    if message is None:
        check_trials(search(startup_trials=3), trials)
        return
    with pytest.raises(TrainingError, match=message):
        check_trials(search(startup_trials=3), trials)


# -- the winner, and how much chance moves ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trials", "number"),
    [
        ([finished(1, 1.0, 0.5), finished(2, 0.4, 0.9), failed(3), pruned(4, 0.1)], 2),
        ([finished(1, 0.5, tokens=200), finished(2, 0.5, tokens=100)], 2),
        ([finished(1, 0.5), finished(2, 0.5)], 1),
    ],
    ids=["lowest best", "fewer tokens", "first"],
)
def test_winner(trials: list[Trial], number: int) -> None:
    assert pick_winner(trials).number == number


def test_no_winner() -> None:
    with pytest.raises(TrainingError, match="No trial has finished"):
        pick_winner([pruned(1, 1.0), failed(2)])


def test_noise_is_the_winners_recipe_with_the_seeds_after_its_own() -> None:
    winner = finished(1, 0.5, seed=2**31 - 1, lora_rank=8)
    recipes = noise_recipes(search(noise_seeds=3), winner)
    assert [recipe.seed for recipe in recipes] == [2**31 - 1, 0, 1]
    assert {recipe.lora_rank for recipe in recipes} == {8}
    assert noise_recipes(search(noise_seeds=0), winner) == []


def test_spread() -> None:
    spread = spread_of([0.60, 0.62, 0.64])
    assert (spread.mean, spread.deviation) == pytest.approx((0.62, 0.02))
    # Tables of chi-squared with two degrees of freedom: 7.378 and 0.0506.
    assert spread.deviation_low == pytest.approx(0.02 * (2 / 7.378) ** 0.5, rel=1e-3)
    assert spread.deviation_high == pytest.approx(0.02 * (2 / 0.0506) ** 0.5, rel=1e-3)
    same = spread_of([0.1, 0.1, 0.1])
    assert (same.deviation, same.deviation_low, same.deviation_high) == (0.0, 0.0, 0.0)


def noise(*matches: float, losses: tuple[float, ...] = (0.5, 0.6, 0.7)) -> RetrainNoise:
    return RetrainNoise(seeds=(17, 18, 19), dev_loss=spread_of(losses), exact_match=spread_of(matches), dev_items=50)


def test_what_is_within_the_noise_is_no_different() -> None:
    trials = [finished(1, 0.5), finished(2, 0.64), finished(3, 0.65), pruned(4, 0.55), failed(5)]
    found = no_different(trials, trials[0], noise(0.6, 0.6, 0.7))  # sqrt(2) · 0.1 = 0.1414
    assert [trial.number for trial in found] == [2]


def swept(trials: list[Trial], about: RetrainNoise | None) -> SweepRef:
    return SweepRef(
        uri="store/sweep/1", step="sweep", fingerprint="f" * 64, digest="d" * 64, folder="store/sweep/1/files",
        trials=tuple(trials), winner=1, metrics={"exact_match": 0.62, "field:amount": 0.5}, noise=about,
    )  # fmt: skip


def test_words() -> None:
    spec = search()
    trials = [finished(1, 0.9, 0.5, lora_rank=8), finished(2, 0.52), pruned(3, 0.8), failed(4, "It diverged.\nmore")]
    head, *rows = trials_table(spec, trials, 1)
    assert head == ["trial", "learning rate", "rank", "dev loss", "steps", "tokens", "seconds", "how it ended"]
    assert rows == [
        ["1", "0.0002", "8", "0.5000", "8 of 8", "100", "12", "winner"],
        ["2", "0.0002", "16", "0.5200", "8 of 8", "100", "12", "finished"],
        ["3", "0.0002", "16", "0.8000", "2 of 8", "", "", "pruned at look 1"],
        ["4", "0.0002", "16", "", "", "", "", "failed: It diverged."],
    ]
    about = noise(0.60, 0.62, 0.64)
    said = " ".join(noise_sentences(about))
    assert "with the seeds 17, 18, 19: dev exact match 60.0 %, 62.0 %, 64.0 %." in said
    assert "moves dev exact match by about ±2.0 points" in said
    assert "lie about 2.8 points apart; a difference below that between two recipes is no difference." in said
    assert "known only roughly: 1.0 to 12.6 (95 %)" in said
    won = " ".join(winner_sentences(spec, swept(trials, about)))
    assert "Trial 1 is best on dev: learning rate 0.0002, rank 8; dev loss 0.5000, exact match 62.0 %." in won
    assert "Trial 2 may be as good: the dev loss is higher by less than 0.1414" in won
    assert "field" not in won
    far = winner_sentences(spec, swept([trials[0], finished(2, 0.7)], about))
    assert any("Every other finished trial is behind by more than another seed moves" in line for line in far)
    page = sweep_markdown(spec, swept(trials, about))
    assert "| 3 | 0.0002 | 16 | 0.8000 | 2 of 8 |  |  | pruned at look 1 |" in page
    assert "## Retrain noise" in page
    assert "## Retrain noise" not in sweep_markdown(spec, swept(trials, None))


def test_three_equal_answers_are_no_proof() -> None:
    (_, said, _) = noise_sentences(noise(0.5, 0.5, 0.5))
    assert said.startswith("Another seed changed nothing in how many of the 50 dev rows are answered right (3")
    assert said.endswith("That does not show that it never does.")


# -- trials that end in other ways ----------------------------------------------------------------------------------


@pytest.fixture
def request_(tmp_path: Path) -> TrainRequest:
    made = {"uri": "unused", "fingerprint": "f" * 64, "digest": "d" * 64}
    return TrainRequest(
        name="tickets",
        task=TRAINING.task,
        splits=SplitsRef(**made, step="curate", train_rows=1, dev_rows=1, removed={}),
        base=BaseModelRef(**made, step="base_model", source="base"),
        recipe=TRAINING.train,
        stop_above=limits((1, 2.0), (2, 1.5)),
        execution=ExecutionSpec(store=str(tmp_path / "store")),
    )


GIVEN_UP = PrunedError("Given up at look 2 (step 4): too slow.", where="stop_above", fix="nothing")


def given_up_in(scratch: Path) -> Path:
    """What a training leaves that is given up at its second look."""
    scratch.mkdir()
    for record in ({"step": 1, "loss": 3.0}, {"step": 2, "dev_loss": 1.9}, {"step": 4, "dev_loss": 1.8}):
        append_record(scratch / "curves.jsonl", record)
    write_progress(scratch, Progress(4, 8, "steps"))
    return scratch


def test_a_training_that_was_given_up_is_found_by_the_same_request_alone(
    request_: TrainRequest, tmp_path: Path
) -> None:
    assert find_pruned(request_) is None
    kept = keep_pruned(request_, given_up_in(tmp_path / "scratch"), GIVEN_UP)
    assert (kept.dev_losses, kept.steps, kept.planned_steps) == ((1.9, 1.8), 4, 8)
    assert (kept.reason, kept.reused) == (GIVEN_UP.what, False)
    found = find_pruned(request_.model_copy(update={"within": "another search"}))
    assert found == kept.model_copy(update={"reused": True})
    assert str(as_error(kept)).startswith(GIVEN_UP.what)
    assert isinstance(as_error(kept), PrunedError)
    assert find_pruned(request_.model_copy(update={"stop_above": ()})) is None
    assert find_pruned(request_.model_copy(update={"stop_above": limits((1, 2.0), (2, 1.6))})) is None
    assert find_pruned(request_.model_copy(update={"recipe": TrainSpec(seed=18)})) is None


def test_a_given_up_training_without_looks_is_an_error(request_: TrainRequest, tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch/curves.jsonl").write_text(json.dumps({"step": 1, "loss": 3.0}) + "\n")
    with pytest.raises(TrainingError, match="nothing is left of its looks"):
        keep_pruned(request_, tmp_path / "scratch", GIVEN_UP)


def test_outcomes_keep_their_order_and_a_failed_one_stops_no_other(request_: TrainRequest, tmp_path: Path) -> None:
    trained = example_trained()
    met = threading.Barrier(3, timeout=30)  # breaks unless all three are under way at once

    def train(request: TrainRequest) -> TrainedModelRef:
        met.wait()
        if request.recipe.seed == 1:
            raise TrainingError("It diverged.", fix="lower the rate")
        if request.recipe.seed == 2:
            keep_pruned(request, given_up_in(tmp_path / "scratch"), GIVEN_UP)
            raise GIVEN_UP
        return trained

    requests = [request_.model_copy(update={"recipe": TrainSpec(seed=seed)}) for seed in range(3)]
    first, second, third = train_side_by_side(train, requests)
    assert first == trained
    assert isinstance(second, TrainingError)
    assert isinstance(third, PrunedRef)
    assert not third.reused

    known = train_side_by_side(no_training, requests[2:])
    assert known == [third.model_copy(update={"reused": True})], "what is known to be given up is not trained again"


def no_training(request: TrainRequest) -> TrainedModelRef:
    raise AssertionError("nothing is to be trained")


def test_what_is_wrong_with_more_than_one_training_ends_them_all(request_: TrainRequest) -> None:
    def train(request: TrainRequest) -> TrainedModelRef:
        raise StoreError("The store is full.", fix="free space")

    with pytest.raises(StoreError, match="full"):
        train_side_by_side(train, [request_])


def test_a_given_up_trial_that_left_no_word_is_an_error(request_: TrainRequest) -> None:
    def train(request: TrainRequest) -> TrainedModelRef:
        raise GIVEN_UP

    with pytest.raises(TrainingError, match="nothing in the store of this run says where"):
        train_side_by_side(train, [request_])


def test_a_failed_trial_says_why(request_: TrainRequest) -> None:
    trial = as_trial(3, TRAINING.train, TrainingError("It diverged.", fix="lower the rate"), search())
    assert trial == failed(3)


@pytest.mark.parametrize(
    "outcome", [TrainingError("It diverged.", fix="lower the rate"), None], ids=["failed", "given up"]
)
def test_noise_needs_all_of_its_trainings(request_: TrainRequest, tmp_path: Path, outcome: Outcome | None) -> None:
    outcome = outcome or keep_pruned(request_, given_up_in(tmp_path / "scratch"), GIVEN_UP)
    recipes = [TrainSpec(seed=17), TrainSpec(seed=18)]
    with pytest.raises(TrainingError, match=r"could not be trained with the seed 18: (It diverged|Given up)"):
        trained_again(recipes, [example_trained(), outcome])
