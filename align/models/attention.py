"""Attention over packed rows: the one place that turns segments into what a backend wants.

Each segment is a call of its own to scaled-dot-product attention, with the keys of all that it
continues in front of its own. So no ``[T,T]`` mask exists, nothing is computed between
neighbours, and a row may be as long as memory allows. The segments travel as an extra keyword of
the model's forward to a function registered with transformers' ``AttentionInterface``, which any
architecture on that interface calls. Decoding, one query per row against a cache, is its own case.

What it refuses: attention weights as an output, position biases (ALiBi, T5), attention sinks and
sparse attention (GPT-OSS, DeepSeek 4), and a forward without segments, since that would attend
across neighbours or padding without a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface

from align.types import Segment

BACKEND = "align_segments"

UNSUPPORTED = ("position_bias", "s_aux", "sinks", "indices", "block_indices")
"""What a model may hand to its attention function that changes the result and is not done here."""


@dataclass(frozen=True)
class DecodeState:
    """One query per row; row r may look at cache columns ``starts[r]`` onwards.

    Attributes:
        mask: bool ``[rows, columns]``, True = may be attended to.
    """

    mask: Tensor


def segment_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    segments: Sequence[Segment] | None = None,
    decode: DecodeState | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """``[B,heads,T,D]`` queries and ``[B,kv_heads,S,D]`` keys -> ``[B,T,heads,D]``."""
    for name in UNSUPPORTED:
        if more.get(name) is not None:
            raise NotImplementedError(f"attention with `{name}` is not supported")
    options = _Options(dropout, scaling or query.shape[-1] ** -0.5, sliding_window, softcap)
    if decode is not None:
        return _decode(query, key, value, decode, options), None
    if segments is None:
        raise RuntimeError(f"attention {BACKEND!r} was called without segments")
    rows = [
        _row(q, k, v, [s for s in segments if s.row == row], options)
        for row, (q, k, v) in enumerate(zip(query, key, value, strict=True))
    ]
    return rows[0].unsqueeze(0) if len(rows) == 1 else torch.stack(rows), None


AttentionInterface.register(BACKEND, segment_attention)


@dataclass(frozen=True)
class _Options:
    dropout: float
    scale: float
    window: int | None
    softcap: float | None


def _row(
    query: Tensor, key: Tensor, value: Tensor, segments: Sequence[Segment], options: _Options
) -> Tensor:
    """One row, ``[heads,T,D]`` -> ``[T,heads,D]``; columns in no segment give zeros."""
    lengths = [s.stop - s.start for s in segments]
    padding = query.shape[1] - sum(lengths)
    if padding:
        lengths = [*lengths, padding]
    # split, not slices: its backward is one concatenation instead of a zero tensor per segment
    queries, keys, values = (t.split(lengths, dim=1) for t in (query, key, value))
    seen: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # a segment's keys, all before included
    outputs = []
    for i, segment in enumerate(segments):
        k, v = keys[i], values[i]
        if segment.prefix_stop > segment.prefix_start:
            before = seen[segment.prefix_start, segment.prefix_stop]
            k, v = torch.cat([before[0], k], dim=1), torch.cat([before[1], v], dim=1)
        seen[segment.start, segment.stop] = k, v
        outputs.append(_causal(queries[i], k, v, options))
    if padding:
        outputs.append(torch.zeros_like(queries[-1]))
    return torch.cat(outputs, dim=1).transpose(0, 1)


def _causal(query: Tensor, key: Tensor, value: Tensor, options: _Options) -> Tensor:
    """Causal attention of the last ``L`` of ``S`` positions: ``[heads,L,D]``, ``[kv,S,D]``."""
    heads, length, _ = query.shape
    total = key.shape[1]
    # Grouped queries: kv heads as the batch, their queries as heads; keys expand without a copy.
    grouped = query.view(key.shape[0], heads // key.shape[0], length, -1)
    key, value = (t[:, None].expand(-1, grouped.shape[1], -1, -1) for t in (key, value))
    window = total if options.window is None else options.window
    plain = length == total <= window
    mask = None
    if not plain and (length > 1 or total > window):
        distance = torch.arange(total - length, total, device=query.device)[:, None]
        distance = distance - torch.arange(total, device=query.device)
        mask = (distance >= 0) & (distance < window)
    out = _attend(grouped, key, value, mask, plain and length > 1, options)
    return out.reshape(heads, length, -1)


def _decode(
    query: Tensor, key: Tensor, value: Tensor, decode: DecodeState, options: _Options
) -> Tensor:
    """One new token per row: ``[R,heads,1,D]`` against ``[R,kv,C,D]`` -> ``[R,1,heads,D]``."""
    rows, heads, _, dim = query.shape
    mask = decode.mask
    if options.window is not None and mask.shape[1] > options.window:
        mask = mask.clone()
        mask[:, : -options.window] = False
    # The queries of one kv head stand where a sequence's positions would: no key is repeated.
    grouped = query.view(rows, key.shape[1], -1, dim)
    out = _attend(grouped, key, value, mask[:, None, None, :], False, options)
    return out.reshape(rows, 1, heads, -1)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    options: _Options,
) -> Tensor:
    if options.softcap is None:
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=options.dropout,
            is_causal=is_causal,
            scale=options.scale,
        )
    # Gemma 2 caps its scores, which no fused kernel on a CPU offers.
    scores = torch.tanh(query @ key.transpose(-1, -2) * (options.scale / options.softcap))
    scores = scores.float() * options.softcap
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = F.dropout(scores.softmax(-1), options.dropout)
    return weights.to(value.dtype) @ value
