"""Training for real, on the tiny model: what it makes, how it goes on, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tasks.contracts.errors import TrainingError
from tasks.contracts.progress import Progress, ignore_progress
from tasks.contracts.references import BaseModelRef, SplitsRef, TrainRequest
from tasks.contracts.rows import Message, Row, write_rows
from tasks.contracts.spec import ExecutionSpec, TaskKind, TaskSpec, TrainSpec
from tasks.store import digest_folder
from tasks.training.job import TrainJob, TrainResult
from tasks.training.launch import run_training

TASK = TaskSpec(kind=TaskKind.CLASSIFY, instruction="Which fruit?", labels=("red apple", "pear"))
RECIPE = TrainSpec(epochs=3, learning_rate=1e-2, lora_rank=4, batch_size=4, gradient_accumulation=2, evaluations=6)
STEPS = 18


def make_job(folder: Path, base: Path, recipe: TrainSpec = RECIPE, *, longest: int = 1) -> TrainJob:
    """A job over 48 rows whose answer is in the text; one row is `longest` times as long."""
    rows = []
    for number in range(48):
        text = ("crimson and round" if number % 2 else "green and long") + " fruit" * (number % 5)
        if number == 29:
            text *= longest
        rows.append(Row(f"r{number}", number + 1, (Message("user", text),), "red apple" if number % 2 else "pear"))
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "dev.jsonl", rows[:12])
    made = {"uri": "none", "step": "none", "fingerprint": "0" * 64, "digest": "1" * 64}
    (folder / "out").mkdir(exist_ok=True)
    return TrainJob(
        request=TrainRequest(
            name="fruit",
            task=TASK,
            splits=SplitsRef(**made, train_rows=48, dev_rows=12, removed={}),
            base=BaseModelRef(**made, source="tiny"),
            recipe=recipe,
            execution=ExecutionSpec(store=str(folder / "store")),
        ),
        fingerprint="2" * 64,
        model_folder=base,
        train_file=folder / "train.jsonl",
        dev_file=folder / "dev.jsonl",
        scratch=folder / "scratch",
        out=folder / "out",
    )


def curves(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "curves.jsonl").read_text().splitlines()]


class Trained:
    """One uninterrupted training, shared by the tests that look at it."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.job = make_job(folder, base)
        self.heard: list[Progress] = []
        self.result = run_training(self.job, self.heard.append)


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained"), tiny_model)


def test_training_lowers_the_dev_loss_and_writes_what_it_says(trained: Trained) -> None:
    result, out = trained.result, trained.job.out
    points = curves(out)
    dev_losses = {point["step"]: point["dev_loss"] for point in points if "dev_loss" in point}
    assert list(dev_losses) == [3, 6, 9, 12, 15, 18]
    assert dev_losses[18] < dev_losses[3] - 0.5
    assert [point["step"] for point in points if "loss" in point] == list(range(1, STEPS + 1))
    assert result.dev_loss == pytest.approx(min(dev_losses.values()), abs=1e-5)
    assert dev_losses[result.best_step] == min(dev_losses.values())
    assert (result.steps, result.planned_steps, result.resumed_from_step) == (STEPS, STEPS, 0)
    assert (result.device, result.compute_dtype, result.stopped_early) == ("cpu", "float32", False)
    assert result.tokens_per_second == pytest.approx(result.tokens / result.seconds, rel=0.1)
    assert 1e8 < result.peak_memory_bytes < 4e9
    rates = [point["learning_rate"] for point in points if "learning_rate" in point]
    assert max(rates) == pytest.approx(1e-2)
    assert rates[-1] < 1e-3
    summary = json.loads((out / "summary.json").read_text())
    assert TrainResult.model_validate(summary["result"]) == result
    assert summary["plan"]["total_steps"] == STEPS
    assert trained.heard[-1] == (STEPS, STEPS, "steps", "merging")
    assert any("dev loss" in progress.note for progress in trained.heard)


def test_dev_loss_is_nats_per_answer_token(trained: Trained) -> None:
    """The number from the curves, worked out again with plain transformers and peft."""
    import torch
    from peft import PeftModel
    from transformers import AutoTokenizer

    from tasks.contracts.prompt import tuned_prompt
    from tasks.training.examples import tokenize_file
    from tasks.training.frozen_base import load_dequantised

    tokenizer = AutoTokenizer.from_pretrained(trained.job.model_folder)
    base = load_dequantised(trained.job.model_folder, "cpu")
    model = PeftModel.from_pretrained(base, trained.job.out / "adapter").eval()
    nats, tokens = 0.0, 0
    for example in tokenize_file(trained.job.dev_file, tuned_prompt(TASK), tokenizer, 512):
        ids = torch.tensor([example.input_ids])
        with torch.inference_mode():
            log_probs = model(input_ids=ids).logits.log_softmax(-1)[0]
        for at in range(len(example.input_ids) - example.answer_tokens, len(example.input_ids)):
            nats -= log_probs[at - 1, example.input_ids[at]].item()
            tokens += 1
    assert trained.result.dev_loss == pytest.approx(nats / tokens, abs=2e-3)


def test_artefacts_are_safetensors_and_know_no_paths(trained: Trained) -> None:
    from safetensors import safe_open

    files = {file.relative_to(trained.job.out).as_posix() for file in trained.job.out.rglob("*") if file.is_file()}
    assert files == {
        "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "curves.jsonl", "summary.json",
        "merged/chat_template.jinja", "merged/config.json", "merged/generation_config.json", "merged/model.safetensors",
        "merged/tokenizer.json", "merged/tokenizer_config.json",
    }  # fmt: skip
    for name in files - {"adapter/adapter_model.safetensors", "merged/model.safetensors"}:
        assert str(trained.job.model_folder) not in (trained.job.out / name).read_text(), name
        assert str(trained.job.scratch.parent) not in (trained.job.out / name).read_text(), name
    with safe_open(trained.job.out / "adapter" / "adapter_model.safetensors", "pt") as adapter:
        names = list(adapter.keys())
        shapes = {tuple(adapter.get_tensor(name).shape) for name in names if ".lora_A." in name}
    assert len(names) == 2 * 7 * 2  # A and B, seven linear layers, two blocks
    assert {shape[0] for shape in shapes} == {4}


def test_merged_model_is_adapter_on_dequantised_base(trained: Trained) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tasks.training.frozen_base import load_dequantised

    merged = AutoModelForCausalLM.from_pretrained(trained.job.out / "merged")
    assert merged.dtype == torch.bfloat16
    assert not hasattr(merged.config, "quantization_config")
    assert AutoTokenizer.from_pretrained(trained.job.out / "merged").chat_template
    base = load_dequantised(trained.job.model_folder, "cpu")
    ids = torch.arange(5, 45)[None]
    with torch.inference_mode():
        untuned = base(input_ids=ids).logits
        wanted = PeftModel.from_pretrained(base, trained.job.out / "adapter").eval()(input_ids=ids).logits
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


def test_killed_training_goes_on_and_ends_as_if_nothing_had_happened(
    trained: Trained, tiny_model: Path, tmp_path: Path
) -> None:
    job = make_job(tmp_path, tiny_model)
    killed_at = 0

    def kill_after_second_checkpoint(progress: Progress) -> None:
        nonlocal killed_at
        marks = list(job.scratch.glob("checkpoint-*/goldgate_complete.json"))
        if not killed_at and any(mark.parent.name == "checkpoint-6" for mark in marks):
            killed_at = int(progress.done)
            os.kill(workers_of(job)[0], signal.SIGKILL)

    with pytest.raises(TrainingError, match="SIGKILL"):
        run_training(job, kill_after_second_checkpoint)
    newest = max(
        int(mark.parent.name.split("-")[1]) for mark in job.scratch.glob("checkpoint-*/goldgate_complete.json")
    )
    assert newest < STEPS
    half_written = job.scratch / f"checkpoint-{newest + 1}"  # as if killed while writing the next one
    half_written.mkdir()
    (half_written / "trainer_state.json").write_text("{")
    with (job.scratch / "curves.jsonl").open("a") as broken:
        broken.write('{"step": 1')

    result = run_training(job, ignore_progress)

    assert result.resumed_from_step == newest
    assert not half_written.exists()
    assert (result.steps, result.best_step) == (trained.result.steps, trained.result.best_step)
    whole = [(p["step"], p.get("loss"), p.get("dev_loss")) for p in curves(trained.job.out)]
    assert [(p["step"], p.get("loss"), p.get("dev_loss")) for p in curves(job.out)] == whole
    assert digest_folder(job.out / "adapter") == digest_folder(trained.job.out / "adapter")
    assert digest_folder(job.out / "merged") == digest_folder(trained.job.out / "merged")
    assert len(list(job.scratch.glob("checkpoint-*"))) <= 2
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


def test_too_long_a_row_stops_training_by_name(tiny_model: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path, tiny_model, RECIPE.model_copy(update={"max_tokens": 80}), longest=20)
    with pytest.raises(TrainingError, match="more than the 80 allowed") as refusal:
        run_training(job, ignore_progress)
    assert "row r29 (line 30" in str(refusal.value.where)
    assert not any(job.out.iterdir())


def test_worker_dies_with_its_launcher_and_one_trains_at_a_time(tiny_model: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path, tiny_model)
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
