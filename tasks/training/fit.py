"""One training, from rows to an adapter and a merged model."""

from __future__ import annotations

import gc
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer

from tasks.contracts.progress import Progress
from tasks.contracts.prompt import tuned_prompt
from tasks.contracts.rows import Row, read_rows
from tasks.contracts.spec import Guard, TrainBackend
from tasks.tracking import TrackedRun, open_run
from tasks.training.adapter import adapt
from tasks.training.backends import load_with_unsloth
from tasks.training.base_model import check_answers_writable, check_chat_template, trusts_code
from tasks.training.checkpoints import CURVES, cut_curves, has_stopped
from tasks.training.curve import PLAN_TAG, continue_curve, set_aside_other_plans
from tasks.training.energy import EnergyMeter, find_meters
from tasks.training.examples import Example, WeightFacts, read_weights, sum_up_weights, tokenize_row
from tasks.training.forecast import device_words, price_of
from tasks.training.frozen_base import compute_dtype, device_name, load_for_training, written_out_weights
from tasks.training.guards import check_changed, check_training, fingerprint_weights
from tasks.training.job import SUMMARY, TrainJob, TrainResult, write_progress, write_whole
from tasks.training.manifest import MANIFEST, facts_to_log, write_manifest
from tasks.training.memory import device_memory, fit_to_memory, halved, read_shape
from tasks.training.merge import merge_adapter
from tasks.training.preempt import install
from tasks.training.recipe import TrainPlan, make_plan, order_rows
from tasks.training.selfcheck import SelfCheck, check_it_can_learn, steps_for
from tasks.training.speed.batches import Collator
from tasks.training.speed.choose import choose_speed, describe_model
from tasks.training.speed.install import speed_up
from tasks.training.together import check_same, find_together, gather_trained, join, plan_together
from tasks.training.trainer import AnswerLossTrainer, batch_loss, dataset_of, make_trainer
from tasks.training.watch import Watcher, peak_memory_bytes

log = logging.getLogger("goldgate.training")


@dataclass(frozen=True)
class _Material:
    """What is trained on, and in which order."""

    rows: list[Row]
    examples: list[Example]
    weights: list[float] | None
    dev: list[Example]
    plan: TrainPlan
    order: list[int]


def train(job: TrainJob) -> TrainResult | None:
    """Train and merge; the result, or None in all processes but the first when there are several.

    Raises:
        TrainingError: a row is too long or has no valid weight, a guard objects, an option cannot be had on this
            device, the loss is not finite, or nothing was learned at all.
        ServiceError: MLflow cannot be reached.
        Preempted: it was told to stop, and kept a checkpoint.
    """
    request = job.request
    preemption = install()
    state = join(device_name())
    device = device_name()
    material = _prepare(job, state.num_processes, device)
    identity = material.plan.model_dump_json()  # whatever this machine's memory made of it: its steps are the same
    check_same(state, job, identity)
    plan, changes = plan_together(state, *_fit_to_memory(job, material, device))
    findings = check_training(
        material.examples, material.rows, material.order, plan.dev_rows, request.task, request.accept_risks
    )
    checkpoint = find_together(state, job.scratch, identity)
    resumed_from = checkpoint.step if checkpoint else 0
    if checkpoint:
        log.info("going on from step %d (%s)", checkpoint.step, checkpoint.folder)

    weights = sum_up_weights(material.weights)
    tracked = _tracked(job, plan, identity, device, len(material.rows), weights)
    with tracked if state.is_main_process else nullcontext() as run:
        model = _load(job, plan, device)
        train_rows = dataset_of(material.examples, material.order, material.weights)
        self_check = None
        if checkpoint is None:
            self_check = _check_it_can_learn(model, train_rows, plan, device, request.accept_risks)
        before = fingerprint_weights(model)
        tokens_at = tokens_after_steps(material.examples, material.order, plan, state.num_processes)
        named = device_words(device)
        price = price_of(request.execution.prices, named)
        curve = None if run is None else continue_curve(run)
        watcher = Watcher(job, plan, curve, tokens_at, price=price, devices=state.num_processes)
        trainer = make_trainer(job, plan, device, model, train_rows, dataset_of(material.dev), watcher)
        trainer.add_callback(preemption.callback())
        trainer.dev_tokens_per_row = sum(example.answer_tokens for example in material.dev) / len(material.dev)
        if state.is_main_process:
            cut_curves(job.scratch, resumed_from)
        watcher.begin(resumed_from, checkpoint.seconds if checkpoint else 0.0)
        if checkpoint and has_stopped(checkpoint, plan.patience):
            trainer.args.num_train_epochs = 0  # it had stopped there; only the best is loaded
        with EnergyMeter(find_meters(device)) as meter:
            trainer.train(resume_from_checkpoint=str(checkpoint.folder) if checkpoint else None)
        preemption.leave_if_preempted()
        trained = gather_trained(trainer.model)  # by all processes: with FSDP each has a part
        if run is None or curve is None:
            return None
        findings += watcher.findings + check_changed(before, trained, request.accept_risks)
        result = _result(trainer, plan, watcher, device, resumed_from, run)
        curve.log_metrics(
            {
                "best_dev_loss": result.dev_loss,
                "train_seconds": result.seconds,
                "mean_tokens_per_second": result.tokens_per_second,
            },
            step=result.steps,
        )
        write_progress(job.scratch, Progress(plan.total_steps, plan.total_steps, "steps", "merging"))
        _save(job, trainer.model, trained, plan, result, weights)
        # Several processes may each have a part of the base only.
        written_out = written_out_weights(model, plan, device) if state.num_processes == 1 else None
        del trainer, watcher, model  # two copies of the base model need not be in memory
        gc.collect()
        skews = merge_adapter(
            job.model_folder, job.out / "adapter", job.out / "merged", plan, device, material.dev,
            trust_code=trusts_code(job.request.recipe, job.model_folder), written_out=written_out,
        )  # fmt: skip
        manifest = write_manifest(
            job.out, job, plan, result, named, meter.energy(),
            devices=state.num_processes, changes=changes, skews=skews, self_check=self_check, findings=findings,
        )  # fmt: skip
        curve.log_metrics(facts_to_log(manifest), step=result.steps)
        for name in CURVES, SUMMARY, MANIFEST:
            run.log_artifact(job.out / name)
    return result


def _load(job: TrainJob, plan: TrainPlan, device: str) -> Any:
    """The model with what is trained in it, computing as the plan says."""
    if job.request.recipe.backend is TrainBackend.UNSLOTH:
        return load_with_unsloth(job.model_folder, plan)
    model = adapt(
        load_for_training(job.model_folder, plan, device, trust_code=trusts_code(job.request.recipe, job.model_folder)),
        plan,
    )
    speed_up(model, plan.speed)
    return model


def _prepare(job: TrainJob, processes: int, device: str) -> _Material:
    request, recipe = job.request, job.request.recipe
    trust_code = trusts_code(recipe, job.model_folder)
    tokenizer = AutoTokenizer.from_pretrained(job.model_folder, trust_remote_code=trust_code)
    check_chat_template(tokenizer, request.base.source)
    prompt = tuned_prompt(request.task)
    rows = list(read_rows(job.train_file))
    weights = read_weights(job.train_file)  # of training rows alone: a weight in the dev file counts for nothing
    dev_rows = list(read_rows(job.dev_file))
    check_answers_writable(tokenizer, ((row.id, row.target) for row in [*rows, *dev_rows]))
    examples = [tokenize_row(row, prompt, tokenizer, recipe.max_tokens) for row in rows]
    dev = [tokenize_row(row, prompt, tokenizer, recipe.max_tokens) for row in dev_rows]
    dtype = _name(compute_dtype(device, recipe.speed.compute))
    speed = choose_speed(
        recipe,
        device,
        dtype,
        describe_model(job.model_folder, trust_code=trust_code),
    )
    plan = make_plan(recipe, len(examples), len(dev), processes, speed)
    return _Material(
        rows=rows,
        examples=examples,
        weights=weights,
        dev=sorted(dev[: plan.dev_rows], key=lambda example: len(example.input_ids)),
        plan=plan,
        order=order_rows([len(example.input_ids) for example in examples], plan),
    )


def _fit_to_memory(job: TrainJob, material: _Material, device: str) -> tuple[TrainPlan, list[str]]:
    """The plan with smaller batches, and more of them, where memory asks; and what was changed, in words.

    Its steps hold the same rows, so checkpoints fit it too.
    """
    asked = material.plan
    for _ in range(job.halve_batches):  # where it has run out of memory before
        asked = halved(asked)
    plan, changes = fit_to_memory(
        asked,
        read_shape(job.model_folder),
        device,
        max(len(example.input_ids) for example in material.examples),
        device_memory(device),
        answer=max(example.answer_tokens for example in material.examples),
        checkpointing=job.request.recipe.speed.checkpointing,
    )
    for change in changes:
        log.warning("%s", change)
    return plan, changes


def _check_it_can_learn(
    model: Any, rows: Dataset, plan: TrainPlan, device: str, accept_risks: Mapping[Guard, str]
) -> SelfCheck:
    """Overfit the first batch and put everything back."""
    batch = Collator(plan.speed.batches)([rows[at] for at in range(min(plan.batch_size, len(rows)))])
    placed = {name: tensor.to(device) for name, tensor in batch.items()}

    def loss_of(asked: Any, inputs: Any) -> torch.Tensor:
        return batch_loss(asked, inputs)[0] / (inputs["labels"] != -100).sum()

    steps = steps_for(plan.total_steps)
    check = check_it_can_learn(model, [placed], loss_of, plan.learning_rate, accept_risks, steps=steps)
    log.info("%s", check.sentence())
    return check


def tokens_after_steps(examples: Sequence[Example], order: Sequence[int], plan: TrainPlan, processes: int) -> list[int]:
    """Tokens trained on (prompts and answers, no padding) after each optimiser step, over all processes."""
    rows_a_step = plan.batch_size * plan.gradient_accumulation * processes
    sums = [0, *accumulate(len(examples[row].input_ids) for row in order)]
    return [sums[min(len(order), step * rows_a_step)] for step in range(1, plan.total_steps + 1)]


def _tracked(
    job: TrainJob, plan: TrainPlan, identity: str, device: str, rows: int, weights: WeightFacts
) -> AbstractContextManager[TrackedRun]:
    @contextmanager
    def opened() -> Iterator[TrackedRun]:
        digest = sha256(identity.encode()).hexdigest()
        set_aside_other_plans(job.request.execution, job.request.name, job.fingerprint, digest)
        with open_run(
            job.request.execution,
            job.request.name,
            "train",
            key=job.fingerprint,
            within=job.request.within,
            tags={
                "goldgate.step": "train",
                "goldgate.base_model": job.request.base.source,
                "goldgate.base_digest": job.request.base.digest,
                "goldgate.device": device,
                PLAN_TAG: digest,
            },
            params=plan.model_dump(exclude={"speed"}) | plan.speed.model_dump() | weights._asdict(),
        ) as run:
            run.log_dataset("train", job.request.splits.digest, job.request.splits.uri, rows)
            yield run

    return opened()


def _result(
    trainer: AnswerLossTrainer, plan: TrainPlan, watcher: Watcher, device: str, resumed_from: int, run: TrackedRun
) -> TrainResult:
    state = trainer.state
    seconds = watcher.seconds()
    tokens = watcher.tokens_at[state.global_step - 1]
    return TrainResult(
        steps=state.global_step,
        planned_steps=plan.total_steps,
        best_step=state.best_global_step,
        dev_loss=state.best_metric,
        seconds=round(seconds, 1),
        tokens=tokens,
        tokens_per_second=round(tokens / seconds, 1),
        peak_memory_bytes=peak_memory_bytes(),
        resumed_from_step=resumed_from,
        trainable_parameters=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        device=device,
        compute_dtype=plan.speed.compute_dtype,
        halve_batches=watcher.job.halve_batches,
        stopped_early=state.global_step < plan.total_steps,
        mlflow_run_id=run.id,
        mlflow_url=run.url,
    )


def _save(
    job: TrainJob,
    model: Any,
    trained: Mapping[str, torch.Tensor],
    plan: TrainPlan,
    result: TrainResult,
    weights: WeightFacts,
) -> None:
    """What was trained, curves and summary into the job's `out`; nothing in them depends on where the store is.

    With method full, `adapter/` holds all weights as they were trained, in float32.
    """
    adapter = job.out / "adapter"
    for config in getattr(model, "peft_config", {}).values():
        config.base_model_name_or_path = job.request.base.source
        config.target_modules = sorted(config.target_modules)  # a set would be written in another order each time
    model.config.name_or_path = ""  # what method full writes has it too
    model.save_pretrained(adapter, state_dict=trained)
    (adapter / "README.md").unlink(missing_ok=True)  # a model card with nothing filled in
    shutil.copyfile(job.scratch / CURVES, job.out / CURVES)
    summary = {"result": result.model_dump(), "plan": plan.model_dump(), "weights": weights._asdict()}
    write_whole(job.out / SUMMARY, json.dumps(summary, indent=2) + "\n")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
