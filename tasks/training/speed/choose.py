"""Leaves nothing of a `SpeedSpec` to choose, for one device and one model."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

from tasks.contracts.errors import TrainingError
from tasks.contracts.spec import (
    BaseWeights,
    BatchLayout,
    Kernels,
    SpeedSpec,
    Switch,
    TrainBackend,
    TrainMethod,
    TrainSpec,
)
from tasks.training.recipe import SpeedPlan

OWN_ATTENTION = "goldgate_own_attention"  # beside the names of a configuration


def choose_speed(recipe: TrainSpec, device: str, compute_dtype: str, config: Mapping[str, Any]) -> SpeedPlan:
    """How this recipe computes on a device.

    Args:
        recipe: what a person set.
        device: "cuda" or "cpu".
        compute_dtype: what matrix products are made in there.
        config: of the model, as `describe_model` gives it.

    Raises:
        TrainingError: an option that is asked for cannot be had here.
    """
    wanted = recipe.speed
    if recipe.backend is TrainBackend.UNSLOTH:  # which brings its own kernels, and reads padded batches
        wanted = wanted.model_copy(update={"batches": BatchLayout.PADDED, "kernels": Kernels.PLAIN})
    full = recipe.method is TrainMethod.FULL
    return SpeedPlan(
        base=_base(wanted, recipe.method, device),
        compute_dtype="float32" if full and device == "cpu" else compute_dtype,
        batches=_batches(wanted, config),
        kernels=_kernels(wanted, device, full=full),
        checkpointing=wanted.checkpointing is Switch.ON,
        compile=wanted.compile,
    )


def _base(wanted: SpeedSpec, method: TrainMethod, device: str) -> str:
    if method is not TrainMethod.QLORA:
        return "plain"
    if wanted.base is BaseWeights.AUTO:
        return "packed" if device == "cuda" else "dequantised"
    return wanted.base.value


def _batches(wanted: SpeedSpec, config: Mapping[str, Any]) -> BatchLayout:
    """Flat batches need a model in which every layer sees all earlier tokens, through transformers' own interface."""
    obstacle = _obstacle(config)
    if wanted.batches is BatchLayout.AUTO:
        return BatchLayout.PADDED if obstacle else BatchLayout.SHARED_PREFIX
    if obstacle and wanted.batches is not BatchLayout.PADDED:
        raise TrainingError(
            f"This base model cannot be trained on flat batches: {obstacle}.",
            where=f"train.speed.batches = {wanted.batches.value}",
            fix="set it to auto or padded",
        )
    return wanted.batches


def _obstacle(config: Mapping[str, Any]) -> str | None:
    """Why a model's attention is not that of `attend_rows`; None where it is."""
    if config.get(OWN_ATTENTION):
        return "it computes attention in a way of its own"
    if config.get("attention_dropout"):
        return "its attention has dropout"
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        return "its attention has a sliding window"
    kinds = sorted(set(config.get("layer_types") or ["full_attention"]) - {"full_attention"})
    return f"it has layers of the kind {kinds[0]}" if kinds else None


def describe_model(model_folder: Path, *, trust_code: bool = False) -> dict[str, Any]:
    """A model's configuration with its defaults filled in, and whether its attention can be exchanged."""
    config = AutoConfig.from_pretrained(model_folder, trust_remote_code=trust_code)
    kind = AutoModelForCausalLM._model_mapping.get(type(config), None)
    text = config.get_text_config()
    return text.to_dict() | {OWN_ATTENTION: not getattr(kind, "_supports_attention_backend", False)}


def _kernels(wanted: SpeedSpec, device: str, *, full: bool) -> Kernels:
    if wanted.kernels is not Kernels.AUTO:
        if wanted.kernels is Kernels.LIGER and device != "cuda":
            raise TrainingError(
                "liger-kernel needs a GPU.", where="train.speed.kernels = liger", fix="set it to auto, fused or plain"
            )
        return wanted.kernels
    if device == "cuda":
        return Kernels.LIGER if importlib.util.find_spec("liger_kernel") else Kernels.PLAIN
    return Kernels.PLAIN if full else Kernels.FUSED
