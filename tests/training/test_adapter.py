"""Which layers get an adapter, what it begins as, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tasks.contracts.errors import TrainingError
from tasks.contracts.spec import AdapterSpec, TrainMethod, TrainSpec
from tasks.training.recipe import SpeedPlan, TrainPlan, make_plan

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WIDTHS = {
    "model.layers.0.attn.q_proj": (64, 64),
    "model.layers.0.attn.k_proj": (64, 32),
    "model.layers.0.mlp.up": (64, 128),
    "lm_head": (64, 512),
}


def plan_of(method: TrainMethod = TrainMethod.QLORA, *, rank: int = 4, seed: int = 17, **adapter: Any) -> TrainPlan:
    base = "dequantised" if method is TrainMethod.QLORA else "plain"
    recipe = TrainSpec(method=method, lora_rank=rank, seed=seed, adapter=AdapterSpec(**adapter))
    return make_plan(recipe, 8, 4, speed=SpeedPlan(base=base))


def loaded(folder: Path, plan: TrainPlan) -> Any:
    from tasks.training.frozen_base import load_for_training

    return load_for_training(folder, plan, "cpu")


@pytest.mark.parametrize(
    ("targets", "rank", "chosen"),
    [
        ((), 32, ["model.layers.0.attn.q_proj", "model.layers.0.attn.k_proj", "model.layers.0.mlp.up"]),
        (("q_proj",), 64, ["model.layers.0.attn.q_proj"]),
        (("up", "q_proj"), 64, ["model.layers.0.attn.q_proj", "model.layers.0.mlp.up"]),
        (("mlp.up",), 1, ["model.layers.0.mlp.up"]),
        (("lm_head",), 64, ["lm_head"]),
        (("model.layers.0.attn.k_proj",), 32, ["model.layers.0.attn.k_proj"]),
    ],
)
def test_layers_are_chosen_by_the_ends_of_their_names(targets: tuple[str, ...], rank: int, chosen: list[str]) -> None:
    from tasks.training.adapter import Width, choose_layers

    widths = {name: Width(*width) for name, width in WIDTHS.items()}
    assert choose_layers(widths, targets, rank, "lm_head") == chosen


@pytest.mark.parametrize(
    ("targets", "rank", "what", "where", "fix"),
    [
        (
            ("q_proj", "_proj"), 4,
            "No linear layer of this model is called '_proj'; there are q_proj, k_proj, up, lm_head.",
            "train.adapter.targets", "leave `targets` empty",
        ),
        (
            (), 33,
            "The rank 33 is above the width of a layer: model.layers.0.attn.k_proj takes 64 features and gives 32.",
            "train.lora_rank = 33", "lower it to 32 or less",
        ),
        (
            ("up",), 65,
            "The rank 65 is above the width of a layer: model.layers.0.mlp.up takes 64 features and gives 128.",
            "train.lora_rank = 65", "lower it to 64 or less",
        ),
    ],
)  # fmt: skip
def test_layers_that_cannot_be_adapted_are_refused(
    targets: tuple[str, ...], rank: int, what: str, where: str, fix: str
) -> None:
    from tasks.training.adapter import Width, choose_layers

    with pytest.raises(TrainingError) as refusal:
        choose_layers({name: Width(*width) for name, width in WIDTHS.items()}, targets, rank, "lm_head")
    assert (refusal.value.what, refusal.value.where) == (what, where)
    assert fix in refusal.value.fix


def test_many_layers_are_named_shortly_and_none_is_refused() -> None:
    from tasks.training.adapter import Width, choose_layers

    many = {f"layers.{number}.kind{number}": Width(8, 8) for number in range(20)}
    with pytest.raises(TrainingError, match=r"there are kind0, .*, kind11 and 8 more\."):
        choose_layers(many, ("nothing",), 4)
    with pytest.raises(TrainingError, match="no linear layer that an adapter could be put on"):
        choose_layers({"lm_head": Width(8, 8)}, (), 4, "lm_head")


@pytest.mark.parametrize("base", ["packed", "dequantised"])
@pytest.mark.parametrize(
    ("adapter", "names", "scale"),
    [
        ({}, ALL, 2.0),
        ({"alpha": 12.0}, ALL, 3.0),
        ({"alpha": 12.0, "rslora": True}, ALL, 6.0),
        ({"targets": ("q_proj", "v_proj")}, ("q_proj", "v_proj"), 2.0),
        ({"dora": True, "targets": ("up_proj",)}, ("up_proj",), 2.0),
    ],
)
def test_adapter_is_the_plans(
    tiny_model: Path, base: str, adapter: dict[str, Any], names: tuple[str, ...], scale: float
) -> None:
    import torch
    from peft.tuners.lora import LoraLayer

    from tasks.training.adapter import adapt

    plan = plan_of(**adapter)
    plan = plan.model_copy(update={"speed": SpeedPlan(base=base, compute_dtype="bfloat16")})
    model = adapt(loaded(tiny_model, plan), plan)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    assert {name.rsplit(".", 1)[1] for name in layers} == set(names)
    assert len(layers) == 2 * len(names)  # two blocks
    for layer in layers.values():
        assert layer.scaling["default"] == scale
        assert layer.lora_A["default"].weight.shape[0] == 4
        assert not layer.lora_B["default"].weight.any()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == len(layers) * (3 if adapter.get("dora") else 2)
    assert all("lora_" in name for name in trained)
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}


def test_same_plan_gives_the_same_adapter_whatever_was_drawn_before(tiny_model: Path) -> None:
    import torch
    from peft import get_peft_model_state_dict

    from tasks.training.adapter import adapt

    def begin(seed: int) -> dict[str, Any]:
        plan = plan_of(seed=seed)
        model = loaded(tiny_model, plan)
        before = torch.get_rng_state()
        begun = get_peft_model_state_dict(adapt(model, plan))
        assert torch.equal(torch.get_rng_state(), before)
        return begun

    first = begin(17)
    torch.rand(3)
    second, other = begin(17), begin(18)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if "lora_A" in name)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (
            {"targets": ("q_proj", "query")},
            "No linear layer of this model is called 'query'; there are q_proj, k_proj,",
        ),
        ({"targets": ("norm",)}, "No linear layer of this model is called 'norm'"),
        ({"targets": ("lm_head",)}, "The layer lm_head is the input embedding too"),
        ({"rank": 33}, "The rank 33 is above the width of a layer: model.layers.0.self_attn.k_proj takes 64"),
    ],
)
def test_plan_that_does_not_fit_the_model_is_refused(tiny_model: Path, change: dict[str, Any], what: str) -> None:
    from tasks.training.adapter import adapt

    plan = plan_of(**change)
    with pytest.raises(TrainingError) as refusal:
        adapt(loaded(tiny_model, plan), plan)
    assert what in refusal.value.what


def test_untied_output_layer_may_have_an_adapter(tiny_model: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tasks.training.adapter import adapt

    untied = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_model, tie_word_embeddings=False))
    adapted = adapt(untied, plan_of(targets=("lm_head",)))
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2
    assert all(".lm_head." in name for name in trained)
    assert torch.isfinite(adapted(torch.tensor([[5, 6]])).logits).all()


def test_full_trains_all_weights_in_float32(tiny_model: Path) -> None:
    import torch

    from tasks.training.adapter import adapt

    plan = plan_of(TrainMethod.FULL)
    model = adapt(loaded(tiny_model, plan), plan)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not hasattr(model, "peft_config")


def test_conv1d_layers_are_linear_too(tmp_path: Path) -> None:
    from tasks.training.adapter import Width, adapt, linear_layers
    from tests.training.test_frozen_base import make_gpt2

    plan = plan_of(rank=64)
    model = loaded(make_gpt2(tmp_path), plan)
    assert linear_layers(model)["transformer.h.0.mlp.c_fc"] == Width(64, 256)
    assert sum(parameter.requires_grad for parameter in adapt(model, plan).parameters()) == 2 * 4 * 2
