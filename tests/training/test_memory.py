"""What a training takes of memory, what there is, and the batch that fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tasks.contracts.errors import ModelError, TrainingError
from tasks.contracts.spec import AdapterSpec, BatchLayout, Kernels, Switch, TrainMethod, TrainSpec
from tasks.training.memory import (
    HEADROOM,
    MemoryEstimate,
    ModelShape,
    cgroup_free,
    device_memory,
    estimate_memory,
    fit_to_memory,
    halved,
    read_shape,
)
from tasks.training.recipe import SpeedPlan, TrainPlan, make_plan

SMALL = ModelShape(30, 576, 1536, 9, 3, 64, 49_152, tied=True)  # SmolLM2-135M
LLAMA_8B = ModelShape(32, 4096, 14_336, 32, 8, 128, 128_256, tied=False)
GB = 10**9


def plan_of(
    batch: int = 8, accumulation: int = 1, speed: SpeedPlan | None = None, method: str = "qlora", **adapter: Any
) -> TrainPlan:
    recipe = TrainSpec(
        batch_size=batch,
        gradient_accumulation=accumulation,
        method=TrainMethod(method),
        adapter=AdapterSpec(**adapter),
    )
    return make_plan(recipe, 1_000, 100, 1, speed)


# -- shapes -------------------------------------------------------------------------------------------------------


def test_the_weights_of_a_shape() -> None:
    """SmolLM2-135M and Llama 3 8B have so many parameters by their model cards' own files."""
    assert SMALL.weights == 134_515_008
    assert LLAMA_8B.weights == 8_030_261_248


def test_the_shape_of_a_folder(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    shape = read_shape(tiny_model)
    assert shape == ModelShape(2, 64, 128, 4, 2, 16, 512, tied=True)
    assert shape.weights == sum(
        weight.numel() for weight in AutoModelForCausalLM.from_pretrained(tiny_model).parameters()
    )


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (
            {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50_257, "tie_word_embeddings": True},
            ModelShape(12, 768, 3072, 12, 12, 64, 50_257, tied=True, gated=False),
        ),
        (
            {
                "text_config": {
                    "num_hidden_layers": 4,
                    "hidden_size": 32,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 1,
                    "head_dim": 16,
                    "intermediate_size": 64,
                    "vocab_size": 100,
                    "num_local_experts": 8,
                }
            },
            ModelShape(4, 32, 64, 4, 1, 16, 100, tied=False, experts=8),
        ),
    ],
)
def test_shapes_of_other_architectures(config: dict[str, Any], shape: ModelShape, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_shape(tmp_path) == shape


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (None, "The base model's configuration cannot be read"),
        ("{half", "The base model's configuration cannot be read"),
        ('{"hidden_size": 8, "num_attention_heads": 2, "vocab_size": 10}', "does not say its num_hidden_layers"),
    ],
)
def test_a_shape_that_cannot_be_read(text: str | None, what: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=what):
        read_shape(tmp_path)


# -- estimates ----------------------------------------------------------------------------------------------------


def test_weights_gradients_and_moments_by_method() -> None:
    adapter = 4_884_480  # of rank 16 on all linear layers, as peft counts it
    qlora = estimate_memory(SMALL, plan_of(), "cpu", 100, 4)
    assert (qlora.base, qlora.trained, qlora.gradients) == (4 * SMALL.weights, 4 * adapter, 4 * adapter)
    assert qlora.optimizer == 8 * adapter
    full = estimate_memory(SMALL, make_plan(TrainSpec(method=TrainMethod.FULL), 100, 20), "cpu", 100, 4)
    assert (full.base, full.trained, full.optimizer) == (0, 4 * SMALL.weights, 8 * SMALL.weights)
    packed = estimate_memory(LLAMA_8B, plan_of(speed=SpeedPlan(base="packed", compute_dtype="bfloat16")), "cuda", 2_048)
    assert packed.base / GB == pytest.approx(5.8, abs=0.2)  # 7 B weights in 4 bits, 1 B of embeddings in 16
    fewer = estimate_memory(SMALL, plan_of(targets=("q_proj", "v_proj")), "cpu", 100, 4)
    assert fewer.trained == 4 * 16 * 30 * ((576 + 576) + (576 + 192))
    assert qlora.total == sum(qlora)
    assert qlora.sentence().startswith(f"about {qlora.total / GB:.1f} GB of memory (base 0.54, ")


def test_activations_grow_with_tokens_and_shrink_with_checkpointing() -> None:
    def activations(batch: int, longest: int, **speed: Any) -> int:
        return estimate_memory(SMALL, plan_of(batch, speed=SpeedPlan(**speed)), "cpu", longest, 4).activations

    assert activations(8, 100) == 2 * activations(4, 100) == 2 * activations(8, 50)
    assert activations(8, 100, checkpointing=True) < activations(8, 100) / 8
    assert activations(8, 100, kernels=Kernels.FUSED, compute_dtype="bfloat16") == activations(8, 100) / 2
    flat = activations(8, 100, kernels=Kernels.FUSED, batches=BatchLayout.FLAT)
    assert flat > activations(8, 100, kernels=Kernels.FUSED)


def kept_by_autograd(layers: int, plan: TrainPlan, longest: int) -> int:
    """Bytes that the forward pass of a batch leaves for the backward pass, weights not counted."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from tasks.training.speed.batches import flatten, pad, rows_of
    from tasks.training.speed.install import speed_up

    config = LlamaConfig(
        hidden_size=128, intermediate_size=384, num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=2,
        head_dim=16, vocab_size=256, tie_word_embeddings=True,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).to(getattr(torch, plan.speed.compute_dtype))
    if plan.method is not TrainMethod.FULL:
        model = get_peft_model(model, LoraConfig(r=plan.lora_rank, target_modules="all-linear"))
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    speed_up(model, plan.speed)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, Any] = {}  # holds them, so that no address is used twice

    def keep(tensor: Any) -> Any:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    rows = [{"input_ids": [7] * longest, "answer_tokens": 4}] * plan.batch_size
    flat = plan.speed.batches is not BatchLayout.PADDED
    batch = flatten(rows, share_prefix=False) if flat else pad(rows)
    how = {"position_ids": batch["position_ids"], "rows": rows_of(batch)} if flat else {}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=batch["input_ids"], use_cache=False, logits_to_keep=1, **how)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


PLAIN_BF16 = SpeedPlan(compute_dtype="bfloat16")
FUSED_BF16 = SpeedPlan(compute_dtype="bfloat16", kernels=Kernels.FUSED)
FLAT_BF16 = SpeedPlan(compute_dtype="bfloat16", kernels=Kernels.FUSED, batches=BatchLayout.FLAT)


@pytest.mark.parametrize(
    ("method", "speed", "longest"),
    [
        pytest.param("qlora", SpeedPlan(), 200, id="plain"),
        pytest.param("qlora", PLAIN_BF16, 200, id="plain bfloat16"),
        pytest.param("qlora", SpeedPlan(kernels=Kernels.FUSED), 200, id="fused"),
        pytest.param("qlora", FUSED_BF16, 200, id="fused bfloat16"),
        pytest.param("qlora", FLAT_BF16, 200, id="flat"),
        pytest.param("qlora", FLAT_BF16, 300, id="flat, long rows"),
        pytest.param("full", SpeedPlan(), 200, id="full"),
    ],
)
def test_activations_are_what_autograd_keeps(method: str, speed: SpeedPlan, longest: int) -> None:
    """One layer more keeps so many bytes more; what is not counted (a number or two a token, narrow copies of the
    adapter) is little.
    """
    plan = plan_of(4, speed=speed, method=method)
    measured = kept_by_autograd(2, plan, longest) - kept_by_autograd(1, plan, longest)
    shapes = [ModelShape(layers, 128, 384, 8, 2, 16, 256, tied=True) for layers in (1, 2)]
    one, two = (estimate_memory(shape, plan, "cpu", longest, 4).activations for shape in shapes)
    assert two - one == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(
    ("rows", "tokens", "speed", "measured"),
    [
        (4, 60, SpeedPlan(), 1.97),
        (16, 120, SpeedPlan(), 6.72),
        (4, 300, SpeedPlan(), 4.85),
        (16, 120, SpeedPlan(checkpointing=True), 3.55),
        (16, 120, FLAT_BF16, 3.54),
    ],
)
def test_estimates_are_near_what_was_measured(rows: int, tokens: int, speed: SpeedPlan, measured: float) -> None:
    """Highest resident set of a training of a 135M model on a CPU, in GB, adapter of rank 16, answers of 4 tokens."""
    estimate = estimate_memory(SMALL, plan_of(rows, speed=speed), "cpu", tokens, 4)
    assert estimate.total / GB == pytest.approx(measured, rel=0.2)


def test_a_gpu_s_allocator_holds_nothing_back() -> None:
    plan = plan_of(16, speed=FLAT_BF16)
    cpu, gpu = (estimate_memory(SMALL, plan, device, 300, 4) for device in ("cpu", "cuda"))
    assert cpu.activations == gpu.activations
    assert cpu.overhead > cpu.activations > gpu.overhead


def test_logits_are_of_answers_alone() -> None:
    few, many = (estimate_memory(SMALL, plan_of(8), "cpu", 100, answer).logits for answer in (4, None))
    assert few == 8 * 4 * 49_152 * 12
    assert many == 25 * few


# -- fitting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "accumulation", "smaller"),
    [(8, 1, (4, 2)), (2, 3, (1, 6)), (6, 1, (3, 2)), (3, 2, (1, 6)), (5, 2, (2, 5))],
)
def test_halving_keeps_the_rows_of_a_step(batch: int, accumulation: int, smaller: tuple[int, int]) -> None:
    plan = plan_of(batch, accumulation)
    half = halved(plan)
    assert (half.batch_size, half.gradient_accumulation) == smaller
    changed = {"batch_size", "gradient_accumulation"}
    assert half.model_dump(exclude=changed) == plan.model_dump(exclude=changed)


def test_one_row_cannot_be_halved() -> None:
    with pytest.raises(TrainingError, match="A forward pass takes one row"):
        halved(plan_of(1, 8))


def needs(batch: int, accumulation: int, *, checkpointing: bool) -> int:
    plan = plan_of(batch, accumulation, SpeedPlan(checkpointing=checkpointing))
    return estimate_memory(SMALL, plan, "cpu", 300, 4).total


@pytest.mark.parametrize(
    ("room", "wish", "batch", "checkpointing", "changes"),
    [
        (needs(16, 1, checkpointing=False), Switch.AUTO, 16, False, []),
        (
            needs(16, 1, checkpointing=True),
            Switch.AUTO,
            16,
            True,
            ["activations are computed again in the backward pass (train.speed.checkpointing), since"],
        ),
        (
            needs(4, 4, checkpointing=True),
            Switch.AUTO,
            4,
            True,
            [
                "activations are computed again",
                "batches of 4 rows, 4 to an optimiser step, in place of 16 and 1, since as it was asked for it would "
                "take ",
            ],
        ),
        (
            needs(4, 4, checkpointing=False),
            Switch.OFF,
            4,
            False,
            ["batches of 4 rows, 4 to an optimiser step, in place of 16 and 1, since as it was asked for it would"],
        ),
    ],
)
def test_the_plan_that_fits(room: int, wish: Switch, batch: int, checkpointing: bool, changes: list[str]) -> None:
    available = int(room / HEADROOM) + 1
    plan, said = fit_to_memory(plan_of(16), SMALL, "cpu", 300, available, answer=4, checkpointing=wish)
    assert (plan.batch_size, plan.gradient_accumulation) == (batch, 16 // batch)
    assert plan.speed.checkpointing is checkpointing
    assert len(said) == len(changes)
    for words, start in zip(said, changes, strict=True):
        assert words.startswith(start)
    assert estimate_memory(SMALL, plan, "cpu", 300, 4).total <= HEADROOM * available


@pytest.mark.parametrize(
    ("method", "available", "longest", "wish", "fix"),
    [
        (
            "qlora",
            GB,
            300,
            Switch.AUTO,
            "use a smaller base model, `train.speed.base: packed`, or a lower rank, or use",
        ),
        ("full", 2 * GB, 300, Switch.AUTO, "use method qlora or lora, or a smaller base model, or use a device"),
        ("qlora", 2 * GB, 8_000, Switch.AUTO, "lower `data.max_characters` or `train.max_tokens`, or use a device"),
        (
            "qlora",
            2 * GB,
            8_000,
            Switch.OFF,
            "lower `data.max_characters` or `train.max_tokens`, set `train.speed.checkpointing` on, or use a device",
        ),
    ],
)
def test_what_does_not_fit_at_all(method: str, available: int, longest: int, wish: Switch, fix: str) -> None:
    with pytest.raises(TrainingError) as caught:
        fit_to_memory(plan_of(8, method=method), SMALL, "cpu", longest, available, answer=4, checkpointing=wish)
    assert caught.value.what.startswith("This training does not fit into memory: one row of")
    assert caught.value.fix.startswith(fix)


# -- what there is ------------------------------------------------------------------------------------------------


def test_the_memory_of_this_process() -> None:
    import psutil

    memory = device_memory("cpu")
    assert psutil.Process().memory_info().rss < memory <= psutil.virtual_memory().total


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


def test_limits_of_control_groups_version_2(tmp_path: Path) -> None:
    mount, membership = tmp_path / "cgroup", tmp_path / "self"
    membership.write_text("0::/pod/job\n")
    write(mount / "pod/job", memory__max="max", memory__current=10)
    write(mount / "pod", memory__max=1_000, memory__current=600)
    (mount / "pod/memory.stat").write_text("anon 100\ninactive_file 50\nactive_file 7\n")
    assert cgroup_free(mount, membership) == [450]


def test_limits_of_control_groups_version_1(tmp_path: Path) -> None:
    mount, membership = tmp_path / "cgroup", tmp_path / "self"
    membership.write_text("5:devices:/\n4:cpuset,memory:/docker/abc\n0::/\n")
    write(mount / "memory", memory__limit_in_bytes=500, memory__usage_in_bytes=600)  # as a container sees its own
    assert cgroup_free(mount, membership) == [0]
    write(mount / "memory/docker/abc", memory__limit_in_bytes=900, memory__usage_in_bytes=100)
    assert cgroup_free(mount, membership) == [800, 0]


def test_no_control_groups_no_limits(tmp_path: Path) -> None:
    assert cgroup_free(tmp_path, tmp_path / "missing") == []
    (tmp_path / "self").write_text("0::/\n")
    assert cgroup_free(tmp_path, tmp_path / "self") == []


def test_a_limit_of_control_groups_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    monkeypatch.setattr("tasks.training.memory.cgroup_free", lambda *_: [12_345])
    own = psutil.Process().memory_info().rss
    assert device_memory("cpu") == pytest.approx(own + 12_345, rel=0.05)


def test_an_estimate_says_what_it_is_made_of() -> None:
    words = MemoryEstimate(2 * GB, 0, 0, 10**6, GB, 0, GB // 2).sentence()
    assert words == "about 3.5 GB of memory (base 2.00, activations 1.00, overhead 0.50)"
