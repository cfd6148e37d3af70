"""Each way to compute gives the loss and gradients of the plain way, and its batches hold what they should."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tasks.contracts.errors import TrainingError
from tasks.contracts.spec import AdapterSpec, BatchLayout, Kernels, SpeedSpec, TrainMethod, TrainSpec
from tasks.training.recipe import SpeedPlan, make_plan
from tasks.training.speed.batches import flatten, pad
from tasks.training.speed.choose import choose_speed

LLAMA = {"model_type": "llama"}


def make_rows(*lengths: int, shared: int = 9, weighted: bool = False) -> list[dict[str, Any]]:
    """Rows of random tokens that begin alike, with answers of one to three tokens."""
    draw = random.Random(3)
    head = [draw.randrange(4, 500) for _ in range(shared)]
    rows: list[dict[str, Any]] = []
    for number, length in enumerate(lengths):
        # The first own token differs from row to row, so that no more than `head` is shared.
        own = [number + 4, *(draw.randrange(4, 500) for _ in range(length - 1))]
        rows.append({"input_ids": head + own, "answer_tokens": 1 + number % 3})
        if weighted:
            rows[-1]["weight"] = 0.5 + number
    return rows


def gradients(model_folder: Path, speed: SpeedPlan, rows: Sequence[dict[str, Any]], recipe: TrainSpec) -> Any:
    """Loss of one batch, and the gradient of the whole adapter, from an adapter that is not at its start."""
    import torch

    from tasks.training.adapter import adapt
    from tasks.training.frozen_base import load_for_training
    from tasks.training.speed.batches import Collator
    from tasks.training.speed.install import speed_up
    from tasks.training.trainer import batch_loss

    plan = make_plan(recipe, 100, 30, speed=speed)
    model = adapt(load_for_training(model_folder, plan, "cpu"), plan)
    draw = torch.Generator().manual_seed(3)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:  # B matrices start at zero, which would leave A's without a gradient
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    speed_up(model, speed)
    if speed.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    loss, _ = batch_loss(model, Collator(speed.batches)(list(rows)))
    loss.backward()
    return loss.item(), torch.cat([parameter.grad.flatten().double() for parameter in trained])


RECIPES = {
    "plain": TrainSpec(lora_rank=4),
    "rank-stabilised": TrainSpec(lora_rank=4, adapter=AdapterSpec(rslora=True, alpha=4)),
    "dora": TrainSpec(lora_rank=4, adapter=AdapterSpec(dora=True)),
    "some layers": TrainSpec(lora_rank=4, adapter=AdapterSpec(targets=("q_proj", "down_proj"))),
    "unquantised": TrainSpec(lora_rank=4, method=TrainMethod.LORA),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
@pytest.mark.parametrize("weighted", [False, True])
def test_every_way_to_compute_gives_the_plain_gradients(tiny_model: Path, recipe: TrainSpec, weighted: bool) -> None:
    base = "plain" if recipe.method is TrainMethod.LORA else "dequantised"
    rows = make_rows(12, 31, 20, 7, 33, weighted=weighted)
    wanted_loss, wanted = gradients(tiny_model, SpeedPlan(base=base), rows, recipe)
    for layout in BatchLayout.PADDED, BatchLayout.FLAT, BatchLayout.SHARED_PREFIX:
        for kernels in Kernels.PLAIN, Kernels.FUSED:
            for checkpointing in False, True:
                speed = SpeedPlan(base=base, batches=layout, kernels=kernels, checkpointing=checkpointing)
                loss, got = gradients(tiny_model, speed, rows, recipe)
                assert loss == pytest.approx(wanted_loss, rel=1e-6), speed
                assert (got - wanted).norm() < 1e-5 * wanted.norm(), speed


@pytest.mark.parametrize("layout", [BatchLayout.PADDED, BatchLayout.FLAT, BatchLayout.SHARED_PREFIX])
def test_bfloat16_gives_the_same_gradients_to_its_rounding(tiny_model: Path, layout: BatchLayout) -> None:
    rows = make_rows(12, 31, 20, 7, 33)
    wanted_loss, wanted = gradients(tiny_model, SpeedPlan(), rows, RECIPES["plain"])
    speed = SpeedPlan(compute_dtype="bfloat16", batches=layout, kernels=Kernels.FUSED)
    loss, got = gradients(tiny_model, speed, rows, RECIPES["plain"])
    assert loss == pytest.approx(wanted_loss, rel=1e-3)
    assert 0 < (got - wanted).norm() < 0.06 * wanted.norm()


def test_packed_base_gives_the_gradients_of_its_numbers(tiny_model: Path) -> None:
    rows = make_rows(12, 31, 20)
    loss, wanted = gradients(tiny_model, SpeedPlan(), rows, RECIPES["plain"])
    packed_loss, packed = gradients(tiny_model, SpeedPlan(base="packed"), rows, RECIPES["plain"])
    assert packed_loss == pytest.approx(loss, rel=1e-3)
    assert (packed - wanted).norm() < 0.02 * wanted.norm()


def test_attention_of_long_rows_is_the_same(tiny_model: Path) -> None:
    """More keys than plain products are used for."""
    rows = make_rows(300, 120, 280, shared=40)
    wanted_loss, wanted = gradients(tiny_model, SpeedPlan(), rows, RECIPES["plain"])
    for layout in BatchLayout.FLAT, BatchLayout.SHARED_PREFIX:
        loss, got = gradients(tiny_model, SpeedPlan(batches=layout, kernels=Kernels.FUSED), rows, RECIPES["plain"])
        assert loss == pytest.approx(wanted_loss, rel=1e-6)
        assert (got - wanted).norm() < 1e-5 * wanted.norm()


def test_rows_of_a_flat_batch_do_not_see_each_other(tiny_model: Path) -> None:
    rows = make_rows(12, 31, 20)
    speed = SpeedPlan(batches=BatchLayout.SHARED_PREFIX, kernels=Kernels.FUSED)
    together, _ = gradients(tiny_model, speed, rows, RECIPES["plain"])
    alone = [gradients(tiny_model, speed, [row], RECIPES["plain"])[0] for row in rows]
    assert together == pytest.approx(sum(alone), rel=1e-6)


@pytest.mark.parametrize("share", [False, True])
def test_flat_batch_holds_every_token_once(share: bool) -> None:
    rows = make_rows(5, 9, 7, shared=4)
    batch = flatten(rows, share_prefix=share)
    prefix = 4 if share else 0
    assert batch["input_ids"].shape == (1, prefix + sum(len(row["input_ids"]) - prefix for row in rows))
    assert batch["gather"].shape == (3, 9 + 4 - prefix)
    flat, at = batch["input_ids"][0].tolist(), batch["position_ids"][0].tolist()
    assert (flat[:prefix], at[:prefix]) == (rows[0]["input_ids"][:prefix], list(range(prefix)))
    for number, row in enumerate(rows):
        own = len(row["input_ids"]) - prefix
        where = batch["gather"][number].tolist()
        assert [flat[position] for position in where[:own]] == row["input_ids"][prefix:]
        assert [at[position] for position in where[:own]] == list(range(prefix, prefix + own))
        assert set(where[own:]) <= {where[own - 1]}
        mine = (batch["row_of"] == number).nonzero().flatten().tolist()
        assert [batch["labels"][answer].item() for answer in mine] == row["input_ids"][-row["answer_tokens"] :]
        foretold = [batch["positions"][answer].item() + 1 for answer in mine]
        assert foretold == where[own - row["answer_tokens"] : own]
    assert batch["gather"].flatten()[batch["place"]].tolist() == list(range(prefix, len(flat)))


@pytest.mark.parametrize(
    ("ids", "answers", "prefix"),
    [
        ([[1, 2, 3, 4], [1, 2, 3, 5]], [1, 1], 2),  # the token that foretells the answer stays the row's own
        ([[1, 2, 3, 4], [1, 9, 3, 4]], [1, 1], 1),
        ([[1, 2, 3, 4], [1, 2, 3, 4]], [1, 1], 2),
        ([[1, 2, 3, 4], [1, 2]], [2, 1], 0),
        ([[1, 2, 3, 4]], [1], 0),
        ([[7, 2], [1, 2]], [1, 1], 0),
    ],
)
def test_prefix_is_what_all_rows_begin_with(ids: list[list[int]], answers: list[int], prefix: int) -> None:
    rows = [{"input_ids": one, "answer_tokens": count} for one, count in zip(ids, answers, strict=True)]
    batch = flatten(rows, share_prefix=True)
    assert batch["input_ids"].shape[1] - len(batch["place"]) == prefix
    assert batch["input_ids"].shape[1] == sum(map(len, ids)) - prefix * (len(ids) - 1)


def test_padded_batch_masks_what_is_no_answer_by_position() -> None:
    batch = pad([{"input_ids": [5, 2, 2], "answer_tokens": 2}, {"input_ids": [6, 2], "answer_tokens": 1}])
    assert batch["input_ids"].tolist() == [[5, 2, 2], [6, 2, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 2], [-100, 2, -100]]


@pytest.mark.parametrize(
    ("recipe", "device", "config", "expected"),
    [
        ({}, "cpu", LLAMA, ("dequantised", BatchLayout.SHARED_PREFIX, Kernels.FUSED)),
        ({}, "cuda", LLAMA, ("packed", BatchLayout.SHARED_PREFIX, Kernels.PLAIN)),
        ({"method": "lora"}, "cpu", LLAMA, ("plain", BatchLayout.SHARED_PREFIX, Kernels.FUSED)),
        ({"method": "full"}, "cpu", LLAMA, ("plain", BatchLayout.SHARED_PREFIX, Kernels.PLAIN)),
        ({"speed": {"base": "packed"}}, "cpu", LLAMA, ("packed", BatchLayout.SHARED_PREFIX, Kernels.FUSED)),
        ({"speed": {"batches": "flat"}}, "cpu", LLAMA, ("dequantised", BatchLayout.FLAT, Kernels.FUSED)),
        ({}, "cpu", {"sliding_window": 512}, ("dequantised", BatchLayout.PADDED, Kernels.FUSED)),
        (
            {}, "cpu", {"sliding_window": 512, "use_sliding_window": False},
            ("dequantised", BatchLayout.SHARED_PREFIX, Kernels.FUSED),
        ),
        (
            {}, "cpu", {"layer_types": ["full_attention", "linear_attention"]},
            ("dequantised", BatchLayout.PADDED, Kernels.FUSED),
        ),
    ],
)  # fmt: skip
def test_what_auto_takes(
    recipe: dict[str, Any], device: str, config: dict[str, Any], expected: tuple[str, BatchLayout, Kernels]
) -> None:
    chosen = choose_speed(TrainSpec.model_validate(recipe), device, "float32", config)
    assert (chosen.base, chosen.batches, chosen.kernels) == expected


@pytest.mark.parametrize(
    ("speed", "config", "what"),
    [
        ({"batches": "flat"}, {"sliding_window": 512}, "its attention has a sliding window"),
        ({"batches": "shared_prefix"}, {"layer_types": ["sliding_attention"]}, "layers of the kind sliding_attention"),
        ({"batches": "flat"}, {"attention_dropout": 0.1}, "its attention has dropout"),
        ({"batches": "flat"}, {"goldgate_own_attention": True}, "it computes attention in a way of its own"),
        ({"kernels": "liger"}, LLAMA, "liger-kernel needs a GPU"),
    ],
)
def test_refuses_what_cannot_be_had(speed: dict[str, Any], config: dict[str, Any], what: str) -> None:
    with pytest.raises(TrainingError, match=what) as refusal:
        choose_speed(TrainSpec(speed=SpeedSpec.model_validate(speed)), "cpu", "float32", config)
    assert "auto" in refusal.value.fix
