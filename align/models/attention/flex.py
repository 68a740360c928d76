"""Packed attention by torch's flex attention, on a GPU: a block mask and capped scores.

Blocks of 128 by 128 with nothing visible are skipped, so neighbours in a row cost nothing, and a
shared prompt's keys are not copied. Dong et al. 2024, arXiv:2412.05496.

Kept for models that cap their scores (Gemma 2, VaultGemma) on a GPU: the flash kernel of torch 2.13
has no cap, and ``segments`` keeps 9 bytes of each score for the backward pass. With the 8 heads of
Gemma 2 2B and one sequence of 4,096 tokens that is 1.1 GiB a layer, 29 GiB in 26 layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.models.attention.segments import columns_seen
from align.types import Segment

LEVELS = 2
"""Segments that a segment may continue in a chain: an answer its prompt, a prompt a shared opening.

A mask with fewer is padded to as many, and a window is data, so one compiled graph serves all.
"""
RECOMPILATIONS = 64
"""Compiled variants: several models, with and without gradients, few tokens and many. torch stops
at 8 and then stores all scores."""


@lru_cache(maxsize=1)
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    limit = getattr(torch._dynamo.config, "recompile_limit", 0)
    torch._dynamo.config.recompile_limit = max(limit, RECOMPILATIONS)
    # lengths differ between microbatches; a broken graph would store all scores
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def kernel(device: torch.device) -> Any:
    """Return flex attention: compiled on a GPU, else the plain form, which stores all scores."""
    from torch.nn.attention.flex_attention import flex_attention

    return _compiled() if device.type == "cuda" else flex_attention


@lru_cache(maxsize=16)  # all layers of a forward pass share it
def block_mask(
    segments: tuple[Segment, ...],
    rows: int,
    columns: int,
    window: int | None,
    device: torch.device,
) -> Any:
    """Build a BlockMask ``[rows,1,columns,columns]``; columns in no segment see themselves.

    Building it needs a few numbers of 4 bytes for each of its entries.

    Raises:
        NotImplementedError: A segment continues a chain of more than `LEVELS` others.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    parents = {(s.row, s.start, s.stop): s for s in segments}
    own_start = np.arange(columns, dtype=np.int32) * np.ones((rows, 1), np.int32)
    place = np.zeros((rows, columns), np.int32)
    # bounds of the continued segments; (0, 0) is empty
    bounds = np.zeros((LEVELS, 2, rows, columns), np.int32)
    for s, seen in zip(segments, columns_seen(segments, columns), strict=True):
        own = s.row, slice(s.start, s.stop)
        own_start[own] = s.start
        place[own] = np.arange(len(seen) - (s.stop - s.start), len(seen))
        at, level = s, 0
        while at.prefix_stop:
            if level == LEVELS:
                raise NotImplementedError(f"attention=flex: segments behind over {LEVELS} others")
            at = parents[at.row, at.prefix_start, at.prefix_stop]
            bounds[level, 0][own], bounds[level, 1][own] = at.start, at.stop
            level += 1
    # a window of all columns hides nothing
    width = torch.tensor(columns if window is None else window, dtype=torch.int32, device=device)
    first, position, prefixes = (
        torch.from_numpy(array).to(device) for array in (own_start, place, bounds)
    )

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        allowed = (k >= first[b, q]) & (k <= q)
        for level in range(LEVELS):
            after, before = prefixes[level, 0, b, q], prefixes[level, 1, b, q]
            allowed = allowed | ((k >= after) & (k < before))
        return allowed & (position[b, q] - position[b, k] < width)

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
    """Attend ``[B,heads,T,D]`` to ``[B,kv_heads,T,D]`` -> ``[B,T,heads,D]``.

    Columns in no segment give zeros. With a ``softcap``, scores are ``softcap * tanh(score /
    softcap)`` (Gemma 2, arXiv:2408.00118, section 2).
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
