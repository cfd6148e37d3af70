"""Exact attention over a flat batch: every row sees the shared prefix and its own earlier tokens, and no other row."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface

from tasks.training.speed.batches import Rows

ATTENTION = "goldgate_rows"  # the name under which transformers knows it
# Up to so many keys a CPU is faster with plain products: its fused kernel takes 5.7 ms forward and backward on four
# rows of 70 tokens (9 heads, bfloat16), plain products 1.4 ms; from about 250 on they are even.
_FEW_KEYS = 256


class _Gather(torch.autograd.Function):
    """Flat tokens [N, …] to rows [rows, longest, …]. Only `place` of them go back: the others are repetitions."""

    @staticmethod
    def forward(ctx: Any, flat: torch.Tensor, rows: Rows) -> torch.Tensor:
        ctx.rows, ctx.tokens = rows, len(flat)
        return flat.index_select(0, rows.gather.flatten()).view(*rows.gather.shape, *flat.shape[1:])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        rows: Rows = ctx.rows
        flat = gradient.new_zeros(ctx.tokens, *gradient.shape[2:])
        flat[rows.prefix :] = gradient.flatten(0, 1).index_select(0, rows.place)
        return flat, None


class _Place(torch.autograd.Function):
    """Rows [rows, longest, …] to the flat tokens behind the prefix; the opposite of `_Gather`."""

    @staticmethod
    def forward(ctx: Any, rowwise: torch.Tensor, rows: Rows) -> torch.Tensor:
        ctx.rows, ctx.shape = rows, rowwise.shape
        return rowwise.flatten(0, 1).index_select(0, rows.place)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        spread = gradient.new_zeros(ctx.shape[0] * ctx.shape[1], *ctx.shape[2:])
        spread.index_copy_(0, ctx.rows.place, gradient)
        return spread.view(ctx.shape), None


def attend_rows(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    rows: Rows | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a flat batch, as transformers calls it.

    Args:
        module: the attention layer; not used.
        query: [1, heads, N, width].
        key: [1, key heads, N, width]; `heads` is a multiple of `key heads`.
        value: as `key`.
        attention_mask: none; the rows say who sees whom.
        scaling: of the products; none is 1 / sqrt(width).
        dropout: none; a base model's attention has no dropout in fine-tuning.
        rows: where the rows are.

    Returns:
        [1, N, heads, width], and no weights.
    """
    if rows is None or attention_mask is not None or dropout:
        raise ValueError("a flat batch needs its rows, no mask, and no dropout in attention")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    flat_query, flat_key, flat_value = (flat[0].transpose(0, 1) for flat in (query, key, value))
    # [rows, heads, tokens, width]
    own_query, own_key, own_value = (
        _Gather.apply(flat, rows).transpose(1, 2) for flat in (flat_query, flat_key, flat_value)
    )
    if not rows.prefix:
        return _Place.apply(_attend(own_query, own_key, own_value, scale).transpose(1, 2), rows)[None], None
    before = slice(None, rows.prefix)
    count = len(own_key)
    own_key = torch.cat((key[:, :, before].expand(count, -1, -1, -1), own_key), dim=2)
    own_value = torch.cat((value[:, :, before].expand(count, -1, -1, -1), own_value), dim=2)
    own = _Place.apply(_attend(own_query, own_key, own_value, scale).transpose(1, 2), rows)
    shared = _attend(query[:, :, before], key[:, :, before], value[:, :, before], scale)[0].transpose(0, 1)
    return torch.cat((shared, own))[None], None


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention where the queries are the last of the keys: [rows, heads, queries, width]."""
    count, heads, queries, width = query.shape
    keys, key_heads = key.shape[2], key.shape[1]
    if query.device.type != "cpu" or keys > _FEW_KEYS:
        mask = None if queries == keys else _sees(queries, keys, query.device)
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=heads != key_heads
        )
    # Query heads that share a key head are one product with it.
    grouped = (query * scale).reshape(count, key_heads, heads // key_heads * queries, width)
    scores = (grouped @ key.transpose(2, 3)).view(count, key_heads, heads // key_heads, queries, keys)
    weights = scores.masked_fill(~_sees(queries, keys, query.device), float("-inf")).softmax(dim=-1)
    mixed = weights.view(count, key_heads, -1, keys) @ value
    return mixed.view(count, heads, queries, width)


def _sees(queries: int, keys: int, device: torch.device) -> torch.Tensor:
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


AttentionInterface.register(ATTENTION, attend_rows)
