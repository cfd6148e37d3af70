"""A linear layer with a LoRA adapter as one step of the backward pass, with no copy that is not needed."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch.nn import functional

_ADAPTER = "default"


class _AdaptedLinear(torch.autograd.Function):
    """y = x W' + s (x A') B', with W frozen.

    peft computes it in five steps that each keep a tensor, and turns x to the adapter's dtype and back. Here A and B,
    which are small, are turned to the dtype of x, the adapter's part is added in place, and what the backward pass
    needs is x alone: x A' has `rank` numbers a token.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        narrow, wide = a.to(x.dtype), (b * scale).to(x.dtype)
        inner = flat @ narrow.t()
        ctx.save_for_backward(flat, weight, narrow, wide, inner)
        ctx.scale, ctx.shape = scale, x.shape
        return functional.linear(flat, weight).addmm_(inner, wide.t()).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flat, weight, narrow, wide, inner = ctx.saved_tensors
        above = gradient.reshape(-1, gradient.shape[-1])
        back = above @ wide
        of_a = (back.t() @ flat).float()
        of_b = (above.t() @ inner).float().mul_(ctx.scale)
        of_x = (above @ weight).addmm_(back, narrow).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return of_x, None, of_a, of_b, None


def fits(layer: torch.nn.Module) -> bool:
    """Whether this is a layer that the fused step computes: a frozen dense weight, no bias, plain LoRA."""
    if not isinstance(layer, LoraLinear) or layer.merged or set(layer.active_adapters) != {_ADAPTER}:
        return False
    base, dropout = layer.base_layer, layer.lora_dropout[_ADAPTER]
    return (
        type(base) is torch.nn.Linear
        and base.bias is None
        and not base.weight.requires_grad
        and not layer.lora_variant.get(_ADAPTER)  # DoRA and its like
        and not layer.lora_bias[_ADAPTER]
        and (isinstance(dropout, torch.nn.Identity) or not dropout.p)
    )


def fuse(layer: LoraLinear) -> None:
    """Have a layer that `fits` compute itself in one step, from now on."""
    scale = float(layer.scaling[_ADAPTER])
    if not math.isfinite(scale):
        raise ValueError(f"the adapter's scale is {scale}")

    def forward(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        a, b = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight  # loading a checkpoint may replace them
        return _AdaptedLinear.apply(x, layer.base_layer.weight, a, b, scale)

    layer.forward = forward
