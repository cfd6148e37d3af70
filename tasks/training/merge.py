"""Base model and adapter become one plain model."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoTokenizer

from tasks.training.frozen_base import load_dequantised


def merge_adapter(model_folder: Path, adapter_folder: Path, out: Path, device: str = "cpu") -> None:
    """Write base plus adapter into `out` as bfloat16 safetensors with tokenizer and chat template.

    The adapter is added to the *dequantised NF4* weights, since it was trained to correct those: W = dequant(NF4(W0))
    + (alpha / r) B A, summed in float32 and rounded to bfloat16 once. On the original weights W0 the same adapter
    gives other answers.
    """
    base = load_dequantised(model_folder, device)
    merged = PeftModel.from_pretrained(base, adapter_folder).merge_and_unload()
    merged = merged.to(device="cpu", dtype=torch.bfloat16)
    merged.config.dtype = torch.bfloat16
    merged.config.name_or_path = ""  # the same bytes wherever the base model was kept
    merged.save_pretrained(out)
    AutoTokenizer.from_pretrained(model_folder, trust_remote_code=False).save_pretrained(out)
