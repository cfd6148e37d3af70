"""Puts what a plan asks for into a model."""

from __future__ import annotations

import logging
from typing import Any

from tasks.contracts.errors import TrainingError
from tasks.contracts.spec import BatchLayout, Kernels
from tasks.training.recipe import SpeedPlan
from tasks.training.speed import linear, norm
from tasks.training.speed.attention import ATTENTION

log = logging.getLogger("goldgate.training")


def speed_up(model: Any, speed: SpeedPlan) -> None:
    """Have an adapted model compute as the plan says.

    Raises:
        TrainingError: liger-kernel is asked for and not there, or does not know this model.
    """
    if speed.batches is not BatchLayout.PADDED:
        model.set_attn_implementation(ATTENTION)
    if speed.kernels is Kernels.FUSED:
        layers = list(model.modules())
        adapters = [layer for layer in layers if linear.fits(layer)]
        norms = [layer for layer in layers if norm.fits(layer)]
        for layer in adapters:
            linear.fuse(layer)
        for layer in norms:
            norm.fuse(layer)
        log.info("fused %d adapted linear layers and %d norms", len(adapters), len(norms))
    if speed.kernels is Kernels.LIGER:
        _apply_liger(model)
    if speed.compile:
        for layer in _layers(model):
            layer.compile(dynamic=True)


def _apply_liger(model: Any) -> None:
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
    except ImportError as error:
        raise TrainingError(
            "liger-kernel is not installed.",
            where="train.speed.kernels = liger",
            fix="pip install liger-kernel (needs a GPU), or set it to auto",
        ) from error
    # The loss takes logits of answers alone already, which is what liger's fused loss would save.
    _apply_liger_kernel_to_instance(model=model.get_base_model(), fused_linear_cross_entropy=False)


def _layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
