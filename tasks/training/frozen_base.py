"""The base model as QLoRA holds it: 4-bit NF4 with double quantisation, never trained itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def device_name() -> str:
    """`cuda` where there is a CUDA device, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def compute_dtype(device: str) -> torch.dtype:
    """bfloat16 on CUDA; float32 on a CPU, of which many do not multiply bfloat16 in hardware.

    Measured on two such cores, matrix products of a 135M model: float32 77-111 GFLOP/s, bfloat16 23-36.
    """
    return torch.bfloat16 if device == "cuda" else torch.float32


def load_nf4(model_folder: Path, device: str) -> PreTrainedModel:
    """Quantise the base model: linear layers in NF4 with double quantisation, the rest in bfloat16."""
    return AutoModelForCausalLM.from_pretrained(
        model_folder,
        dtype=torch.bfloat16,
        device_map={"": _place(device)},
        attn_implementation="sdpa",
        trust_remote_code=False,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    )


def load_dequantised(model_folder: Path, device: str) -> PreTrainedModel:
    """The NF4 base with its weights written out as bfloat16 numbers, in float32 tensors.

    These are the very numbers that NF4's forward pass multiplies with, so what is trained or merged on them fits
    what is trained on the packed weights.
    """
    model = load_nf4(model_folder, device).dequantize()
    return model.float()


def load_for_training(model_folder: Path, device: str) -> PreTrainedModel:
    """The frozen base to train an adapter on: packed NF4 on CUDA, NF4 dequantised once on a CPU.

    On a CPU the packed weights would be dequantised again in every forward and backward pass. Measured on a 135M model
    (batches of 4 x 120 tokens, one busy core): 118 tokens per CPU second dequantised once, 83 packed.
    """
    return load_nf4(model_folder, device) if device == "cuda" else load_dequantised(model_folder, device)


def _place(device: str) -> int | str:
    """The device of this process: with several processes, each has its own."""
    return torch.cuda.current_device() if device == "cuda" else "cpu"
