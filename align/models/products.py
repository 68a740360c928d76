"""Attention as batched matrix products: on a CPU, faster than torch's fused kernel.

Queries are taken in blocks, and a block multiplies only the keys up to its last query's own. The
products are those of ``softmax(Q K^T * scale) V`` as they stand, in the tensors' dtype; in bf16 the
scores are rounded to bf16, as in transformers' eager attention, the softmax is computed in float32.
``python -m benchmarks.attention`` measures it beside the fused kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BLOCK = 128
"""Queries of one product."""
KEPT = 512
"""Keys up to which the probabilities are kept for the backward pass; with more, in bf16, it computes
them again, and in float32 the fused kernel is as fast and keeps nothing."""


def pays(query: Tensor, keys: int, dropout: float) -> bool:
    """Whether `attend` is faster than the fused kernel for queries against so many keys."""
    short = keys <= KEPT or query.dtype == torch.bfloat16
    return query.device.type == "cpu" and short and not dropout


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, *, before: int
) -> Tensor:
    """Masked attention of grouped heads.

    Args:
        query: ``[n,heads,L,D]``; the queries of one kv head lie behind one another.
        key: ``[n,kv_heads,S,D]``; ``value`` likewise.
        mask: bool ``[n,1,L,S]``, True = may be attended to; at least one key for each query. None:
            query i attends to the first ``before + i + 1`` keys.
        before: Query i attends to none of the keys from ``before + i + 1`` on.

    Returns:
        ``[n,heads,L,D]`` in the dtype of ``value``.
    """
    n, heads, length, _ = query.shape
    kv = key.shape[1]
    grouped = (query * scale).reshape(n * kv, heads // kv, length, -1)
    blocks = [
        (start, min(start + BLOCK, length), min(before + start + BLOCK, key.shape[2]))
        for start in range(0, length, BLOCK)
    ]
    hidden = None if mask is None else ~mask
    with torch.autocast(query.device.type, enabled=False):  # backward runs outside of it too
        out = _Products.apply(
            grouped, key.flatten(0, 1), value.flatten(0, 1), hidden, blocks, before
        )
    return out.view(n, heads, length, -1)


def _probabilities(
    query: Tensor, key: Tensor, hidden: Tensor | None, block: tuple[int, int, int], before: int
) -> Tensor:
    """One block's: ``[N,g,L,D]``, ``[N,S,D]``, ``[n,1,L,S]`` -> ``[N,g*b,e]``."""
    start, stop, keys = block
    taken = query[:, :, start:stop]
    scores = torch.bmm(taken.flatten(1, 2), key[:, :keys].transpose(1, 2))
    if hidden is None:
        later = torch.arange(before + start, before + stop)[:, None] < torch.arange(keys)
        scores.view(*taken.shape[:3], keys).masked_fill_(later, float("-inf"))
    else:
        split = scores.view(len(hidden), -1, *taken.shape[1:3], keys)
        split.masked_fill_(hidden[:, None, :, start:stop, :keys], float("-inf"))
    return scores.softmax(-1)


class _Products(torch.autograd.Function):
    """Scaled queries ``[N,g,L,D]`` against ``[N,S,D]``, where N = n * kv heads."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        hidden: Tensor | None,
        blocks: list[tuple[int, int, int]],
        before: int,
    ) -> Tensor:
        out = query.new_empty(*query.shape[:3], value.shape[-1])
        kept = []
        for block in blocks:
            start, stop, keys = block
            p = _probabilities(query, key, hidden, block, before)
            out[:, :, start:stop] = torch.bmm(p, value[:, :keys]).view_as(out[:, :, start:stop])
            if key.shape[1] <= KEPT and any(ctx.needs_input_grad):
                kept.append(p)
        ctx.save_for_backward(query, key, value, hidden, *kept)
        ctx.options = (blocks, before)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        query, key, value, hidden, *kept = ctx.saved_tensors
        grad_query = torch.empty_like(query)
        grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
        blocks, before = ctx.options
        for i, block in enumerate(blocks):
            start, stop, keys = block
            p = kept[i] if kept else _probabilities(query, key, hidden, block, before)
            taken = query[:, :, start:stop]
            grad = grad_out[:, :, start:stop].flatten(1, 2)
            grad_value[:, :keys] += torch.bmm(p.transpose(1, 2), grad)
            grad_p = torch.bmm(grad, value[:, :keys].transpose(1, 2))
            # d scores = p * (d p - sum(p * d p))
            grad_scores = torch._softmax_backward_data(grad_p, p, -1, p.dtype)
            grad_query[:, :, start:stop] = torch.bmm(grad_scores, key[:, :keys]).view_as(taken)
            grad_key[:, :keys] += torch.bmm(grad_scores.transpose(1, 2), taken.flatten(1, 2))
        return grad_query, grad_key, grad_value, None, None, None
