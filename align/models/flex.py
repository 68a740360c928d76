"""Packed attention by torch's flex attention, on a GPU: a block mask, and scores that are capped.

Blocks of 128 by 128 that hold nothing which may be seen are skipped, so that neighbours cost
nothing, and a shared prompt's keys are not copied. Dong et al. 2024, arXiv:2412.05496.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.models.segments import columns_seen
from align.types import Segment


@lru_cache(maxsize=1)
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    # lengths differ from microbatch to microbatch
    return torch.compile(flex_attention, dynamic=True)


def kernel(device: torch.device) -> Any:
    """Compiled on a GPU; elsewhere the plain form, which holds all scores."""
    from torch.nn.attention.flex_attention import flex_attention

    return _compiled() if device.type == "cuda" else flex_attention


@lru_cache(maxsize=16)  # every layer of a forward asks for the same one
def block_mask(
    segments: tuple[Segment, ...],
    rows: int,
    columns: int,
    window: int | None,
    device: torch.device,
) -> Any:
    """BlockMask ``[rows,1,columns,columns]``; columns in no segment see themselves.

    While it is made there is one boolean for each of its entries.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    parents = {(s.row, s.start, s.stop): s for s in segments}
    lines: list[list[tuple[int, int]]] = []  # of each segment, where what it continues lies
    for s in segments:
        above, at = [], s
        while at.prefix_stop:
            at = parents[at.row, at.prefix_start, at.prefix_stop]
            above.append((at.start, at.stop))
        lines.append(above)
    depth = max(map(len, lines), default=0)
    first = np.arange(columns).repeat(rows).reshape(columns, rows).T.copy()
    place = np.zeros((rows, columns), np.int64)
    above_of = np.zeros((max(depth, 1), 2, rows, columns), np.int64)
    for s, above, seen in zip(segments, lines, columns_seen(segments, columns), strict=True):
        own = slice(s.start, s.stop)
        first[s.row, own] = s.start
        place[s.row, own] = np.arange(len(seen) - (s.stop - s.start), len(seen))
        for level, bounds in enumerate(above):
            above_of[level, 0, s.row, own], above_of[level, 1, s.row, own] = bounds
    start, position, prefixes = (torch.from_numpy(a).to(device) for a in (first, place, above_of))

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        allowed = (k >= start[b, q]) & (k <= q)
        for level in range(depth):
            from_, to = prefixes[level, 0, b, q], prefixes[level, 1, b, q]
            allowed = allowed | ((k >= from_) & (k < to))
        if window is None:
            return allowed
        return allowed & (position[b, q] - position[b, k] < window)

    return create_block_mask(visible, rows, None, columns, columns, device=str(device))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Sequence[Segment],
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """``[B,heads,T,D]`` and ``[B,kv_heads,T,D]`` -> ``[B,T,heads,D]``.

    Columns in no segment give zeros. Scores are ``softcap * tanh(score / softcap)`` with a
    ``softcap`` (Gemma 2, arXiv:2408.00118, section 2).
    """
    batch, _, time, _ = query.shape
    segments = tuple(segments)

    cap = softcap or 0.0

    def capped(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    out = kernel(query.device)(
        query,
        key,
        value,
        score_mod=capped if cap else None,
        block_mask=block_mask(segments, batch, time, window, query.device),
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    ).transpose(1, 2)
    covered = sum(s.stop - s.start for s in segments)
    if covered == batch * time:
        return out
    inside = torch.zeros(batch, time, dtype=torch.bool)
    for s in segments:
        inside[s.row, s.start : s.stop] = True
    return out * inside.to(out.device)[:, :, None, None]
