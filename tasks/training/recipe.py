"""From the recipe that a person sets to the whole plan of a training. Pure: no model, no files, no clock."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from tasks.contracts.errors import TrainingError
from tasks.contracts.spec import BatchLayout, Frozen, Kernels, TrainMethod, TrainSpec

WARMUP_SHARE = 0.06  # of all steps: Adam's second moments need a few steps before the full rate is safe
WEIGHT_DECAY = 0.0  # an adapter decays towards the base model, which is where it started; early stopping guards instead
GRADIENT_NORM = 1.0  # the customary clip; a single odd row cannot throw the adapter
DEV_LOSS_ROWS = 256  # enough for the dev loss to tell epochs apart; more rows would slow every look
_CHECKPOINTS = 12  # a killed training loses at most a twelfth of its work
_MEGABATCH = 24  # batches sorted by length together: little padding, and still a fresh mix in every epoch


class SpeedPlan(Frozen):
    """How a training computes, with nothing left to choose; the defaults are the plain way, on any device.

    Attributes:
        base: "packed" (4 bits), "dequantised" (the numbers that the 4 bits stand for) or "plain" (not quantised).
        compute_dtype: "float32" or "bfloat16", of matrix products.
        batches: how the rows of a batch lie in memory.
        kernels: which code computes adapters, norms and attention.
        checkpointing: whether activations are computed again in the backward pass.
        compile: whether layers are compiled.
    """

    base: str = "dequantised"
    compute_dtype: str = "float32"
    batches: BatchLayout = BatchLayout.PADDED
    kernels: Kernels = Kernels.PLAIN
    checkpointing: bool = False
    compile: bool = False


class TrainPlan(Frozen):
    """Every number of a training, worked out before it starts.

    Attributes:
        epochs: passes over the training rows (may be a fraction).
        batch_size: rows in a forward pass.
        gradient_accumulation: forward passes in an optimiser step.
        total_rows: rows trained on, counted again in every epoch.
        total_steps: optimiser steps.
        evaluation_steps: optimiser steps between looks at the dev loss; the last step is always looked at too.
        checkpoint_steps: optimiser steps between checkpoints; one is written at every look too.
        warmup_steps: steps until the peak learning rate.
        dev_rows: rows that the dev loss is taken on.
        lora_rank: rank r of the adapter.
        lora_alpha: the adapter counts alpha / r (with rslora alpha / sqrt(r)); 2r where the recipe says nothing.
        lora_targets: names of the layers that get an adapter; empty for all linear ones.
        speed: how it computes.
    """

    method: TrainMethod

    epochs: float
    batch_size: int
    gradient_accumulation: int
    total_rows: int
    total_steps: int
    evaluation_steps: int
    checkpoint_steps: int
    warmup_steps: int
    learning_rate: float
    lora_rank: int
    lora_alpha: float
    lora_dropout: float
    lora_targets: tuple[str, ...]
    rslora: bool
    dora: bool
    weight_decay: float = WEIGHT_DECAY
    gradient_norm: float = GRADIENT_NORM
    max_tokens: int
    patience: int
    dev_rows: int
    seed: int
    speed: SpeedPlan


def make_plan(
    recipe: TrainSpec, train_rows: int, dev_rows: int, processes: int = 1, speed: SpeedPlan | None = None
) -> TrainPlan:
    """Work out the plan for so many rows, shared by so many processes (one for each device).

    Without `speed`, it computes the plain way.

    Raises:
        TrainingError: there are no rows to train on, or none for the dev loss.
    """
    if train_rows < 1 or dev_rows < 1:
        raise TrainingError(
            f"There are {train_rows} training and {dev_rows} dev rows; training needs both.",
            where="curate",
            fix="add data, or change `curate.dev_share`",
        )
    rows_a_step = recipe.batch_size * recipe.gradient_accumulation * processes
    total_rows = max(1, round(train_rows * recipe.epochs))
    total_steps = math.ceil(total_rows / rows_a_step)
    adapter = recipe.adapter
    return TrainPlan(
        method=recipe.method,
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        gradient_accumulation=recipe.gradient_accumulation,
        total_rows=total_rows,
        total_steps=total_steps,
        evaluation_steps=math.ceil(total_steps / recipe.evaluations),
        checkpoint_steps=recipe.save_every or math.ceil(total_steps / _CHECKPOINTS),
        warmup_steps=min(math.ceil(WARMUP_SHARE * total_steps), total_steps - 1),
        learning_rate=recipe.learning_rate,
        lora_rank=recipe.lora_rank,
        lora_alpha=2 * recipe.lora_rank if adapter.alpha is None else adapter.alpha,
        lora_dropout=adapter.dropout,
        lora_targets=adapter.targets,
        rslora=adapter.rslora,
        dora=adapter.dora,
        max_tokens=recipe.max_tokens,
        patience=recipe.patience,
        dev_rows=min(dev_rows, DEV_LOSS_ROWS),
        seed=recipe.seed,
        speed=speed or SpeedPlan(),
    )


def order_rows(lengths: Sequence[int], plan: TrainPlan) -> list[int]:
    """The order in which rows are trained on, as indices into `lengths`; the same for the same plan.

    Each epoch is a fresh shuffle in which batches hold rows of like length, so that little is padded. The whole
    order is fixed before training, so that a resumed training sees what the uninterrupted one would have seen.

    Args:
        lengths: tokens of each row.
        plan: `total_rows`, `batch_size` and `seed` are used.

    Returns:
        `plan.total_rows` indices; consecutive `plan.batch_size` of them are a batch.
    """
    draw = random.Random(plan.seed)  # noqa: S311 - a shuffle, not a secret
    size = plan.batch_size
    order: list[int] = []
    while len(order) < plan.total_rows:
        epoch = list(range(len(lengths)))
        draw.shuffle(epoch)
        epoch = epoch[: plan.total_rows - len(order)]
        batches = []
        for start in range(0, len(epoch), _MEGABATCH * size):
            rows = sorted(epoch[start : start + _MEGABATCH * size], key=lambda row: -lengths[row])
            batches += [rows[at : at + size] for at in range(0, len(rows), size)]
        last = batches.pop() if len(batches[-1]) < size else []  # a short batch would shift all that follow it
        draw.shuffle(batches)
        order += [row for batch in batches for row in batch] + last
    return order


def looks_without_gain(dev_losses: Sequence[float]) -> int:
    """How many looks at the dev loss have gone by since the best one."""
    if not dev_losses:
        return 0
    return len(dev_losses) - 1 - min(range(len(dev_losses)), key=dev_losses.__getitem__)
