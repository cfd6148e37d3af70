"""Pairs from wrong answers, and tuning on them for real with the tiny model."""

from __future__ import annotations

import errno
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tasks.contracts.dev import DevPart, DevResult, rows_of_part
from tasks.contracts.errors import GoldgateError, ModelError, SpecError, StoreError, TrainingError
from tasks.contracts.prefer import PairsRef, PreferRequest
from tasks.contracts.progress import Progress
from tasks.contracts.prompt import tuned_prompt
from tasks.contracts.references import BaseModelRef, ItemOutcome, SplitsRef, SystemUnderTest, TrainedModelRef
from tasks.contracts.rows import Message, Row, read_rows, write_rows
from tasks.contracts.spec import (
    ComputeType,
    DataSpec,
    ExecutionSpec,
    GoldenSpec,
    PreferenceSpec,
    RetrainSpec,
    SpeedSpec,
    TaskKind,
    TaskSpec,
    TrainSpec,
)
from tasks.runtime import display
from tasks.store import Store, digest_folder
from tasks.training.job import CANNOT_WRITE, ERROR
from tasks.training.prefer import Pair, PreferJob, mine, read_pairs, says_the_same, too_few_words, write_pairs
from tasks.training.prefer_launch import reason_of
from tasks.training.prefer_steps import check_can_prefer, mine_pairs, tune_preferences
from tasks.training.steps import fetch_base_model

CLASSIFY = TaskSpec(kind=TaskKind.CLASSIFY, instruction="Which fruit?", labels=("plum", "pear"))
EXTRACT = TaskSpec(kind=TaskKind.EXTRACT, instruction="Read.", json_schema={"properties": {"amount": {}}})
CHAT = TaskSpec(kind=TaskKind.CHAT, instruction="Answer.")
PREFERENCE = PreferenceSpec(epochs=4, learning_rate=1e-2, batch_size=4, answer_weight=0.5, min_pairs=4)
RANK = 4


def row(number: int, target: str = "pear", **fields: Any) -> Row:
    return Row(f"d{number}", number, (Message("user", f"green and long {number}"),), target, **fields)


def said(asked: Row, prediction: str, *, right: bool = False, tokens: int = 3) -> ItemOutcome:
    return ItemOutcome(
        id=asked.id, text=asked.text, target=asked.target, prediction=prediction,
        scores={"exact_match": float(right), "valid_output": 1.0},
        latency_ms=1.0, prompt_tokens=9, output_tokens=tokens,
    )  # fmt: skip


# -- mining -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "target", "answer", "right", "tokens", "pair"),
    [
        (CLASSIFY, "pear", "plum", False, 3, ("plum", False)),
        (CLASSIFY, "pear", "pear", True, 3, None),
        (CLASSIFY, "pear", "plum", False, 32, ("plum", False)),  # held to the labels, so never cut
        (EXTRACT, '{"amount": 2}', '{"amount": 3}', False, 9, ('{"amount": 3}', False)),
        (EXTRACT, '{"amount": 2}', '{ "amount":2.0 }', False, 9, None),  # the same, written otherwise
        (EXTRACT, '{"amount": 2}', "no JSON", False, 9, ("no JSON", False)),
        (EXTRACT, '{"amount": 2}', '{"amount": NaN}', False, 9, ('{"amount": NaN}', False)),
        (EXTRACT, '{"amount": 2}', '{"amount": {{{{', False, 32, ('{"amount": {{{{', True)),
        (CHAT, "two  words", " two\nwords ", False, 3, None),
        (CHAT, "café", "cafe\u0301", False, 3, None),
        (CHAT, "two", "", False, 1, ("", False)),
        (CHAT, "two", "Two", False, 3, ("Two", False)),
    ],
)
def test_a_pair_is_a_wrong_answer_that_says_something_else(
    task: TaskSpec, target: str, answer: str, right: bool, tokens: int, pair: tuple[str, bool] | None
) -> None:
    asked = row(1, target)
    found = mine([asked], [said(asked, answer, right=right, tokens=tokens)], task, 32)
    assert found == ([] if pair is None else [Pair(asked, *pair)])
    if not right:
        assert says_the_same(task, target, answer) is (pair is None)


@pytest.mark.parametrize("wrong", [[], [row(1), row(3)], [row(1)], [row(1), row(1)]])
def test_answers_to_other_rows_are_refused(wrong: list[Row]) -> None:
    with pytest.raises(TrainingError, match="not those to these dev rows"):
        mine([row(1), row(2)], [said(one, "plum") for one in wrong], CLASSIFY, 32)


@pytest.mark.parametrize(
    ("pairs", "wrong", "words"),
    [
        (8, 8, None),
        (3, 3, "nothing to learn from: 3 wrong of 40, and `preference.min_pairs` asks for 8"),
        (7, 9, "nothing to learn from: 9 wrong of 40, 7 of them usable, and `preference.min_pairs` asks for 8"),
        (0, 0, "nothing to learn from: 0 wrong of 40, and `preference.min_pairs` asks for 8"),
    ],
)
def test_too_few_pairs_are_told_with_their_numbers(pairs: int, wrong: int, words: str | None) -> None:
    assert too_few_words(pairs, wrong, 40, 8) == words


def test_pairs_come_back_as_they_were_written(tmp_path: Path) -> None:
    pairs = [Pair(row(1, "pear", group="g", weight=2.0), "plum\n„plum“", False), Pair(row(2), "", True)]
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    assert list(read_pairs(tmp_path / "pairs.jsonl")) == pairs


def test_dev_is_parted_once_and_what_belongs_together_stays_together() -> None:
    rows = [row(number, group=f"g{number // 3}" if number < 60 else None) for number in range(300)]
    parting = PreferenceSpec(mine_share=0.4)
    mined, held_out = (rows_of_part(rows, part, parting) for part in (DevPart.MINED, DevPart.HELD_OUT))
    assert sorted(one.id for one in (*mined, *held_out)) == sorted(one.id for one in rows)
    assert not {one.id for one in mined} & {one.id for one in held_out}
    assert not {one.group for one in mined if one.group} & {one.group for one in held_out if one.group}
    assert 90 <= len(mined) <= 150
    assert rows_of_part(rows[50:], DevPart.MINED, parting) == [one for one in mined if one in rows[50:]]
    assert rows_of_part(rows, DevPart.MINED, parting.model_copy(update={"seed": 18})) != mined
    assert rows_of_part(rows, DevPart.ALL, parting) == rows


# -- tokens -------------------------------------------------------------------------------------------------------


def test_both_answers_follow_the_prompt_that_was_trained_and_asked(tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    from tasks.training.examples import tokenize_row
    from tasks.training.prefer_fit import columns_of, tokenize_pair

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prompt = tuned_prompt(CLASSIFY)
    whole = columns_of(tokenize_pair(Pair(row(1), "plum", False), prompt, tokenizer, 200))
    assert whole["prompt_ids"] + whole["chosen_ids"] == tokenize_row(row(1), prompt, tokenizer, 200).input_ids
    other = tokenize_row(row(1, "plum"), prompt, tokenizer, 200)
    assert whole["prompt_ids"] + whole["rejected_ids"] == other.input_ids
    assert whole["chosen_ids"][-1] == whole["rejected_ids"][-1] == tokenizer.eos_token_id
    assert tokenizer.decode(whole["rejected_ids"][:-1]) == "plum"

    cut = columns_of(tokenize_pair(Pair(row(1), "plum", True), prompt, tokenizer, len(other.input_ids) - 1))
    assert cut["rejected_ids"] == whole["rejected_ids"][:-1], "an answer that never ended teaches nothing of the end"
    assert cut["chosen_ids"] == whole["chosen_ids"]
    with pytest.raises(TrainingError, match="more than the 5 allowed"):
        tokenize_pair(Pair(row(1), "plum", False), prompt, tokenizer, 5)


# -- tuning -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """A store with splits, a base, an adapter for it, and pairs."""

    spec: RetrainSpec
    splits: SplitsRef
    base: BaseModelRef
    trained: TrainedModelRef
    pairs: PairsRef

    @property
    def store(self) -> Store:
        return Store(self.spec.execution.store)

    def request(self, **preference: Any) -> PreferRequest:
        made = PreferRequest.of(self.spec, self.splits, self.base, self.trained, self.pairs)
        return made.model_copy(update={"preference": made.preference.model_copy(update=preference)})


def dev_rows() -> list[Row]:
    texts = ("crimson and round", "green and long")
    return [
        Row(f"d{n}", n, (Message("user", f"{texts[n % 2]} fruit {n}"),), ("plum", "pear")[n % 2]) for n in range(48)
    ]


def make_adapter(base: Path, out: Path) -> None:
    """An adapter that changes what the model says, as a training would; no two weights are alike."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        model.save_pretrained(out)


def make_world(folder: Path, tiny_model: Path, preference: PreferenceSpec = PREFERENCE) -> World:
    spec = RetrainSpec(
        name="fruit",
        task=CLASSIFY,
        data=DataSpec(source="none"),
        golden=GoldenSpec(path="none"),
        base_model=str(tiny_model),
        # In float32, so that sums come out to the last digits.
        train=TrainSpec(lora_rank=RANK, max_tokens=128, speed=SpeedSpec(compute=ComputeType.FLOAT32)),
        preference=preference,
        execution=ExecutionSpec(store=str(folder / "store"), prices={"cpu": 3.0}),
    )
    store = Store(spec.execution.store)
    base = fetch_base_model.fn(spec)

    def splits(out: Path) -> dict[str, int]:
        write_rows(out / "train.jsonl", dev_rows()[:1])
        write_rows(out / "dev.jsonl", dev_rows())
        return {}

    def adapter(out: Path) -> dict[str, int]:
        make_adapter(tiny_model, out / "adapter")
        return {}

    kept = SplitsRef(**store.produce("curate", 1, {}, {}, splits).reference(), train_rows=1, dev_rows=48, removed={})
    trained = TrainedModelRef(
        **store.produce("train", 1, {}, {}, adapter).reference(), adapter_digest="a" * 64, merged_digest="m" * 64,
        steps=1, dev_loss=1.0, seconds=1.0, tokens_per_second=1.0, peak_memory_bytes=1,
    )  # fmt: skip
    answers = answered(spec, kept, lambda one: "pear")
    return World(spec, kept, base, trained, mine_pairs.fn(answers, kept, spec))


def answered(spec: RetrainSpec, splits: SplitsRef, answer: Any, part: DevPart = DevPart.MINED) -> DevResult:
    """What `ask dev` leaves in the store, of a model that answers so."""
    assert spec.preference is not None
    store = Store(spec.execution.store)
    rows = rows_of_part(read_rows(store.files(store.open(splits.uri)) / "dev.jsonl"), part, spec.preference)
    outcomes = [said(one, answer(one), right=answer(one) == one.target) for one in rows]

    def make(out: Path) -> dict[str, int]:
        (out / "items.jsonl").write_text("".join(one.model_dump_json() + "\n" for one in outcomes))
        return {}

    artefact = store.produce("ask_dev", 1, {"part": part, "said": [one.prediction for one in outcomes]}, {}, make)
    system = SystemUnderTest(uri="m", digest="m" * 64, prompt=tuned_prompt(spec.task), role="candidate", label="m")
    return DevResult(**artefact.reference(), system=system, part=part, items=len(rows), metrics={})


@dataclass(frozen=True)
class Tuned:
    """One tuning, shared by the tests that look at it."""

    world: World
    model: TrainedModelRef
    folder: Path


@pytest.fixture(scope="module")
def tuned(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("MLFLOW_TRACKING_URI", raising=False)
        world = make_world(tmp_path_factory.mktemp("prefer"), tiny_model)
        model = tune_preferences.fn(world.request())
    return Tuned(world, model, world.store.files(world.store.open(model.uri)))


def curves(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "curves.jsonl").read_text().splitlines()]


def test_pairs_are_mined_from_the_mined_part_alone(tuned: Tuned) -> None:
    world = tuned.world
    held_out = {one.id for one in rows_of_part(dev_rows(), DevPart.HELD_OUT, PREFERENCE)}
    pairs = list(read_pairs(world.store.files(world.store.open(world.pairs.uri)) / "pairs.jsonl"))
    assert len(pairs) == world.pairs.pairs == world.pairs.wrong >= 8
    assert world.pairs.asked == 48 - len(held_out)
    assert world.pairs.too_few is None
    assert {(pair.row.target, pair.rejected) for pair in pairs} == {("plum", "pear")}
    assert not {pair.row.id for pair in pairs} & held_out
    assert mine_pairs.fn(answered(world.spec, world.splits, lambda one: "pear"), world.splits, world.spec).reused
    for part in (DevPart.HELD_OUT, DevPart.ALL):
        with pytest.raises(TrainingError, match="mined part of dev alone"):
            mine_pairs.fn(answered(world.spec, world.splits, lambda one: "pear", part), world.splits, world.spec)


def test_a_model_without_failures_has_nothing_to_learn_from(tuned: Tuned) -> None:
    world = tuned.world
    right = answered(world.spec, world.splits, lambda one: one.target)
    found = mine_pairs.fn(right, world.splits, world.spec)
    assert (found.pairs, found.wrong) == (0, 0)
    assert found.too_few is not None
    assert found.too_few.startswith("nothing to learn from: 0 wrong of")


def test_tuning_makes_the_right_answer_likelier(tuned: Tuned) -> None:
    summary = json.loads((tuned.folder / "summary.json").read_text())["result"]
    pairs = tuned.world.pairs.pairs
    assert summary["margin"] > summary["margin_before"] + 2, "a factor of seven in the odds"
    assert summary["preferred"] >= summary["preferred_before"]
    assert summary["pairs"] == pairs
    assert tuned.model.steps == math.ceil(pairs * 4 / 4)
    assert tuned.model.dev_loss == summary["dev_loss"] != summary["dev_loss_before"]
    points = curves(tuned.folder)
    assert (points[0]["step"], points[0]["dev_loss"]) == (0, summary["dev_loss_before"])
    assert (points[-1]["step"], points[-1]["dev_loss"]) == (tuned.model.steps, summary["dev_loss"])
    steps = [point for point in points if "preference_loss" in point]
    assert [point["step"] for point in steps] == list(range(1, tuned.model.steps + 1))
    assert steps[-1]["preference_loss"] < steps[0]["preference_loss"]
    grown = summary["margin"] - summary["margin_before"]
    assert steps[-1]["reward_margin"] == pytest.approx(PREFERENCE.beta * grown, rel=0.1)
    assert summary["trainable_parameters"] == adapter_size(tuned.folder / "adapter")


def adapter_size(folder: Path) -> int:
    from safetensors.torch import load_file

    return sum(weight.numel() for weight in load_file(folder / "adapter_model.safetensors").values())


def test_reference_is_the_adapter_that_it_starts_from(tuned: Tuned, tmp_path: Path) -> None:
    """At the start policy and reference are one, so the preference loss is log 2."""
    from transformers import AutoTokenizer, TrainerCallback

    from tasks.training.prefer_fit import answer_log_probs, load_policy, make_trainer, plan_of, tokenize_pair

    alone, both = (
        make_job(tuned.world, tmp_path / name, answer_weight=weight) for name, weight in (("a", 0.0), ("b", 0.5))
    )
    tokenizer = AutoTokenizer.from_pretrained(alone.model_folder)
    pairs = [
        tokenize_pair(pair, tuned_prompt(CLASSIFY), tokenizer, 128) for pair in list(read_pairs(alone.pairs_file))[:4]
    ]
    losses = []
    for job in (alone, both):
        plan = plan_of(job, len(pairs), 1, "cpu")
        trainer = make_trainer(job, plan, "cpu", load_policy(job, plan, "cpu"), tokenizer, pairs, TrainerCallback())
        batch = next(iter(trainer.get_train_dataloader()))
        losses.append(trainer.compute_loss(trainer.model, batch).item())
    chosen = [pair.chosen for pair in pairs]
    nats = -sum(answer_log_probs(trainer.model, chosen, 2)) / sum(example.answer_tokens for example in chosen)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[1] == pytest.approx(math.log(2) + 0.5 * nats, rel=1e-5)
    with trainer.model.disable_adapter():
        bare = -sum(answer_log_probs(trainer.model, chosen, 2)) / sum(example.answer_tokens for example in chosen)
    assert abs(bare - nats) > 0.01, "the adapter does something, so the bare base would have shown"


def make_job(world: World, folder: Path, **preference: Any) -> PreferJob:
    for part in ("scratch", "out"):
        (folder / part).mkdir(parents=True)
    write_rows(folder / "held_out.jsonl", rows_of_part(dev_rows(), DevPart.HELD_OUT, PREFERENCE))
    store = world.store
    return PreferJob(
        request=world.request(**preference),
        fingerprint="3" * 64,
        model_folder=store.files(store.open(world.base.uri)) / "model",
        adapter_folder=store.files(store.open(world.trained.uri)) / "adapter",
        pairs_file=store.files(store.open(world.pairs.uri)) / "pairs.jsonl",
        held_out_file=folder / "held_out.jsonl",
        scratch=folder / "scratch",
        out=folder / "out",
    )


def test_what_it_makes_fits_what_training_makes(tuned: Tuned) -> None:
    assert {path.name for path in tuned.folder.iterdir()} == {
        "adapter", "curves.jsonl", "merged", "summary.json", "training.json",
    }  # fmt: skip
    assert tuned.model.step == "prefer"
    assert tuned.model.adapter_digest == digest_folder(tuned.folder / "adapter")
    assert tuned.model.merged_digest == digest_folder(tuned.folder / "merged")
    names = {path.name for path in (tuned.folder / "adapter").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}, "one adapter, without its reference"
    config = json.loads((tuned.folder / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (RANK, tuned.world.base.source)
    assert config["target_modules"] == sorted(config["target_modules"])
    manifest = tuned.world.store.open(tuned.model.uri).manifest
    assert manifest.inputs == {
        "base": tuned.world.base.digest,
        "splits": tuned.world.splits.digest,
        "trained": tuned.world.trained.digest,
        "pairs": tuned.world.pairs.digest,
    }
    assert str(tuned.world.store.root) not in (tuned.folder / "summary.json").read_text()


def test_its_manifest_says_what_made_it(tuned: Tuned) -> None:
    from tasks.training.manifest import read_manifest

    world, made = tuned.world, read_manifest(tuned.folder)
    held_out = rows_of_part(dev_rows(), DevPart.HELD_OUT, PREFERENCE)
    assert (made.stage, made.name, made.fingerprint) == ("prefer", "fruit", tuned.model.fingerprint)
    assert (made.base.digest, made.adapter_before) == (world.base.digest, world.trained.adapter_digest)
    assert (made.recipe, made.preference) == (world.spec.train, PREFERENCE)
    assert (made.seed, made.plan.epochs, made.plan.learning_rate) == (PREFERENCE.seed, 4, 1e-2)
    assert made.data.splits_digest == world.splits.digest
    assert (made.data.train_rows, made.data.dev_rows) == (world.pairs.pairs, len(held_out))
    pairs = world.store.files(world.store.open(world.pairs.uri)) / "pairs.jsonl"
    assert made.data.train_sha256 == hashlib.sha256(pairs.read_bytes()).hexdigest()
    assert (made.steps, made.best_step, made.stopped_early) == (tuned.model.steps, tuned.model.steps, False)
    assert (made.dev_loss, made.seconds) == (tuned.model.dev_loss, tuned.model.seconds)
    assert made.tokens == json.loads((tuned.folder / "summary.json").read_text())["result"]["tokens"]
    assert 0 < made.energy.seconds < made.seconds + 60
    assert made.cost is not None
    assert made.cost.price_per_hour == 3.0
    assert made.cost.total == pytest.approx(3.0 * made.seconds / 3600, rel=1e-5)
    assert [skew["onto"] for skew in made.skews] == ["nf4", "base"]
    assert str(world.store.root) not in (tuned.folder / "training.json").read_text()


def test_merged_model_answers_as_the_tuned_adapter_does(tuned: Tuned) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tasks.training.examples import tokenize_row
    from tasks.training.frozen_base import load_dequantised
    from tasks.training.prefer_fit import answer_log_probs

    base = tuned.world.store.files(tuned.world.store.open(tuned.world.base.uri)) / "model"
    tokenizer = AutoTokenizer.from_pretrained(tuned.folder / "merged")
    rows = rows_of_part(dev_rows(), DevPart.HELD_OUT, PREFERENCE)
    examples = [tokenize_row(one, tuned_prompt(CLASSIFY), tokenizer, 128) for one in rows]
    merged = AutoModelForCausalLM.from_pretrained(tuned.folder / "merged", dtype=torch.float32)
    onto = json.loads((tuned.folder / "summary.json").read_text())["merges"]
    assert {one["onto"] for one in onto} == {"nf4", "base"}
    assert onto[0]["kl"] == min(one["kl"] for one in onto)
    adapted = PeftModel.from_pretrained(load_dequantised(base, "cpu"), tuned.folder / "adapter")
    likely, as_tuned = (answer_log_probs(model, examples, 5) for model in (merged, adapted))
    assert likely == pytest.approx(as_tuned, abs=0.05)
    tokens = sum(example.answer_tokens for example in examples)
    assert -sum(as_tuned) / tokens == pytest.approx(tuned.model.dev_loss, abs=0.02)


class Shown:
    """A display that hears progress; `interrupts` stands for a person at the keyboard."""

    def __init__(self, *, interrupts: bool) -> None:
        self.interrupts = interrupts
        self.heard: list[Progress] = []

    def start(self, step: str) -> None:
        return

    def update(self, step: str, progress: Progress) -> None:
        self.heard.append(progress)
        if self.interrupts and progress.done >= 2:
            raise KeyboardInterrupt

    def finish(self, step: str, summary: str, *, reused: bool) -> None:
        return


def test_an_interrupted_tuning_starts_anew_and_gives_the_same_bytes(
    tuned: Tuned, tiny_model: Path, tmp_path: Path
) -> None:
    assert tune_preferences.fn(tuned.world.request()).reused
    again = make_world(tmp_path, tiny_model)
    shown = [Shown(interrupts=True), Shown(interrupts=False)]
    token = display.set(shown[0])
    try:
        with pytest.raises(KeyboardInterrupt):
            tune_preferences.fn(again.request())
        assert not list(again.store.list("prefer"))
        display.set(shown[1])
        twin = tune_preferences.fn(again.request())
    finally:
        display.reset(token)
    assert not twin.reused
    assert (twin.adapter_digest, twin.merged_digest) == (tuned.model.adapter_digest, tuned.model.merged_digest)
    first, *_, last = shown[1].heard
    assert first == Progress(0, 1, "steps", "loading the model")
    assert last == Progress(twin.steps, twin.steps, "steps", "merging")


def test_tuning_is_a_run_of_its_own_in_mlflow(tuned: Tuned) -> None:
    from tasks.tracking.address import connect

    client = connect(tuned.world.spec.execution)
    experiment = client.get_experiment_by_name("fruit")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], f"tags.\"goldgate.key\" = '{tuned.model.fingerprint}'")
    assert [run.info.run_name for run in runs] == ["prefer"]
    (run,) = runs
    assert run.info.status == "FINISHED"
    assert run.data.params["preference.beta"] == "0.1"
    assert run.data.params["pairs"] == str(tuned.world.pairs.pairs)
    assert run.data.tags["goldgate.trained_from"] == tuned.world.trained.merged_digest
    assert run.data.metrics["dev_loss"] == pytest.approx(tuned.model.dev_loss)
    assert run.data.metrics["cost"] > 0
    assert {file.path for file in client.list_artifacts(run.info.run_id)} >= {"summary.json", "training.json"}
    kept = client.get_metric_history(run.info.run_id, "reward_margin")
    assert [metric.step for metric in kept] == list(range(1, tuned.model.steps + 1))


# -- refusals -----------------------------------------------------------------------------------------------------


def test_too_long_a_pair_stops_tuning_by_name(tuned: Tuned, tmp_path: Path) -> None:
    from tasks.training.prefer_fit import tune

    job = make_job(tuned.world, tmp_path)
    recipe = job.request.recipe.model_copy(update={"max_tokens": 16})
    with pytest.raises(TrainingError, match="more than the 16 allowed") as caught:
        tune(job.model_copy(update={"request": job.request.model_copy(update={"recipe": recipe})}))
    assert "train.max_tokens" in caught.value.fix
    assert caught.value.where is not None
    assert caught.value.where.startswith("row d")


def test_tuning_that_moved_nothing_is_refused() -> None:
    import torch

    from tasks.training.prefer_fit import check_moved

    class Model:
        def __init__(self, policy: Sequence[float]) -> None:
            self.weights = {"x.lora_A.default.weight": policy, "x.lora_A.ref.weight": [1.0, 2.0], "x.base": [7.0]}

        def named_parameters(self) -> Any:
            return [(name, torch.nn.Parameter(torch.tensor(values))) for name, values in self.weights.items()]

    check_moved(Model([1.0, 2.5]))
    with pytest.raises(TrainingError, match="changed nothing") as caught:
        check_moved(Model([1.0, 2.0]))
    assert "preference.learning_rate" in caught.value.fix


@pytest.mark.parametrize(
    ("logs", "what"),
    [
        ({"loss": math.nan}, "loss at step 4 is nan"),
        ({"loss": 1.0, "grad_norm": math.inf}, "grad norm at step 4 is inf"),
    ],
)
def test_a_loss_that_is_no_number_stops_tuning(logs: dict[str, float], what: str) -> None:
    from types import SimpleNamespace

    from tasks.training.prefer_fit import _Listener

    nothing: Any = None
    plan: Any = SimpleNamespace(learning_rate=0.01)
    state: Any = SimpleNamespace(global_step=4)
    listener = _Listener(nothing, plan, nothing)
    with pytest.raises(TrainingError, match=what) as caught:
        listener.on_log(None, state, nothing, logs=logs)
    assert caught.value.where == "preference.learning_rate = 0.01"


@pytest.mark.parametrize(
    ("code", "what", "fix"),
    [
        (-9, "was killed (SIGKILL)", "preference.batch_size"),
        (3, "exit code 3 and no result. Its last words:\n    the very last", "starts this stage anew"),
    ],
)
def test_every_end_without_a_result_is_explained(tmp_path: Path, code: int, what: str, fix: str) -> None:
    log = tmp_path / "worker.log"
    log.write_text("\n".join(["first", *["-"] * 20, "the very last"]))
    error = reason_of(code, tmp_path, log)
    assert type(error) is TrainingError
    assert (what if code == -9 else what.split("\n")[0]) in error.what
    assert code == -9 or error.what.endswith("the very last")
    assert fix in error.fix
    assert error.where == str(log)


def test_a_tuning_that_cannot_even_write_why_is_understood(tmp_path: Path) -> None:
    error = reason_of(CANNOT_WRITE, tmp_path, tmp_path / "worker.log")
    assert type(error) is StoreError
    assert "There is no room left to write" in error.what
    assert "the stage starts anew" in error.fix


@pytest.mark.parametrize(("room", "code"), [(True, 1), (False, CANNOT_WRITE)])
def test_a_full_disk_is_told_by_the_process_itself(
    tuned: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: bool, code: int
) -> None:
    from tasks.training import prefer_fit, prefer_worker

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "merged")

    job = make_job(tuned.world, tmp_path)
    (tmp_path / "spec.json").write_text(job.model_dump_json())
    monkeypatch.setattr(prefer_fit, "tune", full)
    monkeypatch.setattr(prefer_worker.signal, "signal", lambda *_: None)
    if not room:
        monkeypatch.setattr(prefer_worker, "write_whole", full)
    assert prefer_worker.main(tmp_path / "spec.json") == code
    if room:
        error = reason_of(code, job.scratch, tmp_path / "worker.log")
        assert type(error) is StoreError
        assert "There is no room left to write" in error.what


def test_a_refusal_keeps_its_kind(tmp_path: Path) -> None:
    (tmp_path / ERROR).write_text(json.dumps({"type": "ModelError", "what": "w", "where": None, "fix": "f"}))
    error: GoldgateError = reason_of(1, tmp_path, tmp_path / "none.log")
    assert type(error) is ModelError
    assert (error.what, error.where, error.fix) == ("w", None, "f")


def test_a_training_without_adapter_cannot_be_tuned_further(tuned: Tuned) -> None:
    check_can_prefer(tuned.world.spec)
    full = tuned.world.spec.model_copy(update={"train": TrainSpec(method="full")})
    with pytest.raises(SpecError, match="method full makes none") as caught:
        check_can_prefer(full)
    assert caught.value.where == "train.method"
