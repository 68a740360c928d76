"""Attention as batched matrix products, instead of torch's fused kernel for CPUs.

Queries are taken in blocks, and a block multiplies only the keys from the first that one of its
queries sees to the last. The products are ``softmax(Q K^T * scale) V`` in the tensors' dtype, the
softmax in float32. In bf16 the scores are rounded to bf16, as in transformers' eager attention, so
keys are centred first: their common part adds the same to every score of a query, which changes no
probability but costs digits. ``python -m benchmarks.attention`` compares with the fused kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 128
"""Queries per matrix product."""
KEPT = 512
"""Keys up to which probabilities are stored for the backward pass. With more keys they are computed
again in bf16; in float32 the fused kernel is then faster."""


def pays(query: Tensor, keys: int, dropout: float) -> bool:
    """Tell whether `attend` is faster than the fused kernel for queries against so many keys."""
    short = keys <= KEPT or query.dtype == torch.bfloat16
    return query.device.type == "cpu" and short and not dropout


def visible(
    queries: tuple[int, int], keys: tuple[int, int], window: int | None, device: torch.device
) -> Tensor:
    """Mask ``[queries,keys]`` of two ranges of positions: causal, or a causal window."""
    place = torch.arange(*queries, device=device)[:, None]
    distance = place - torch.arange(*keys, device=device)
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    *,
    before: int,
    window: int | None = None,
) -> Tensor:
    """Compute masked attention of grouped heads.

    Args:
        query: ``[n,heads,L,D]``; the query heads of one kv head are neighbours.
        key: ``[n,kv_heads,S,D]``; ``value`` likewise.
        mask: bool ``[n,1,L,S]``, True = may be attended to; at least one key for each query. None:
            query i attends to the last ``window`` of the first ``before + i + 1`` keys, or to all.
        before: Query i attends to none of the keys from ``before + i + 1`` on.

    Returns:
        ``[n,heads,L,D]`` in the dtype of ``value``. Differentiable once.
    """
    n, heads, length, _ = query.shape
    kv = key.shape[1]
    grouped = (query * scale).reshape(n * kv, heads // kv, length, -1)
    blocks = []
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        first = 0 if mask is not None or window is None else max(0, before + start - window + 1)
        blocks.append((start, stop, first, min(before + stop, key.shape[2])))
    options = (tuple(blocks), before, window)
    with torch.autocast(query.device.type, enabled=False):  # backward runs outside of it too
        out = _Products.apply(grouped, key.flatten(0, 1), value.flatten(0, 1), mask, options)
    return out.view(n, heads, length, -1)


def _probabilities(
    query: Tensor, key: Tensor, mask: Tensor | None, block: tuple[int, ...], options: Any
) -> Tensor:
    """Compute one block's probabilities: ``[N,g,L,D]``, ``[N,S,D]``, ``[n,1,L,S]`` ->
    ``[N,g*b,e]``.
    """
    start, stop, first, last = block
    _, before, window = options
    taken = query[:, :, start:stop]
    scores = torch.bmm(taken.flatten(1, 2), key[:, first:last].transpose(1, 2))
    if mask is None:
        seen = visible((before + start, before + stop), (first, last), window, query.device)
        scores.view(*taken.shape[:3], -1).masked_fill_(~seen, float("-inf"))
    else:
        seen = mask[:, None, :, start:stop, first:last]
        split = scores.view(len(mask), -1, *taken.shape[1:3], last - first)
        split.masked_fill_(~seen, float("-inf"))
    return scores.softmax(-1)


class _Products(torch.autograd.Function):
    """Attention of scaled queries ``[N,g,L,D]`` over ``[N,S,D]``, where N = n * kv heads."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: Any
    ) -> Tensor:
        if key.dtype == torch.bfloat16:  # same gradient: those of a query's scores sum to 0
            key = key - key.mean(1, keepdim=True)
        out = query.new_empty(*query.shape[:3], value.shape[-1])
        kept = []
        for block in options[0]:
            start, stop, first, last = block
            p = _probabilities(query, key, mask, block, options)
            part = out[:, :, start:stop]
            part.copy_(torch.bmm(p, value[:, first:last]).view_as(part))
            if key.shape[1] <= KEPT and any(ctx.needs_input_grad):
                kept.append(p)
        ctx.save_for_backward(query, key, value, mask, *kept)
        ctx.options = options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        query, key, value, mask, *kept = ctx.saved_tensors
        grad_query = torch.empty_like(query)
        # float32: sums over many blocks
        grad_key, grad_value = (torch.zeros_like(t, dtype=torch.float32) for t in (key, value))
        for i, block in enumerate(ctx.options[0]):
            start, stop, first, last = block
            p = kept[i] if kept else _probabilities(query, key, mask, block, ctx.options)
            taken = query[:, :, start:stop]
            grad = grad_out[:, :, start:stop].flatten(1, 2)
            grad_value[:, first:last] += torch.bmm(p.transpose(1, 2), grad)
            grad_p = torch.bmm(grad, value[:, first:last].transpose(1, 2))
            # d scores = p * (d p - sum(p * d p))
            grad_scores = torch._softmax_backward_data(grad_p, p, -1, p.dtype)
            grad_query[:, :, start:stop] = torch.bmm(grad_scores, key[:, first:last]).view_as(taken)
            grad_key[:, first:last] += torch.bmm(grad_scores.transpose(1, 2), taken.flatten(1, 2))
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None
