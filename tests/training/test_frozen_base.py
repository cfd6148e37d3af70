"""How the base model is held while it is trained on, and in which numbers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tasks.contracts.errors import TrainingError
from tasks.contracts.spec import ComputeType, TrainMethod, TrainSpec
from tasks.training.recipe import SpeedPlan, TrainPlan, make_plan

IDS = list(range(5, 45))


def plan_of(method: TrainMethod, base: str, dtype: str) -> TrainPlan:
    return make_plan(TrainSpec(method=method, lora_rank=4), 8, 4, speed=SpeedPlan(base=base, compute_dtype=dtype))


def make_gpt2(folder: Path) -> Path:
    """A tiny model whose linear layers are written the other way round (Conv1D)."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(3)
    config = GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=128, n_positions=64, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_dequantised_holds_the_numbers_of_the_packed_weights(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    """Every tensor is, bit for bit, what transformers' own way of dequantising gives; bfloat16 holds it exactly."""
    import torch

    from tasks.training.frozen_base import load_dequantised, load_nf4, load_plain

    folder = tiny_model if kind == "llama" else make_gpt2(tmp_path / "gpt2")
    theirs = load_nf4(folder, "cpu").dequantize().state_dict()
    short, wide = (load_dequantised(folder, "cpu", dtype) for dtype in (torch.bfloat16, torch.float32))
    plain = load_plain(folder, "cpu", torch.bfloat16).state_dict()
    changed = set()
    for name, numbers in short.state_dict().items():
        conv1d = kind == "gpt2" and ".h." in name and numbers.ndim == 2
        wanted = theirs[name].T if conv1d else theirs[name]  # transformers leaves a plain linear layer in its place
        assert numbers.dtype == torch.bfloat16
        assert torch.equal(numbers, wanted), name
        assert torch.equal(wide.state_dict()[name], numbers.float()), name
        if not torch.equal(numbers, plain[name]):
            changed.add(name.rsplit(".", 2)[-2])
    names = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj" if kind == "llama" else "c_attn c_proj c_fc"
    assert changed == set(names.split())
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float32}
    assert not hasattr(short.config, "quantization_config")


def test_packed_weights_are_multiplied_as_the_dequantised_ones_in_bfloat16_alone(tiny_model: Path) -> None:
    import torch

    from tasks.training.frozen_base import load_dequantised, load_nf4

    ids = torch.tensor([IDS])
    apart = {}
    for dtype in (torch.bfloat16, torch.float32):
        with torch.inference_mode():
            packed = load_nf4(tiny_model, "cpu", dtype).eval()(ids).logits
            written_out = load_dequantised(tiny_model, "cpu", dtype).eval()(ids).logits
        assert packed.dtype == written_out.dtype == dtype
        apart[dtype] = ((packed - written_out).abs().max() / written_out.abs().max()).item()
    assert apart[torch.bfloat16] == 0.0
    assert 0.0 < apart[torch.float32] < 1 / 256


def test_packed_layers_keep_their_gradient_after_an_evaluation(tiny_model: Path) -> None:
    """bitsandbytes would repack them for inference on some CPUs, without a backward pass."""
    import torch

    from tasks.training.frozen_base import load_nf4

    model = load_nf4(tiny_model, "cpu", torch.float32)
    embedded = model.get_input_embeddings()(torch.tensor([IDS])).detach()

    def gradient() -> Any:
        inputs = embedded.clone().requires_grad_()
        model.train()(inputs_embeds=inputs).logits.sum().backward()
        return inputs.grad

    before = gradient()
    with torch.inference_mode():
        model.eval()(torch.tensor([IDS]))
    after = gradient()
    assert before.abs().max() > 0
    assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("method", "base", "dtype", "packed"),
    [
        (TrainMethod.QLORA, "packed", "float32", True),
        (TrainMethod.QLORA, "packed", "bfloat16", True),
        (TrainMethod.QLORA, "dequantised", "float32", False),
        (TrainMethod.QLORA, "dequantised", "bfloat16", False),
        (TrainMethod.LORA, "plain", "float32", False),
        (TrainMethod.LORA, "plain", "bfloat16", False),
        (TrainMethod.FULL, "plain", "float32", False),
        (TrainMethod.FULL, "plain", "bfloat16", False),  # float32 all the same
    ],
)
def test_model_is_held_as_the_plan_says(
    tiny_model: Path, method: TrainMethod, base: str, dtype: str, packed: bool
) -> None:
    import bitsandbytes
    import torch

    from tasks.training.frozen_base import load_dequantised, load_for_training, load_plain

    wanted = torch.float32 if method is TrainMethod.FULL else getattr(torch, dtype)
    model = load_for_training(tiny_model, plan_of(method, base, dtype), "cpu")
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, bitsandbytes.nn.Linear4bit) == packed
    assert model.model.norm.weight.dtype == model.model.embed_tokens.weight.dtype == wanted
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    if packed:
        assert (layer.weight.quant_state.nested, layer.compute_dtype) == (True, wanted)
    else:
        numbers = load_dequantised if base == "dequantised" else load_plain
        assert torch.equal(layer.weight, numbers(tiny_model, "cpu", wanted).model.layers[0].mlp.up_proj.weight)
        assert layer.weight.dtype == wanted


@pytest.mark.parametrize(
    ("device", "hardware", "wanted", "dtype"),
    [
        ("cpu", (), ComputeType.AUTO, "float32"),
        ("cpu", ("avx512",), ComputeType.AUTO, "bfloat16"),
        ("cpu", ("amx",), ComputeType.AUTO, "bfloat16"),
        ("cpu", ("avx512", "amx"), ComputeType.FLOAT32, "float32"),
        ("cpu", (), ComputeType.BFLOAT16, "bfloat16"),  # slower, and it was asked for
        ("cuda", ("native", "emulated"), ComputeType.AUTO, "bfloat16"),
        ("cuda", ("native", "emulated"), ComputeType.FLOAT32, "float32"),
        ("cuda", ("emulated",), ComputeType.AUTO, "float32"),
        ("cuda", ("emulated",), ComputeType.BFLOAT16, "bfloat16"),
        ("cuda", (), ComputeType.AUTO, "float32"),
        ("cuda", (), ComputeType.BFLOAT16, None),
    ],
)
def test_bfloat16_is_computed_where_the_device_has_it(
    monkeypatch: pytest.MonkeyPatch, device: str, hardware: tuple[str, ...], wanted: ComputeType, dtype: str | None
) -> None:
    import torch

    from tasks.training.frozen_base import compute_dtype

    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: "avx512" in hardware)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: "amx" in hardware)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Old GPU")
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: "native" in hardware or (including_emulation and "emulated" in hardware),
    )
    if dtype is None:
        with pytest.raises(TrainingError, match=r"Old GPU\) does not compute in bfloat16") as refusal:
            compute_dtype(device, wanted)
        assert refusal.value.where == "train.speed.compute = bfloat16"
        return
    assert compute_dtype(device, wanted) == getattr(torch, dtype)
    if wanted is ComputeType.AUTO:
        assert compute_dtype(device) == getattr(torch, dtype)


@pytest.mark.slow
def test_dequantising_never_holds_a_second_copy(tmp_path: Path) -> None:
    """Peak memory of loading is the model as it is in its file, in bfloat16, and little more."""
    import subprocess
    import sys

    script = """
import resource, sys, torch, bitsandbytes
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
from tasks.training.frozen_base import load_dequantised
folder = Path(sys.argv[1])
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
if sys.argv[2] == "make":
    sizes = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=6, num_attention_heads=12)
    LlamaForCausalLM(LlamaConfig(vocab_size=512, **sizes)).to(torch.bfloat16).save_pretrained(folder)
else:
    from tests.tiny import make_tiny_model
    load_dequantised(make_tiny_model(folder / "tiny"), "cpu", torch.bfloat16)  # libraries are in memory now
    before = peak()
    model = load_dequantised(folder, "cpu", torch.bfloat16)
    print(peak() - before, 2 * sum(p.numel() for p in model.parameters()))
"""
    for step in ("make", "load"):
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "model"), step],
            capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": os.getcwd()},
        )  # fmt: skip
    taken, weights = map(int, done.stdout.split()[-2:])
    assert weights > 1e8
    assert taken < 1.5 * weights
