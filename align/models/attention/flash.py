"""Packed attention as one call of torch's variable-length flash kernel, on a GPU.

A segment's queries are its own tokens; its keys are those of all segments it continues, then its
own. So a shared prompt's keys are copied for every continuation, and its queries are computed once.
There is no padding and no mask: the kernel's causal mask is aligned to the last key of each segment
(FlashAttention 2.1 and later), as a continuation needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from align.models.attention.segments import columns_seen
from align.types import Segment

OPTIONS = {"scale", "window_size", "enable_gqa"}
"""Arguments of the kernel that are needed here, and missing in its first releases."""


def kernel() -> Any:
    """Import ``torch.nn.attention.varlen.varlen_attn``, as of torch 2.13."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


@dataclass(frozen=True)
class _Layout:
    """Index arrays: each segment's queries and keys for the kernel, each column's output.

    Attributes:
        queries: int64 ``[Q]`` columns of the rows, numbered row after row.
        keys: int64 ``[K]``.
        query_ends: int32 ``[n+1]``: segment i has queries ``query_ends[i]`` to
            ``query_ends[i+1]``; ``key_ends`` likewise.
        longest: Queries and keys of the longest segment.
        order: int64 ``[B*T]`` index into the outputs followed by one row of zeros.
    """

    queries: Tensor
    keys: Tensor
    query_ends: Tensor
    key_ends: Tensor
    longest: tuple[int, int]
    order: Tensor


@lru_cache(maxsize=16)  # all layers of a forward pass share it
def _layout(
    segments: tuple[Segment, ...], rows: int, columns: int, device: torch.device
) -> _Layout:
    seen = columns_seen(segments, columns)
    lengths = [s.stop - s.start for s in segments]
    queries = np.concatenate([c[len(c) - n :] for c, n in zip(seen, lengths, strict=True)])
    order = np.full(rows * columns, len(queries), dtype=np.int64)
    order[queries] = np.arange(len(queries))
    totals = [len(c) for c in seen]
    ends = [np.cumsum([0, *of], dtype=np.int32) for of in (lengths, totals)]
    arrays = (queries, np.concatenate(seen), *ends, order)
    q, k, query_ends, key_ends, places = (torch.from_numpy(a).to(device) for a in arrays)
    return _Layout(q, k, query_ends, key_ends, (max(lengths), max(totals)), places)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Sequence[Segment],
    *,
    scale: float,
    window: int | None,
) -> Tensor:
    """Attend ``[B,heads,T,D]`` to ``[B,kv_heads,T,D]``, bf16 or fp16 -> ``[B,T,heads,D]``.

    Columns in no segment give zeros. With a ``window``, a query sees its last ``window`` keys.
    """
    batch, heads, time, dim = query.shape
    layout = _layout(tuple(segments), batch, time, query.device)
    places = (layout.queries, layout.keys, layout.keys)
    q, k, v = (
        F.embedding(columns, t.transpose(1, 2).reshape(batch * time, -1)).unflatten(-1, (-1, dim))
        for columns, t in zip(places, (query, key, value), strict=True)
    )
    out = kernel()(
        q,
        k,
        v,
        layout.query_ends,
        layout.key_ends,
        *layout.longest,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    rows = torch.cat([out.flatten(1), out.new_zeros(1, heads * dim)])
    return F.embedding(layout.order, rows).view(batch, time, heads, dim)
