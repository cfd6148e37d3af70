"""The trainer: transformers', with the loss on answer tokens alone, weighted rows, and the plan's batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from torch.nn import functional
from transformers import Trainer, TrainingArguments

from tasks.training.examples import Example, as_columns
from tasks.training.job import TrainJob
from tasks.training.recipe import TrainPlan
from tasks.training.speed.batches import GATHER, POSITIONS, ROW_OF, WEIGHTS, Collator, rows_of
from tasks.training.watch import Watcher

_LOG_POINTS = 100  # about so many points make a readable curve, and writing them costs nothing beside the steps


class AnswerLossTrainer(Trainer):
    """Trainer that works out logits for answer positions alone, and lets rows count by their weights.

    The usual loss scores every position against the whole vocabulary, though most carry none: for a one-word answer
    after a long prompt that adds, counted in multiplications, two fifths to a step of a 135M model with 49,152 tokens.
    Overriding `compute_loss` is the way transformers documents for a loss of one's own.
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
        loss, outputs = batch_loss(model, inputs)
        if model.training and num_items_in_batch is not None:  # answer tokens of the step, over all processes
            loss = loss / num_items_in_batch * self.accelerator.num_processes
        else:
            # Trainer averages the batches' losses weighted by rows. With this divisor that average is the exact mean
            # over all answer tokens, however they are spread over rows.
            rows = len(inputs[GATHER] if GATHER in inputs else inputs["input_ids"])
            loss = loss / (rows * self.dev_tokens_per_row)
        return (loss, outputs) if return_outputs else loss


def batch_loss(model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
    """The weighted sum over answer tokens of -log p, in nats, of a flat or padded batch; and the model's outputs."""
    weights = inputs.get(WEIGHTS)
    if GATHER in inputs:
        wanted = inputs["labels"]
        outputs = model(
            input_ids=inputs["input_ids"],
            position_ids=inputs["position_ids"],
            use_cache=False,
            logits_to_keep=inputs[POSITIONS],
            rows=rows_of(inputs),
        )
        logits = outputs.logits[0]
        weight = None if weights is None else weights[inputs[ROW_OF]]
    else:
        labels = inputs["labels"][:, 1:]
        answers = (labels != -100).any(dim=0).nonzero().flatten()  # positions where some row has an answer token
        wanted = labels[:, answers].flatten()
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            use_cache=False,
            logits_to_keep=answers,
        )
        logits = outputs.logits.flatten(0, 1)
        weight = None if weights is None else weights.repeat_interleave(len(answers))
    if weight is None:  # not the same with weights of 1, which may round differently
        return functional.cross_entropy(logits.float(), wanted, ignore_index=-100, reduction="sum"), outputs
    nats = functional.cross_entropy(logits.float(), wanted, ignore_index=-100, reduction="none")
    return (nats * weight).sum(), outputs


def dataset_of(
    examples: Sequence[Example], order: Sequence[int] | None = None, weights: Sequence[float] | None = None
) -> Dataset:
    """The examples as a dataset, in an order (of indices into them; None is as they come), with their weights."""
    dataset = Dataset.from_dict(as_columns(examples, weights))
    return dataset if order is None else dataset.select(order)


def make_trainer(
    job: TrainJob,
    plan: TrainPlan,
    device: str,
    model: Any,
    train_rows: Dataset,
    dev_rows: Dataset,
    watcher: Watcher,
) -> AnswerLossTrainer:
    """The trainer of a plan for a model that has its adapter already."""
    on_cuda = device == "cuda"
    arguments = TrainingArguments(
        output_dir=str(job.scratch),
        num_train_epochs=1,  # all epochs are written out in the rows' order
        per_device_train_batch_size=plan.batch_size,
        per_device_eval_batch_size=plan.batch_size,
        prediction_loss_only=True,
        gradient_accumulation_steps=plan.gradient_accumulation,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,  # the collator knows them
        learning_rate=plan.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=plan.warmup_steps,
        weight_decay=plan.weight_decay,
        max_grad_norm=plan.gradient_norm,
        optim="adamw_torch_fused",
        bf16=on_cuda,
        use_cpu=not on_cuda,
        gradient_checkpointing=plan.speed.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        eval_strategy="steps",
        eval_steps=plan.evaluation_steps,
        save_strategy="steps",
        save_steps=plan.evaluation_steps,  # and in between, see Watcher
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_steps=max(1, min(10, plan.total_steps // _LOG_POINTS)),
        logging_nan_inf_filter=False,  # the filter would show the last good loss in place of a NaN
        dataloader_pin_memory=on_cuda,
        seed=plan.seed,
        data_seed=plan.seed,
        ddp_find_unused_parameters=False,  # all that is trained takes part in each step
        report_to=[],
        disable_tqdm=True,
    )
    trainer = AnswerLossTrainer(
        model=model,
        args=arguments,
        train_dataset=train_rows,
        eval_dataset=dev_rows,
        data_collator=Collator(plan.speed.batches),
        callbacks=[watcher],
    )
    trainer.model_accepts_loss_kwargs = True  # compute_loss divides by the step's answer tokens
    return trainer
