"""Base model and adapter become one plain model, onto whichever base it changes least."""

from __future__ import annotations

import gc
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoTokenizer

from tasks.contracts.errors import TrainingError
from tasks.contracts.spec import TrainMethod
from tasks.training.base_model import carries_code
from tasks.training.examples import Example
from tasks.training.frozen_base import load_dequantised, load_for_training, load_plain
from tasks.training.skew import Skew, answer_log_probs, draw_samples, measure_skew

if TYPE_CHECKING:
    from tasks.training.recipe import TrainPlan

log = logging.getLogger("goldgate.training")

_ROOM = 1.3  # memory of a model that is asked row by row, in sizes of its weights


def merge_adapter(
    model_folder: Path,
    adapter_folder: Path,
    out: Path,
    plan: TrainPlan,
    device: str,
    dev: Sequence[Example],
    at_most: int = 64,
    *,
    trust_code: bool = False,
    shard_size: str = "4GB",
    written_out: dict[str, torch.Tensor] | None = None,
) -> list[Skew]:
    """Write the trained model into `out`: bfloat16 safetensors, tokenizer and chat template; say how it is skewed.

    A QLoRA adapter was trained to correct the dequantised NF4 weights, so W = dequant(NF4(W0)) + (alpha / r) B A is
    what was trained, but for rounding; on the original weights W0 it may answer otherwise. Both are made, both are
    measured against the model as trained, on dev rows and in bfloat16 as written, and the one with the smaller
    divergence stays; the second is written only if it is that. A LoRA adapter goes onto the base as it is. With method
    full, `adapter_folder` holds the trained model (float32), and rounding it is all there is to do.

    A layer's sum is taken in float32 and rounded once. One model is in memory at a time, in the dtype it was trained
    in, so merging needs no more memory than training; the bytes depend on neither where the base model lay nor where
    the adapter did.

    Args:
        model_folder: the base model.
        adapter_folder: adapter (`adapter_config.json`), or for method full the trained model.
        out: folder of the merged model; one that is there is replaced.
        plan: of the training.
        device: "cuda" or "cpu".
        dev: dev rows, tokenised as for training.
        at_most: dev rows that are looked at, spread evenly; fewer of long ones (see `draw_samples`).
        trust_code: run the code that came with the model; it is handed on with the merged one.
        shard_size: largest file of weights.
        written_out: the base as it was trained on, where that process still has it (`written_out_weights`): it need not
            be quantised again. It is empty afterwards.

    Returns:
        The skew of what was written first, then that of what was not chosen.

    Raises:
        TrainingError: a merged weight is not finite, or there are no dev rows.
    """
    full = plan.method is TrainMethod.FULL
    compute = torch.float32 if full else getattr(torch, plan.speed.compute_dtype)
    bases = ("nothing",) if full else ("nf4", "base") if plan.method is TrainMethod.QLORA else ("base",)
    written = out.with_name(f"{out.name}.part")
    device = _roomy_device(model_folder, device)

    def load(folder: Path, dtype: torch.dtype | str) -> Any:
        return load_plain(folder, device, dtype, trust_code=trust_code)

    def load_adapted(onto: str) -> Any:
        if onto == "nf4":
            base: Any = load_dequantised(model_folder, device, torch.bfloat16, trust_code=trust_code)
        else:
            base = load(model_folder, "auto")
        return PeftModel.from_pretrained(base, adapter_folder)

    model: Any
    if full:
        model = load(adapter_folder, torch.float32)
    else:
        base = load_for_training(model_folder, plan, device, trust_code=trust_code, written_out=written_out)
        model = PeftModel.from_pretrained(base, adapter_folder)
        del base
    samples = draw_samples(dev, at_most, len(model.get_output_embeddings().weight))
    trained = list(answer_log_probs(model, samples, device))
    if not full and plan.speed.base != "dequantised":
        model = None  # packed weights cannot be added to; others may have been rounded for training
    skews: list[Skew] = []
    try:
        for onto in bases:
            if model is None:
                gc.collect()
                model = load_adapted(onto)
            model = _rounded(model if full else _merged(model))
            if not skews:
                _write(model, model_folder, written, shard_size, trust_code=trust_code)
                model = None
                gc.collect()
                model = load(written, compute)
            else:
                _cast(model, compute)
            skews.append(measure_skew(trained, model, samples, device, onto))
            if skews[-1].kl < skews[0].kl:
                _write(_rounded(model), model_folder, written, shard_size, trust_code=trust_code)
            model = None
        skews.sort(key=lambda skew: skew.kl)
        if out.exists():
            shutil.rmtree(out)
        written.rename(out)
    finally:
        shutil.rmtree(written, ignore_errors=True)
    for skew in skews:
        log.info("merged onto %s: KL %.2g nats a token, same token %.1f %%", skew.onto, skew.kl, 100 * skew.same_top)
    return skews


def _roomy_device(model_folder: Path, device: str) -> str:
    """The device, or the CPU where the unpacked model does not fit on it: QLoRA trains what would not fit unpacked."""
    if device != "cuda":
        return device
    torch.cuda.empty_cache()  # what training has let go of
    needed = _ROOM * sum(file.stat().st_size for file in model_folder.glob("*.safetensors"))
    free, _ = torch.cuda.mem_get_info()
    if free >= needed:
        return device
    log.warning("merging on the CPU: it takes about %.1f GB, and the GPU has %.1f GB free", needed / 1e9, free / 1e9)
    return "cpu"


@torch.no_grad()
def _merged(adapted: PeftModel) -> Any:
    """The base model of an adapted one, with the adapter in its weights; one layer at a time is in float32."""
    for layer in adapted.modules():
        if isinstance(layer, LoraLayer):
            base = layer.get_base_layer()
            base.weight.data = base.weight.data.float()
            layer.merge()
            base.weight.data = base.weight.data.to(torch.bfloat16)
    return adapted.unload()


def _cast(model: Any, dtype: torch.dtype) -> None:
    """Hold every parameter in a dtype, one at a time."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _rounded(model: Any) -> Any:
    """The model in the numbers that are written: bfloat16, all finite.

    Raises:
        TrainingError: one is not.
    """
    _cast(model, torch.bfloat16)
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter.data).all()):
            raise TrainingError(
                f"The trained weights of {name} are not finite (NaN or infinity).",
                where="train",
                fix="lower `train.learning_rate` (half is a good try), or look for damaged rows",
            )
    return model


def _write(model: Any, model_folder: Path, out: Path, shard_size: str, *, trust_code: bool) -> None:
    model.config.dtype = torch.bfloat16
    model.config.name_or_path = ""  # the same bytes wherever the base model was kept
    shutil.rmtree(out, ignore_errors=True)  # what a killed process left
    model.save_pretrained(out, max_shard_size=shard_size)
    AutoTokenizer.from_pretrained(model_folder, trust_remote_code=trust_code).save_pretrained(out)
    if trust_code and carries_code(model_folder):
        for file in model_folder.glob("*.py"):
            shutil.copyfile(file, out / file.name)
