"""The base model as each recipe holds it while it is trained on: 4-bit NF4 (packed or written out), or as it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bitsandbytes
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from tasks.contracts.errors import TrainingError
from tasks.contracts.spec import ComputeType, TrainMethod

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tasks.training.recipe import TrainPlan


def device_name() -> str:
    """`cuda` where there is a CUDA device, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def compute_dtype(device: str, wanted: ComputeType = ComputeType.AUTO) -> torch.dtype:
    """What matrix products are made in: bfloat16 where the device multiplies it in hardware, else float32.

    On a CPU that is AVX-512 BF16 or AMX. A CPU without them computes bfloat16 by way of float32, which is slower than
    float32 itself (measured on such cores, matrix products of a 135M model: float32 77-111 GFLOP/s, bfloat16 23-36).
    On ARM, torch does not say whether a CPU has it: it gets float32 unless bfloat16 is asked for.

    Raises:
        TrainingError: bfloat16 is asked for on a GPU that cannot compute it.
    """
    if wanted is ComputeType.FLOAT32:
        return torch.float32
    if device == "cuda":
        if wanted is ComputeType.BFLOAT16 and not torch.cuda.is_bf16_supported():
            raise TrainingError(
                f"This GPU ({torch.cuda.get_device_name()}) does not compute in bfloat16.",
                where="train.speed.compute = bfloat16",
                fix="set it to float32 or auto",
            )
        in_hardware = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        in_hardware = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if in_hardware or wanted is ComputeType.BFLOAT16 else torch.float32


def load_for_training(
    model_folder: Path,
    plan: TrainPlan,
    device: str,
    *,
    trust_code: bool = False,
    written_out: dict[str, torch.Tensor] | None = None,
) -> PreTrainedModel:
    """The model to train, as the plan's method and speed hold it.

    - qlora, packed: NF4 weights, dequantised again in every forward and backward pass.
    - qlora, dequantised: the numbers that NF4 stands for, written out once in the compute dtype. On a 135M model and
      one CPU core that gives 118 tokens/s where packed weights give 83 (batches of 4 x 120 tokens).
    - lora: the base as it is, in the compute dtype.
    - full: float32, since most steps are too small to change a bfloat16 weight.

    Args:
        model_folder: safetensors, config and tokenizer.
        plan: `method`, `speed.base` and `speed.compute_dtype` are used.
        device: "cuda" or "cpu".
        trust_code: run the code that came with the model.
        written_out: for qlora, dequantised: as `load_dequantised`.
    """
    compute: torch.dtype = getattr(torch, plan.speed.compute_dtype)
    if plan.method is TrainMethod.FULL:
        return load_plain(model_folder, device, torch.float32, trust_code=trust_code)
    if plan.method is TrainMethod.LORA:
        return load_plain(model_folder, device, compute, trust_code=trust_code)
    if plan.speed.base == "packed":
        return load_nf4(model_folder, device, compute, trust_code=trust_code)
    return load_dequantised(model_folder, device, compute, trust_code=trust_code, written_out=written_out)


def load_plain(
    model_folder: Path, device: str, dtype: torch.dtype | str, *, trust_code: bool = False, **options: Any
) -> PreTrainedModel:
    """The model, not quantised, on this process's device; dtype "auto" is the one of its files."""
    return AutoModelForCausalLM.from_pretrained(
        model_folder,
        dtype=dtype,
        device_map={"": torch.cuda.current_device() if device == "cuda" else "cpu"},
        attn_implementation=None if trust_code else "sdpa",  # code of its own may know only one way
        trust_remote_code=trust_code,
        use_safetensors=True,
        **options,
    )


def load_nf4(
    model_folder: Path, device: str, compute: torch.dtype = torch.bfloat16, *, trust_code: bool = False
) -> PreTrainedModel:
    """Quantise the base model: linear layers in NF4 with double quantisation, the rest in the compute dtype."""
    model = load_plain(
        model_folder,
        device,
        torch.bfloat16,
        trust_code=trust_code,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        ),
    )
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            # On a CPU with AVX-512 BF16, bitsandbytes 0.50 repacks a layer in its first evaluation into a form without
            # a backward pass: from the first look at the dev loss on, lower layers would get no gradient, unsaid.
            module.support_avx512bf16_for_cpu = False
    if compute is torch.float32:
        _widen(model)
    return model


@torch.no_grad()
def load_dequantised(
    model_folder: Path,
    device: str,
    dtype: torch.dtype = torch.float32,
    *,
    trust_code: bool = False,
    written_out: dict[str, torch.Tensor] | None = None,
) -> PreTrainedModel:
    """The NF4 base with its weights written out.

    They are rounded to bfloat16 whatever `dtype` holds them, as packed weights are when they are multiplied in
    bfloat16, so bfloat16 holds them without further loss: what is trained or merged on one fits the other. (Packed
    weights multiplied in float32 are not rounded, and differ by up to 1 part in 256.)

    Layers are quantised and written out in place, one after the other: there is never a second copy of the model.

    Args:
        model_folder: safetensors, config and tokenizer.
        device: "cuda" or "cpu".
        dtype: what holds the weights.
        trust_code: run the code that came with the model.
        written_out: what `written_out_weights` took from such a model, of the same base and dtype; then nothing is
            quantised. The tensors go into the model, and the mapping is empty afterwards.

    Raises:
        KeyError: a layer is not among `written_out`.
    """
    model = load_plain(model_folder, device, torch.bfloat16, trust_code=trust_code)
    for name, layer in _quantised_layers(model):
        if written_out is not None:
            layer.weight.data = written_out.pop(f"{name}.weight")
            continue
        weight = layer.weight.data
        stored = weight.T.contiguous() if isinstance(layer, Conv1D) else weight
        packed, state = bitsandbytes.functional.quantize_4bit(stored, quant_type="nf4", compress_statistics=True)
        numbers = bitsandbytes.functional.dequantize_4bit(packed, state)
        numbers = numbers.T if isinstance(layer, Conv1D) else numbers
        if dtype is torch.bfloat16:
            weight.copy_(numbers)  # in place: the file's mapped pages give way to what is written
        else:
            layer.weight.data = numbers.to(dtype).contiguous()
    if written_out is not None:
        written_out.clear()  # the rest is read from the files
    if dtype is torch.float32:
        _widen(model)
    return model


def written_out_weights(model: Any, plan: TrainPlan, device: str) -> dict[str, torch.Tensor] | None:
    """The base of an adapted model as it was trained on, for `load_dequantised`: its tensors themselves, no copies.

    None where there is nothing to gain: the base was not written out, or lay on a GPU, which quantises in no time and
    may want the memory.
    """
    if plan.method is not TrainMethod.QLORA or plan.speed.base != "dequantised" or device != "cpu":
        return None
    return {
        name.replace(".base_layer.", "."): parameter.data
        for name, parameter in model.get_base_model().named_parameters()
        if not parameter.requires_grad
    }


def _quantised_layers(model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    """The layers that transformers would quantise: linear ones, without the output layer and what is tied to it."""
    left = [*get_keys_to_not_convert(model), *(model._keep_in_fp32_modules or ())]
    for name, module in model.named_modules():
        if (type(module) is torch.nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, left):
            yield name, module


def _widen(model: PreTrainedModel) -> None:
    """Bring the parameters that are not packed to float32, one at a time."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    model.config.dtype = torch.float32
