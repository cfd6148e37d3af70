"""QLoRA on one job: tokens, trainer, checkpoints, adapter, merge."""

from __future__ import annotations

import gc
import json
import logging
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback, TrainerControl, TrainerState
from trl import SFTConfig, SFTTrainer

from tasks.contracts.errors import TrainingError
from tasks.contracts.progress import Progress
from tasks.contracts.prompt import tuned_prompt
from tasks.tracking import TrackedRun, open_run
from tasks.training.base_model import check_chat_template
from tasks.training.checkpoints import CURVES, cut_curves, find_checkpoint, mark_complete
from tasks.training.examples import (
    WEIGHT,
    Example,
    WeightFacts,
    as_columns,
    read_weights,
    sum_up_weights,
    tokenize_file,
)
from tasks.training.frozen_base import compute_dtype, device_name, load_for_training
from tasks.training.job import (
    SUMMARY,
    TrainJob,
    TrainResult,
    append_record,
    write_progress,
    write_whole,
)
from tasks.training.merge import merge_adapter
from tasks.training.recipe import TrainPlan, looks_without_gain, make_plan, order_rows

log = logging.getLogger("goldgate.training")
_LOG_POINTS = 100  # about so many points make a readable curve, and writing them costs nothing beside the steps


@dataclass(frozen=True)
class WeighingCollator:
    """A collator that keeps the rows' weights; `collate` makes the rest of the batch."""

    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch of these rows; where they have weights, with `weight`, float32 of shape [rows]."""
        batch = self.collate(rows)
        if WEIGHT in rows[0]:
            batch[WEIGHT] = torch.tensor([row[WEIGHT] for row in rows], dtype=torch.float32)
        return batch


class AnswerLossTrainer(SFTTrainer):
    """SFTTrainer that works out logits for answer positions alone, and lets rows count by their weights.

    On a CPU, trl 1.16 scores every position against the whole vocabulary, twice, though most carry no loss: for a
    one-word answer after a long prompt that adds, counted in multiplications, two fifths to a step of a 135M model with
    49,152 tokens. Overriding `compute_loss` is the way trl documents for a loss of one's own.
    """

    dev_tokens_per_row: float = 1.0

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Negative log-likelihood of the answer tokens, in nats for each of them.

        The loss of an optimiser step is sum_r w_r * NLL_r / N: NLL_r is summed over the answer tokens of row r, w_r is
        the row's weight, and N is the number of answer tokens in the step, each counted once whatever its row weighs.
        So without weights it is the mean over answer tokens. With weights, whose mean over the training file is 1, a
        row of weight 2 pulls as hard as if it stood there twice, and the learning rate keeps its meaning; a divisor
        that counted weights too would undo them in every step whose rows weigh the same.

        The dev loss is the mean over answer tokens, always: it compares steps, and says what to expect of data as they
        come. Its rows are given no weights.
        """
        labels = inputs["labels"][:, 1:]
        answers = (labels != -100).any(dim=0).nonzero().flatten()  # positions where some row has an answer token
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            use_cache=False,
            logits_to_keep=answers,
        )
        logits, wanted = outputs.logits.float().flatten(0, 1), labels[:, answers].flatten()
        if WEIGHT in inputs:
            nats = torch.nn.functional.cross_entropy(logits, wanted, ignore_index=-100, reduction="none")
            loss = (nats.view(len(labels), -1).sum(dim=1) * inputs[WEIGHT]).sum()
        else:  # not the same with weights of 1, which may round differently
            loss = torch.nn.functional.cross_entropy(logits, wanted, ignore_index=-100, reduction="sum")
        if num_items_in_batch is not None:  # answer tokens of the whole optimiser step, over all processes
            loss = loss / num_items_in_batch * self.accelerator.num_processes
        else:
            # Trainer averages the batches' losses weighted by rows. With this divisor that average is the exact mean
            # over all answer tokens, however they are spread over rows.
            loss = loss / (len(labels) * self.dev_tokens_per_row)
        return (loss, outputs) if return_outputs else loss


class Watcher(TrainerCallback):
    """Writes progress, curves and metrics as they come; marks checkpoints whole; stops early."""

    def __init__(self, job: TrainJob, plan: TrainPlan, run: TrackedRun | None, tokens_at: list[int]) -> None:
        self.job = job
        self.plan = plan
        self.run = run
        self.tokens_at = tokens_at  # tokens trained on after each optimiser step
        self.seconds_before = 0.0  # spent by earlier processes, up to the checkpoint
        self.started = time.monotonic()
        self.started_step = 0
        self.loss_note = ""
        self.dev_note = ""

    def seconds(self) -> float:
        """Wall time of training so far, over all processes."""
        return self.seconds_before + time.monotonic() - self.started

    def begin(self, step: int, seconds: float) -> None:
        """Training starts now, at this step."""
        self.started_step, self.seconds_before, self.started = step, seconds, time.monotonic()
        self._say(step)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save at the plan's steps, look and save after the last one; say how far it is."""
        if state.global_step >= state.max_steps:  # the last step is a look too, wherever the interval falls
            control.should_evaluate = control.should_save = True
        if state.global_step % self.plan.checkpoint_steps == 0:
            control.should_save = True
        if state.is_world_process_zero:
            self._say(state.global_step)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        """Write what was measured to the curves and MLflow.

        Raises:
            TrainingError: a loss or gradient is not finite.
        """
        if not logs or not ({"loss", "eval_loss"} & logs.keys()):
            return
        step = state.global_step
        loss, dev_loss = logs.get("loss"), logs.get("eval_loss")
        for name, value in (("training loss", loss), ("dev loss", dev_loss), ("gradient norm", logs.get("grad_norm"))):
            if value is not None and not torch.isfinite(torch.tensor(float(value))):
                raise TrainingError(
                    f"Training diverged: the {name} at step {step} is {value}.",
                    where=f"train.learning_rate = {self.plan.learning_rate}",
                    fix="lower `train.learning_rate` (half is a good try), or look for damaged rows",
                )
        if not state.is_world_process_zero:
            return
        record: dict[str, Any] = {"step": step}
        if loss is not None:
            since = time.monotonic() - self.started
            done = self.tokens_at[step - 1] - (self.tokens_at[self.started_step - 1] if self.started_step else 0)
            record |= {
                "loss": round(loss, 6),
                "learning_rate": logs["learning_rate"],
                "tokens_per_second": round(done / since, 1),
            }
            self.loss_note = f"loss {loss:.3f}"
        if dev_loss is not None:
            record |= {"dev_loss": round(dev_loss, 6)}
            self.dev_note = f"dev loss {dev_loss:.3f}"
        append_record(self.job.scratch / CURVES, record)
        if self.run is not None:
            metrics = {name: value for name, value in record.items() if name != "step"}
            self.run.log_metrics(metrics | {"peak_memory_bytes": peak_memory_bytes()}, step=step)
        self._say(step)

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop when the dev loss has not got better for `patience` looks."""
        looks = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
        if looks_without_gain(looks) >= self.plan.patience:
            control.should_training_stop = True

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Mark the checkpoint as whole."""
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            mark_complete(folder, state.global_step, self.seconds())

    def _say(self, step: int) -> None:
        note = ", ".join(part for part in (self.loss_note, self.dev_note) if part)
        write_progress(self.job.scratch, Progress(step, self.plan.total_steps, "steps", note))


def train(job: TrainJob) -> TrainResult | None:
    """Train and merge; the result, or None in all processes but the first when there are several.

    Raises:
        TrainingError: a row is too long or has no valid weight, the loss is not finite, or nothing was learned at all.
        ServiceError: MLflow cannot be reached.
    """
    request = job.request
    state = PartialState(cpu=device_name() == "cpu")  # reads what the distributed launcher set; alone, one process
    device = device_name()
    # Adam's second moments of tiny gradients are denormal numbers, and a CPU takes a tenth of a step for their roots.
    torch.set_flush_denormal(True)
    tokenizer = AutoTokenizer.from_pretrained(job.model_folder, trust_remote_code=False)
    check_chat_template(tokenizer, request.base.source)
    prompt = tuned_prompt(request.task)
    weights = read_weights(job.train_file)  # of training rows alone: a weight in the dev file counts for nothing
    weight_facts = sum_up_weights(weights)
    examples = tokenize_file(job.train_file, prompt, tokenizer, request.recipe.max_tokens)
    dev = tokenize_file(job.dev_file, prompt, tokenizer, request.recipe.max_tokens)
    plan = make_plan(request.recipe, len(examples), len(dev), state.num_processes)
    dev = sorted(dev[: plan.dev_rows], key=lambda example: len(example.input_ids))
    order = order_rows([len(example.input_ids) for example in examples], plan)
    with state.main_process_first():  # the first process clears away what a killed one left
        checkpoint = find_checkpoint(job.scratch, plan.model_dump_json())
    resumed_from = checkpoint.step if checkpoint else 0
    if checkpoint:
        log.info("going on from step %d (%s)", checkpoint.step, checkpoint.folder)

    tracked = _tracked(job, plan, device, len(examples), weight_facts)
    with tracked if state.is_main_process else nullcontext() as run:
        watcher = Watcher(job, plan, run, tokens_after_steps(examples, order, plan, state.num_processes))
        train_rows = _dataset(examples, order, weights)
        trainer = _make_trainer(job, plan, device, tokenizer, train_rows, _dataset(dev), watcher)
        trainer.dev_tokens_per_row = sum(example.answer_tokens for example in dev) / len(dev)
        if state.is_main_process:
            cut_curves(job.scratch, resumed_from)
        watcher.begin(resumed_from, checkpoint.seconds if checkpoint else 0.0)
        trainer.train(resume_from_checkpoint=str(checkpoint.folder) if checkpoint else None)
        if run is None:
            return None
        result = _result(trainer, plan, watcher, device, resumed_from, run)
        check_learned(trainer.model)
        run.log_metrics(
            {
                "best_dev_loss": result.dev_loss,
                "train_seconds": result.seconds,
                "mean_tokens_per_second": result.tokens_per_second,
            },
            step=result.steps,
        )
        write_progress(job.scratch, Progress(plan.total_steps, plan.total_steps, "steps", "merging"))
        _save(job, trainer.model, plan, result, weight_facts)
        del trainer, watcher  # two copies of the base model need not be in memory
        gc.collect()
        merge_adapter(job.model_folder, job.out / "adapter", job.out / "merged", device)
        run.log_artifact(job.out / CURVES)
        run.log_artifact(job.out / SUMMARY)
    return result


def tokens_after_steps(examples: Sequence[Example], order: Sequence[int], plan: TrainPlan, processes: int) -> list[int]:
    """Tokens trained on (prompts and answers, no padding) after each optimiser step, over all processes."""
    rows_a_step = plan.batch_size * plan.gradient_accumulation * processes
    sums = [0, *accumulate(len(examples[row].input_ids) for row in order)]
    return [sums[min(len(order), step * rows_a_step)] for step in range(1, plan.total_steps + 1)]


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far; on CUDA the largest device allocation."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _tracked(
    job: TrainJob, plan: TrainPlan, device: str, rows: int, weights: WeightFacts
) -> AbstractContextManager[TrackedRun]:
    @contextmanager
    def opened() -> Iterator[TrackedRun]:
        with open_run(
            job.request.execution,
            job.request.name,
            "train",
            key=job.fingerprint,
            tags={
                "goldgate.step": "train",
                "goldgate.base_model": job.request.base.source,
                "goldgate.base_digest": job.request.base.digest,
                "goldgate.device": device,
            },
            params=plan.model_dump() | {"compute_dtype": _name(compute_dtype(device))} | weights._asdict(),
        ) as run:
            run.log_dataset("train", job.request.splits.digest, job.request.splits.uri, rows)
            yield run

    return opened()


def _dataset(
    examples: Sequence[Example], order: Sequence[int] | None = None, weights: Sequence[float] | None = None
) -> Dataset:
    dataset = Dataset.from_dict(as_columns(examples, weights))
    return dataset if order is None else dataset.select(order)


def _make_trainer(
    job: TrainJob,
    plan: TrainPlan,
    device: str,
    tokenizer: Any,
    train_rows: Dataset,
    dev_rows: Dataset,
    watcher: Watcher,
) -> AnswerLossTrainer:
    on_cuda = device == "cuda"
    config = SFTConfig(
        output_dir=str(job.scratch),
        num_train_epochs=1,  # all epochs are written out in the rows' order
        per_device_train_batch_size=plan.batch_size,
        per_device_eval_batch_size=plan.batch_size,
        gradient_accumulation_steps=plan.gradient_accumulation,
        train_sampling_strategy="sequential",
        completion_only_loss=True,
        max_length=None,  # too long a row was refused; nothing is cut off
        remove_unused_columns=False,  # trl would drop the weights, which its collator does not know
        learning_rate=plan.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=plan.warmup_steps,
        weight_decay=plan.weight_decay,
        max_grad_norm=plan.gradient_norm,
        optim="adamw_torch_fused",
        bf16=on_cuda,
        use_cpu=not on_cuda,
        gradient_checkpointing=on_cuda,  # device memory is scarce; recomputing repeats each forward pass
        eval_strategy="steps",
        eval_steps=plan.evaluation_steps,
        save_strategy="steps",
        save_steps=plan.evaluation_steps,  # and in between, see Watcher
        save_total_limit=2,  # the best and the newest
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_steps=max(1, min(10, plan.total_steps // _LOG_POINTS)),
        logging_nan_inf_filter=False,  # the filter would show the last good loss in place of a NaN
        dataloader_pin_memory=on_cuda,
        seed=plan.seed,
        data_seed=plan.seed,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = AnswerLossTrainer(
        model=load_for_training(job.model_folder, device),
        args=config,
        train_dataset=train_rows,
        eval_dataset=dev_rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=plan.lora_rank,
            lora_alpha=plan.lora_alpha,
            lora_dropout=plan.lora_dropout,
            target_modules=plan.lora_targets,
            task_type="CAUSAL_LM",
        ),
        callbacks=[watcher],
    )
    trainer.data_collator = WeighingCollator(trainer.data_collator)
    # One dtype from the first step on, fresh or resumed: a resumed adapter is loaded as float32, and bfloat16 is too
    # coarse for the small updates at the end of a cosine schedule.
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return trainer


def check_learned(model: Any) -> None:
    """Refuse an adapter that adds nothing: its B matrices start at zero and must have left it."""
    moved = any(
        parameter.detach().abs().max().item() > 0
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and "lora_B" in name
    )
    if not moved:
        raise TrainingError(
            "Training changed nothing: the adapter is as it was at the start.",
            where="train",
            fix="raise `train.epochs` or `train.learning_rate`",
        )


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
        compute_dtype=_name(compute_dtype(device)),
        stopped_early=state.global_step < plan.total_steps,
        mlflow_run_id=run.id,
        mlflow_url=run.url,
    )


def _save(job: TrainJob, model: Any, plan: TrainPlan, result: TrainResult, weights: WeightFacts) -> None:
    """Adapter, curves and summary into the job's `out`; nothing in them depends on where the store is."""
    adapter = job.out / "adapter"
    for config in model.peft_config.values():
        config.base_model_name_or_path = job.request.base.source
        config.target_modules = sorted(config.target_modules)  # a set would be written in another order each time
    model.save_pretrained(adapter)
    (adapter / "README.md").unlink(missing_ok=True)  # a model card with nothing filled in
    shutil.copyfile(job.scratch / CURVES, job.out / CURVES)
    summary = {"result": result.model_dump(), "plan": plan.model_dump(), "weights": weights._asdict()}
    write_whole(job.out / SUMMARY, json.dumps(summary, indent=2) + "\n")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
