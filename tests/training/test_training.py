"""Training for real, on the tiny model: what it makes, how it goes on, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tasks.contracts.errors import ServiceError, TrainingError
from tasks.contracts.progress import Progress, ignore_progress
from tasks.contracts.references import SplitsRef, TrainedModelRef, TrainRequest
from tasks.contracts.rows import Message, Row, write_rows
from tasks.contracts.spec import (
    BatchLayout,
    ComputeType,
    DataSpec,
    ExecutionSpec,
    GoldenSpec,
    Guard,
    Kernels,
    RetrainSpec,
    SpeedSpec,
    TaskKind,
    TaskSpec,
    TrainSpec,
)
from tasks.store import Store, digest_folder
from tasks.training.job import TrainJob, TrainResult
from tasks.training.launch import reason_of, run_training
from tasks.training.steps import fetch_base_model, find_trained, train_adapter

TASK = TaskSpec(kind=TaskKind.CLASSIFY, instruction="Which fruit?", labels=("red apple", "pear"))
# In float32, so that the numbers are the same on every CPU.
RECIPE = TrainSpec(
    epochs=3, learning_rate=1e-2, lora_rank=4, batch_size=4, gradient_accumulation=2, evaluations=6,
    speed=SpeedSpec(compute=ComputeType.FLOAT32),
)  # fmt: skip
STEPS = 18


def weigh(number: int) -> float:
    """A weight for each of the 48 rows, 1 for some; their mean is 1."""
    return (0.5, 1.0, 1.5)[number % 3]


def write_splits(folder: Path, *, longest: int = 1, weighted: bool = False) -> None:
    """48 rows whose answer is in the text, 12 of them also as dev; one row is `longest` times as long.

    With `weighted`, training rows have the weights of `weigh`, and dev rows some that must not matter.
    """
    rows = []
    for number in range(48):
        text = ("crimson and round" if number % 2 else "green and long") + " fruit" * (number % 5)
        if number == 29:
            text *= longest
        rows.append(Row(f"r{number}", number + 1, (Message("user", text),), "red apple" if number % 2 else "pear"))
    dev = rows[:12]
    if weighted:
        dev = [replace(row, weight=float(1 + number)) for number, row in enumerate(dev)]
        rows = [replace(row, weight=weigh(number)) for number, row in enumerate(rows)]
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "dev.jsonl", dev)


def make_request(folder: Path, base: Path, recipe: TrainSpec = RECIPE) -> TrainRequest:
    """A request over splits and a base model that are kept in a store below `folder`."""
    execution = ExecutionSpec(store=str(folder / "store"))
    spec = RetrainSpec(
        name="fruit",
        task=TASK,
        data=DataSpec(source="none"),
        golden=GoldenSpec(path="none"),
        base_model=str(base),
        execution=execution,
    )

    def make(out: Path) -> dict[str, int]:
        write_splits(out)
        return {}

    splits = Store(execution.store).produce("splits", 1, {}, {}, make)
    return TrainRequest(
        name=spec.name,
        task=TASK,
        splits=SplitsRef(**splits.reference(), train_rows=48, dev_rows=12, removed={}),
        base=fetch_base_model.fn(spec),
        recipe=recipe,
        accept_risks={Guard.DEV_ROWS: "twelve rows are enough for a toy"},
        execution=execution,
    )


def make_job(folder: Path, request: TrainRequest, *, longest: int = 1, weighted: bool = False) -> TrainJob:
    """The same training as a job of its own, with its store (and MLflow) below `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_splits(folder, longest=longest, weighted=weighted)
    (folder / "out").mkdir()
    store = Store(request.execution.store)
    own = request.model_copy(update={"execution": ExecutionSpec(store=str(folder / "store"))})
    return TrainJob(
        request=own,
        fingerprint="2" * 64,
        model_folder=store.files(store.open(request.base.uri)) / "model",
        train_file=folder / "train.jsonl",
        dev_file=folder / "dev.jsonl",
        scratch=folder / "scratch",
        out=folder / "out",
    )


def curves(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "curves.jsonl").read_text().splitlines()]


@dataclass(frozen=True)
class Trained:
    """One uninterrupted training, shared by the tests that look at it."""

    request: TrainRequest
    reference: TrainedModelRef
    out: Path
    result: TrainResult
    model: Path


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    request = make_request(tmp_path_factory.mktemp("trained"), tiny_model)
    reference = train_adapter.fn(request)
    store = Store(request.execution.store)
    out = store.files(store.open(reference.uri))
    summary = json.loads((out / "summary.json").read_text())
    model = store.files(store.open(request.base.uri)) / "model"
    return Trained(request, reference, out, TrainResult.model_validate(summary["result"]), model)


def test_training_lowers_the_dev_loss_and_writes_what_it_says(trained: Trained) -> None:
    result, out = trained.result, trained.out
    points = curves(out)
    dev_losses = {point["step"]: point["dev_loss"] for point in points if "dev_loss" in point}
    assert list(dev_losses) == [3, 6, 9, 12, 15, 18]
    assert dev_losses[18] < dev_losses[3] - 0.5
    assert [point["step"] for point in points if "loss" in point] == list(range(1, STEPS + 1))
    assert result.dev_loss == pytest.approx(min(dev_losses.values()), abs=1e-5)
    assert dev_losses[result.best_step] == min(dev_losses.values())
    assert (result.steps, result.planned_steps, result.resumed_from_step) == (STEPS, STEPS, 0)
    assert (result.device, result.stopped_early) == ("cpu", False)
    assert result.compute_dtype == "float32"
    assert result.tokens_per_second == pytest.approx(result.tokens / result.seconds, rel=0.1)
    assert 1e8 < result.peak_memory_bytes < 4e9
    rates = [point["learning_rate"] for point in points if "learning_rate" in point]
    assert max(rates) == pytest.approx(1e-2)
    assert rates[-1] < 1e-3
    summary = json.loads((out / "summary.json").read_text())
    assert summary["plan"]["total_steps"] == STEPS


def test_finished_training_is_kept_by_its_recipe_and_reused(trained: Trained) -> None:
    reference, result = trained.reference, trained.result
    assert reference.adapter_digest == digest_folder(trained.out / "adapter")
    assert reference.merged_digest == digest_folder(trained.out / "merged")
    assert (reference.steps, reference.dev_loss, reference.seconds) == (STEPS, result.dev_loss, result.seconds)
    assert not reference.reused
    assert train_adapter.fn(trained.request) == reference.model_copy(update={"reused": True})
    moved = trained.request.model_copy(
        update={"execution": trained.request.execution.model_copy(update={"train_deployment": "train/gpu"})}
    )
    assert train_adapter.fn(moved).reused  # where it runs is no part of the recipe
    assert not list((Path(trained.request.execution.store) / "scratch").glob("*/checkpoint-*"))


def test_dev_loss_is_nats_per_answer_token(trained: Trained, tmp_path: Path) -> None:
    write_splits(tmp_path)
    nats = nats_per_answer_token(trained.model, trained.out / "adapter", tmp_path / "dev.jsonl")
    assert trained.result.dev_loss == pytest.approx(nats, abs=2e-3)


def nats_per_answer_token(model_folder: Path, adapter: Path, dev_file: Path) -> float:
    """The dev loss, worked out again with plain transformers and peft."""
    import torch
    from peft import PeftModel
    from transformers import AutoTokenizer

    from tasks.contracts.prompt import tuned_prompt
    from tasks.training.examples import tokenize_file
    from tasks.training.frozen_base import load_dequantised

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = PeftModel.from_pretrained(load_dequantised(model_folder, "cpu"), adapter).eval()
    nats, tokens = 0.0, 0
    for example in tokenize_file(dev_file, tuned_prompt(TASK), tokenizer, 512):
        ids = torch.tensor([example.input_ids])
        with torch.inference_mode():
            log_probs = model(input_ids=ids).logits.log_softmax(-1)[0]
        for at in range(len(example.input_ids) - example.answer_tokens, len(example.input_ids)):
            nats -= log_probs[at - 1, example.input_ids[at]].item()
            tokens += 1
    return nats / tokens


def test_artefacts_are_safetensors_and_know_no_paths(trained: Trained) -> None:
    from safetensors import safe_open

    files = {file.relative_to(trained.out).as_posix() for file in trained.out.rglob("*") if file.is_file()}
    assert files == {
        "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "curves.jsonl", "summary.json",
        "merged/chat_template.jinja", "merged/config.json", "merged/generation_config.json", "merged/model.safetensors",
        "merged/tokenizer.json", "merged/tokenizer_config.json", "training.json",
    }  # fmt: skip
    for name in files - {"adapter/adapter_model.safetensors", "merged/model.safetensors"}:
        assert trained.request.execution.store not in (trained.out / name).read_text(), name
    with safe_open(trained.out / "adapter" / "adapter_model.safetensors", "pt") as adapter:
        names = list(adapter.keys())
        shapes = {tuple(adapter.get_tensor(name).shape) for name in names if ".lora_A." in name}
    assert len(names) == 2 * 7 * 2  # A and B, seven linear layers, two blocks
    assert {shape[0] for shape in shapes} == {4}


def test_merged_model_is_adapter_on_dequantised_base(trained: Trained) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tasks.training.frozen_base import load_dequantised

    merged = AutoModelForCausalLM.from_pretrained(trained.out / "merged")
    assert merged.dtype == torch.bfloat16
    assert not hasattr(merged.config, "quantization_config")
    assert AutoTokenizer.from_pretrained(trained.out / "merged").chat_template
    base = load_dequantised(trained.model, "cpu")
    ids = torch.arange(5, 45)[None]
    with torch.inference_mode():
        untuned = base(input_ids=ids).logits
        wanted = PeftModel.from_pretrained(base, trained.out / "adapter").eval()(input_ids=ids).logits
        got = merged.float().eval()(input_ids=ids).logits
    assert (got - wanted).abs().max() < 0.05 * (wanted - untuned).abs().max()  # rounding to bfloat16


def test_base_is_packed_in_nf4_with_double_quantisation(tiny_model: Path) -> None:
    import bitsandbytes
    import torch

    from tasks.training.frozen_base import load_dequantised, load_nf4

    layer = load_nf4(tiny_model, "cpu").model.layers[0].mlp.up_proj
    assert isinstance(layer, bitsandbytes.nn.Linear4bit)
    assert layer.weight.dtype == torch.uint8
    assert (layer.weight.quant_state.quant_type, layer.weight.quant_state.nested) == ("nf4", True)
    written_out = load_dequantised(tiny_model, "cpu").model.layers[0].mlp.up_proj.weight
    assert written_out.dtype == torch.float32
    packed = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(packed.float(), written_out)


def test_killed_training_goes_on_and_ends_as_if_nothing_had_happened(trained: Trained, tmp_path: Path) -> None:
    job = make_job(tmp_path, trained.request)
    killed_at = 0

    def kill_after_second_checkpoint(progress: Progress) -> None:
        nonlocal killed_at
        marks = list(job.scratch.glob("checkpoint-*/goldgate_complete.json"))
        if not killed_at and any(int(mark.parent.name.split("-")[1]) >= 6 for mark in marks):
            killed_at = int(progress.done)
            os.kill(workers_of(job)[0], signal.SIGKILL)

    with pytest.raises(TrainingError, match="ran out of memory") as refusal:
        run_training(job, kill_after_second_checkpoint)
    assert "train.batch_size" in refusal.value.fix
    newest = max(
        int(mark.parent.name.split("-")[1]) for mark in job.scratch.glob("checkpoint-*/goldgate_complete.json")
    )
    assert newest < STEPS
    half_written = job.scratch / f"checkpoint-{newest + 1}"  # as if killed while writing the next one
    half_written.mkdir(exist_ok=True)  # the kill may have left one
    (half_written / "trainer_state.json").write_text("{")
    with (job.scratch / "curves.jsonl").open("a") as broken:
        broken.write('{"step": 1')

    heard: list[Progress] = []
    result = run_training(job, heard.append)

    assert result.resumed_from_step == newest
    assert [progress.done for progress in heard[:2]] == [0, newest]
    assert heard[0].note == "loading the base model"
    assert heard[-1] == (STEPS, STEPS, "steps", "merging")
    assert any("dev loss" in progress.note for progress in heard)
    assert not half_written.exists()
    assert (result.steps, result.best_step) == (trained.result.steps, trained.result.best_step)
    whole = [(p["step"], p.get("loss"), p.get("dev_loss")) for p in curves(trained.out)]
    assert [(p["step"], p.get("loss"), p.get("dev_loss")) for p in curves(job.out)] == whole
    assert digest_folder(job.out / "adapter") == digest_folder(trained.out / "adapter")
    assert digest_folder(job.out / "merged") == digest_folder(trained.out / "merged")
    assert len(list(job.scratch.glob("checkpoint-*"))) <= 4  # the newest two, and the best of each
    assert result.mlflow_run_id == first_run_id(job)


def workers_of(job: TrainJob) -> list[int]:
    """The process ids of the job's worker."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                words = (folder / "cmdline").read_bytes().decode().split("\0")
            except OSError:  # it has just ended
                continue
            if str(job.scratch / "spec.json") in words:
                found.append(int(folder.name))
    return found


def first_run_id(job: TrainJob) -> str:
    """The one MLflow run of this training."""
    from tasks.tracking import connect

    client = connect(job.request.execution)
    experiment = client.get_experiment_by_name("fruit")
    (run,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "dev_loss")
    assert sorted({metric.step for metric in history}) == [3, 6, 9, 12, 15, 18]
    assert run.info.status == "FINISHED"
    return str(run.info.run_id)


def step_rows(
    *weights: float, texts: Sequence[str] = ("crimson", "green and long", "round fruit", "pear")
) -> list[Row]:
    """Rows of different lengths whose answers have different numbers of tokens."""
    return [
        Row(f"r{at}", at + 1, (Message("user", texts[at]),), TASK.labels[at % 2], weight=weight)
        for at, weight in enumerate(weights)
    ]


@dataclass(frozen=True)
class Step:
    """One optimiser step from the same adapter, and what its rows ask for, worked out by hand.

    Attributes:
        loss: what the trainer logged.
        gradients: of all of the adapter, one after the other, at the end of the step.
        row_nats: of each row, negative log-likelihood summed over its answer tokens.
        row_gradients: of `row_nats`, shape [rows, parameters].
        answer_tokens: of all rows.
        columns: of the dataset that was trained on.
    """

    loss: float
    gradients: Any
    row_nats: Any
    row_gradients: Any
    answer_tokens: int
    columns: list[str]


def take_step(trained: Trained, folder: Path, rows: Sequence[Row] | str, batch_size: int, accumulation: int) -> Step:
    """Take one step on rows (or on the text of a file of them), from the last to the first."""
    import torch
    from transformers import AutoTokenizer, TrainerCallback

    from tasks.contracts.prompt import tuned_prompt
    from tasks.training.adapter import adapt
    from tasks.training.examples import read_weights, tokenize_file
    from tasks.training.frozen_base import load_for_training
    from tasks.training.recipe import SpeedPlan, make_plan
    from tasks.training.speed.install import speed_up
    from tasks.training.trainer import dataset_of, make_trainer
    from tasks.training.watch import Watcher

    job = make_job(folder, trained.request)
    if isinstance(rows, str):
        job.train_file.write_text(rows)
    else:
        write_rows(job.train_file, rows)
    job.scratch.mkdir()
    tokenizer = AutoTokenizer.from_pretrained(trained.model)
    examples = tokenize_file(job.train_file, tuned_prompt(TASK), tokenizer, 512)
    dev = tokenize_file(job.dev_file, tuned_prompt(TASK), tokenizer, 512)
    recipe = RECIPE.model_copy(update={"epochs": 1, "batch_size": batch_size, "gradient_accumulation": accumulation})
    speed = SpeedPlan(batches=BatchLayout.SHARED_PREFIX, kernels=Kernels.FUSED)
    plan = make_plan(recipe, len(examples), len(dev), speed=speed)
    plan = plan.model_copy(update={"gradient_norm": 1e9})  # nothing is clipped
    assert plan.total_steps == 1
    data = dataset_of(examples, range(len(examples))[::-1], read_weights(job.train_file))
    watcher = Watcher(job, plan, None, [100])
    model = adapt(load_for_training(trained.model, plan, "cpu"), plan)
    trainer = make_trainer(job, plan, "cpu", model, data, dataset_of(dev), watcher)
    adapter = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    draw = torch.Generator().manual_seed(3)
    for parameter in adapter:  # B matrices start at zero, which would leave A's without a gradient
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)

    def take_gradients() -> Any:
        gradients = torch.cat([parameter.grad.flatten() for parameter in adapter])
        trainer.model.zero_grad()
        return gradients

    row_nats, row_gradients = [], []  # by the plain way, before the model is changed
    for example in examples:
        ids = torch.tensor(example.input_ids)
        log_probs = trainer.model(input_ids=ids[None]).logits[0].log_softmax(-1)
        answer = range(len(ids) - example.answer_tokens, len(ids))
        nats = -torch.stack([log_probs[at - 1, ids[at]] for at in answer]).sum()
        nats.backward()
        row_nats.append(nats.item())
        row_gradients.append(take_gradients())

    speed_up(model, speed)
    seen = []

    class Catcher(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            seen.append(take_gradients())

    trainer.add_callback(Catcher())
    trainer.train()
    (gradients,) = seen
    return Step(
        loss=next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry),
        gradients=gradients,
        row_nats=torch.tensor(row_nats),
        row_gradients=torch.stack(row_gradients),
        answer_tokens=sum(example.answer_tokens for example in examples),
        columns=data.column_names,
    )


def distance(one: Any, other: Any) -> float:
    """The norm of the difference of two gradients, as a share of the first one's."""
    return float((one - other).norm() / one.norm())


@pytest.mark.parametrize(
    ("weights", "batch_size", "accumulation"),
    [
        ((0.25, 2.0, 1.0, 0.75), 4, 1),
        ((0.25, 2.0, 1.0, 0.75), 2, 2),
        ((0.25, 2.0, 1.0, 0.75), 3, 2),
        ((0.25, 2.0, 1.0, 0.75), 1, 4),
        ((3.0, 3.0, 3.0, 3.0), 2, 2),
        ((1.0, 1.0, 1.0, 1.0), 2, 2),
    ],
)
def test_each_row_pulls_by_its_weight_however_a_step_is_cut_into_batches(
    trained: Trained, tmp_path: Path, weights: tuple[float, ...], batch_size: int, accumulation: int
) -> None:
    import torch

    step = take_step(trained, tmp_path, step_rows(*weights), batch_size, accumulation)
    weight = torch.tensor(weights)
    wanted = (weight[:, None] * step.row_gradients).sum(dim=0) / step.answer_tokens
    assert distance(wanted, step.gradients) < 1e-5
    assert step.loss == pytest.approx(float(weight @ step.row_nats) / step.answer_tokens, rel=1e-5)
    if set(weights) != {1.0}:  # so the test can tell: without the weights it is another gradient altogether
        assert distance(wanted, step.row_gradients.sum(dim=0) / step.answer_tokens) > 0.1


def test_row_of_weight_two_pulls_as_if_it_stood_there_twice(trained: Trained, tmp_path: Path) -> None:
    """The sums over tokens are the same; the divisor is not: it counts the tokens of the one row once."""
    once = step_rows(1.0, 2.0, 1.0)
    again = [*step_rows(1.0, 1.0, 1.0), replace(once[1], id="again", weight=1.0)]
    weighted = take_step(trained, tmp_path / "weighted", once, 4, 1)
    repeated = take_step(trained, tmp_path / "repeated", again, 4, 1)
    assert repeated.answer_tokens > weighted.answer_tokens
    assert distance(repeated.gradients * repeated.answer_tokens, weighted.gradients * weighted.answer_tokens) < 1e-5
    assert repeated.loss * repeated.answer_tokens == pytest.approx(weighted.loss * weighted.answer_tokens, rel=1e-5)


def test_weights_of_one_change_no_bit(trained: Trained, tmp_path: Path) -> None:
    import torch

    rows = step_rows(1.0, 1.0, 1.0, 1.0)
    none = take_step(trained, tmp_path / "none", rows, 2, 2)
    written_out = "".join(row.to_json().replace('"target"', '"weight":1.0,"target"') + "\n" for row in rows)
    assert written_out.count('"weight":1.0') == 4
    ones = take_step(trained, tmp_path / "ones", written_out, 2, 2)
    assert torch.equal(none.gradients, ones.gradients)
    assert none.loss == ones.loss
    assert none.columns == ones.columns == ["input_ids", "answer_tokens"]


def test_weights_count_in_training_alone_and_after_a_resume(trained: Trained, tmp_path: Path) -> None:
    from tasks.tracking import connect

    job = make_job(tmp_path, trained.request, weighted=True)
    result = run_training(job, ignore_progress)

    nats = nats_per_answer_token(trained.model, job.out / "adapter", job.dev_file)
    assert result.dev_loss == pytest.approx(nats, abs=2e-3)  # though dev rows have weights from 1 to 12
    losses = [point["loss"] for point in curves(job.out) if "loss" in point]
    assert losses != [point["loss"] for point in curves(trained.out) if "loss" in point]
    facts = {"weighted_rows": 32, "lowest_weight": 0.5, "highest_weight": 1.5}
    assert json.loads((job.out / "summary.json").read_text())["weights"] == facts
    params = connect(job.request.execution).get_run(result.mlflow_run_id).data.params
    assert {name: params[name] for name in facts} == {name: str(value) for name, value in facts.items()}

    whole = digest_folder(job.out / "adapter")
    *_, newest = sorted(job.scratch.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    shutil.rmtree(newest)  # as if killed before it was written
    shutil.rmtree(job.out)
    job.out.mkdir()
    resumed = run_training(job, ignore_progress)
    assert 0 < resumed.resumed_from_step < int(newest.name.split("-")[1])
    assert digest_folder(job.out / "adapter") == whole
    assert [point["loss"] for point in curves(job.out) if "loss" in point] == losses


def test_training_without_weights_says_so(trained: Trained) -> None:
    summary = json.loads((trained.out / "summary.json").read_text())
    assert summary["weights"] == {"weighted_rows": 0, "lowest_weight": 1.0, "highest_weight": 1.0}


def test_other_weights_are_another_training(trained: Trained, tmp_path: Path) -> None:
    """Neither a finished training nor the checkpoints of a killed one are taken for rows of other weights."""

    def make(out: Path) -> dict[str, int]:
        write_splits(out, weighted=True)
        return {}

    digest = Store(str(tmp_path)).produce("splits", 1, {}, {}, make).reference()["digest"]
    weighted = trained.request.splits.model_copy(update={"digest": digest})
    assert find_trained(trained.request) is not None
    assert find_trained(trained.request.model_copy(update={"splits": weighted})) is None


def test_too_long_a_row_stops_training_by_name(trained: Trained, tmp_path: Path) -> None:
    short = trained.request.model_copy(update={"recipe": RECIPE.model_copy(update={"max_tokens": 80})})
    job = make_job(tmp_path, short, longest=20)
    with pytest.raises(TrainingError, match="more than the 80 allowed") as refusal:
        run_training(job, ignore_progress)
    assert "row r29 (line 30" in str(refusal.value.where)
    assert not any(job.out.iterdir())


def test_worker_dies_with_its_launcher_and_one_trains_at_a_time(trained: Trained, tmp_path: Path) -> None:
    job = make_job(tmp_path, trained.request)
    (tmp_path / "job.json").write_text(job.model_dump_json())
    code = (
        "from pathlib import Path; from tasks.training.job import TrainJob; "
        "from tasks.training.launch import run_training; "
        f"run_training(TrainJob.model_validate_json(Path({str(tmp_path / 'job.json')!r}).read_text()), print)"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    try:
        while launcher.poll() is None and not workers_of(job):
            time.sleep(0.05)
        with pytest.raises(TrainingError, match=f"pid {launcher.pid}") as refusal:
            run_training(job, ignore_progress)
        assert "its result is reused" in refusal.value.fix
    finally:
        launcher.kill()
        launcher.wait()
    while workers_of(job):
        time.sleep(0.05)  # pytest's time limit ends this if the worker lives on


@pytest.mark.parametrize(
    ("logs", "what"),
    [
        ({"loss": float("nan"), "grad_norm": 1.0}, "the training loss at step 7 is nan"),
        ({"loss": float("inf"), "grad_norm": 1.0}, "the training loss at step 7 is inf"),
        ({"loss": 1.0, "grad_norm": float("nan")}, "the gradient norm at step 7 is nan"),
        ({"eval_loss": float("nan")}, "the dev loss at step 7 is nan"),
    ],
)
def test_loss_that_is_no_number_stops_training(
    trained: Trained, tmp_path: Path, logs: dict[str, float], what: str
) -> None:
    from transformers import TrainerControl, TrainerState

    from tasks.training.recipe import make_plan
    from tasks.training.watch import Watcher

    plan = make_plan(RECIPE, 48, 12)
    watcher = Watcher(make_job(tmp_path, trained.request), plan, None, [100] * plan.total_steps)
    with pytest.raises(TrainingError, match=what) as refusal:
        watcher.on_log(None, TrainerState(global_step=7), TrainerControl(), logs=logs)
    assert refusal.value.where == "train.learning_rate = 0.01"


@pytest.mark.parametrize(
    ("code", "what"),
    [
        (-9, "ran out of memory"),
        (137, "ran out of memory"),
        (1, "exit code 1 and no result"),
        (0, "exit code 0 and no"),
    ],
)
def test_every_end_without_a_result_is_explained(tmp_path: Path, code: int, what: str) -> None:
    log = tmp_path / "worker.log"
    log.write_text("first line\n" + "more\n" * 30 + "RuntimeError: the last line\n")
    error = reason_of(code, tmp_path, log)
    assert what in error.what
    assert error.where == str(log)
    assert ("the last line" in error.what) == (what.startswith("exit"))
    assert "first line" not in error.what


def test_refusal_of_the_worker_is_raised_as_it_was_said(tmp_path: Path) -> None:
    record = {"type": "ServiceError", "what": "MLflow does not answer.", "where": "http://x", "fix": "start it"}
    (tmp_path / "error.json").write_text(json.dumps(record))
    error = reason_of(1, tmp_path, tmp_path / "worker.log")
    assert isinstance(error, ServiceError)
    assert (error.what, error.where, error.fix) == ("MLflow does not answer.", "http://x", "start it")
