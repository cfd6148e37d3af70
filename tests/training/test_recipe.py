"""The plan of a training, by tables."""

from __future__ import annotations

import pytest

from tasks.contracts.errors import TrainingError
from tasks.contracts.spec import TrainSpec
from tasks.training.recipe import DEV_LOSS_ROWS, looks_without_gain, make_plan, order_rows


@pytest.mark.parametrize(
    ("rows", "epochs", "batch", "accumulation", "evaluations", "processes", "total_rows", "steps", "every", "warmup"),
    [
        (640, 1.0, 8, 1, 4, 1, 640, 80, 20, 5),
        (640, 1.5, 8, 2, 4, 1, 960, 60, 15, 4),
        (641, 1.0, 8, 1, 4, 1, 641, 81, 21, 5),
        (640, 2.0, 8, 1, 3, 4, 1280, 40, 14, 3),
        (3, 1.0, 8, 1, 4, 1, 3, 1, 1, 0),
        (10, 0.01, 8, 1, 4, 1, 1, 1, 1, 0),
        (100, 1.0, 1, 1, 100, 1, 100, 100, 1, 6),
    ],
)
def test_plan_arithmetic(
    rows: int, epochs: float, batch: int, accumulation: int, evaluations: int, processes: int,
    total_rows: int, steps: int, every: int, warmup: int,
) -> None:  # fmt: skip
    recipe = TrainSpec(epochs=epochs, batch_size=batch, gradient_accumulation=accumulation, evaluations=evaluations)
    plan = make_plan(recipe, rows, 1000, processes)
    assert (plan.total_rows, plan.total_steps, plan.evaluation_steps, plan.warmup_steps) == (
        total_rows, steps, every, warmup,
    )  # fmt: skip
    assert plan.dev_rows == DEV_LOSS_ROWS
    assert steps / 12 <= plan.checkpoint_steps < steps / 12 + 1


def test_adapter_scale_is_two_at_every_rank() -> None:
    plans = [make_plan(TrainSpec(lora_rank=rank), 100, 7) for rank in (1, 8, 64)]
    assert [plan.lora_alpha / plan.lora_rank for plan in plans] == [2, 2, 2]
    assert {(plan.lora_targets, plan.dev_rows) for plan in plans} == {((), 7)}


@pytest.mark.parametrize(("train", "dev"), [(0, 5), (5, 0)])
def test_refuses_a_split_without_rows(train: int, dev: int) -> None:
    with pytest.raises(TrainingError, match=f"{train} training and {dev} dev rows"):
        make_plan(TrainSpec(), train, dev)


def test_every_epoch_holds_every_row_once_in_a_fresh_order() -> None:
    lengths = [20 + (7 * row) % 90 for row in range(101)]
    plan = make_plan(TrainSpec(epochs=2.5, batch_size=8), 101, 1)
    order = order_rows(lengths, plan)
    assert sorted(order[:101]) == sorted(order[101:202]) == list(range(101))
    assert order[:101] != order[101:202]
    assert len(order) == plan.total_rows == 252
    assert len(set(order[202:])) == 50
    assert order == order_rows(lengths, plan)
    assert order != order_rows(lengths, plan.model_copy(update={"seed": 18}))


def test_batches_hold_rows_of_like_length() -> None:
    lengths = [20 + (7 * row) % 90 for row in range(400)]
    plan = make_plan(TrainSpec(epochs=1, batch_size=8), 400, 1)
    batches = [order_rows(lengths, plan)[at : at + 8] for at in range(0, 400, 8)]
    padded = sum(8 * max(lengths[row] for row in batch) for batch in batches)
    assert padded < 1.06 * sum(lengths)
    longest = [max(lengths[row] for row in batch) for batch in batches]
    assert longest != sorted(longest)
    assert longest != sorted(longest, reverse=True)  # batches themselves come in random order


@pytest.mark.parametrize(
    ("losses", "looks"),
    [([], 0), ([1.0], 0), ([1.0, 0.9], 0), ([1.0, 0.9, 0.95], 1), ([0.5, 0.9, 0.8], 2), ([0.5, 0.5], 1)],
)
def test_looks_without_gain(losses: list[float], looks: int) -> None:
    assert looks_without_gain(losses) == looks
