"""RMSNorm with a frozen weight in fewer passes over memory."""

from __future__ import annotations

from typing import Any

import torch


class _FrozenRmsNorm(torch.autograd.Function):
    """y = x / rms(x) * weight, in float32, where rms(x) = sqrt(mean(x²) + eps) (arXiv:1910.07467)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        exact = x.float()
        inverse = torch.linalg.vector_norm(exact, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (exact * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        normed = x.float().mul_(inverse)
        above = gradient.float() * weight
        along = (above * normed).mean(dim=-1, keepdim=True)
        return above.sub_(normed.mul_(along)).mul_(inverse).to(x.dtype), None, None


def fits(layer: torch.nn.Module) -> bool:
    """Whether this is an RMSNorm of the common form; found by comparing numbers, since names differ and lie."""
    weight, eps = getattr(layer, "weight", None), getattr(layer, "variance_epsilon", getattr(layer, "eps", None))
    if "RMSNorm" not in type(layer).__name__ or weight is None or eps is None or weight.requires_grad:
        return False
    x = torch.linspace(-3, 3, 2 * len(weight), device=weight.device, dtype=weight.dtype).view(2, -1)
    with torch.no_grad():
        return torch.allclose(layer(x).float(), _FrozenRmsNorm.apply(x, weight, eps).float(), rtol=2e-2, atol=1e-3)


def fuse(layer: torch.nn.Module) -> None:
    """Have a layer that `fits` compute itself in one step, from now on."""
    eps = getattr(layer, "variance_epsilon", getattr(layer, "eps", None))
    layer.forward = lambda x: _FrozenRmsNorm.apply(x, layer.weight, eps)
