"""Attention over packed rows: the one place that turns segments into a backend's arguments.

A segment's keys are its own and those of all segments it continues. Segments travel as an extra
keyword of the model's forward to a function registered with transformers' ``AttentionInterface``,
which any architecture on that interface calls. There are three such functions, see `BACKENDS`:

- ``segments`` runs everywhere. Short segments of similar lengths share one padded call, a long one
  has its own: of torch's scaled-dot-product attention, or of matrix products (`cpu`) on a CPU where
  those are faster. So little is computed between neighbours, and a lone segment, which is causal,
  needs no ``[T,T]`` mask; a row may be as long as memory allows.
- ``flash`` takes all segments in one call of a variable-length kernel, on a GPU (`flash`).
- ``flex`` takes a block mask and caps scores without storing them, on a GPU (`flex`).

Decoding, one query per row against a cache, is the same for all.

Refused: attention weights as an output, position biases (ALiBi, T5), attention sinks and sparse
attention (GPT-OSS, DeepSeek 4), and a forward without segments, which would silently attend across
neighbours or padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface

from align.models.attention import cpu, flash, flex
from align.models.attention.segments import columns_seen
from align.types import Segment

BACKENDS = {"segments": "align_segments", "flash": "align_varlen", "flex": "align_blocks"}
"""Name in a recipe -> name in transformers, which reserves every name with "flash" in it."""

WINDOW = "align_window"
"""Attribute of an attention layer: its sliding window, found in its mask (`masks`)."""

UNSUPPORTED = {
    "position_bias": "position biases",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "indices": "sparse attention",
    "block_indices": "sparse attention",
}
"""Arguments of an attention function that change the result and are not supported here."""


class UnpackableError(NotImplementedError):
    """An architecture needs something that attention over packed rows does not do."""


@dataclass(frozen=True)
class DecodeState:
    """Cache columns that each row's one query may attend to.

    Attributes:
        mask: bool ``[rows, columns]``, True = may be attended to.
    """

    mask: Tensor


def require_supported(options: Mapping[str, Any]) -> None:
    """Refuse arguments that change the result of an attention function and are not supported."""
    for name, what in UNSUPPORTED.items():
        if options.get(name) is not None:
            raise UnpackableError(f"it has {what} (`{name}`), which align does not compute")


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
    backend: str = "segments",
    **more: Any,
) -> tuple[Tensor, None]:
    """Attend ``[B,heads,T,D]`` queries to ``[B,kv_heads,S,D]`` keys -> ``[B,T,heads,D]``."""
    require_supported(more)
    if torch.is_autocast_enabled(query.device.type):  # rotary embeddings are float32 there
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    window = getattr(module, WINDOW, sliding_window)
    options = _Options(dropout, scaling or query.shape[-1] ** -0.5, window, softcap)
    if decode is not None:
        return _decode(query, key, value, decode, options), None
    if segments is None:
        raise RuntimeError(f"attention {BACKENDS[backend]!r} was called without segments")
    return _WAYS[backend](query, key, value, tuple(segments), options), None


@dataclass(frozen=True)
class _Options:
    dropout: float
    scale: float
    window: int | None
    softcap: float | None


SHORT = 256
"""Most keys of a segment that shares a call: padding costs less than many small calls."""
STEP = 32
"""Largest difference of lengths, in tokens, inside one padded call."""


@dataclass(frozen=True)
class _Bucket:
    """Segments of one call, as columns of the rows, numbered row after row.

    A lone segment has no padding; several are padded with columns of their own.

    Attributes:
        queries: int64 ``[n,L]``.
        keys: int64 ``[n,S]``.
        mask: bool ``[n,1,L,S]``, True = may be attended to; None for a lone segment, whose mask
            follows from ``before`` and the window.
        before: Query i attends to no key from ``before + i + 1`` on.
    """

    queries: Tensor
    keys: Tensor
    mask: Tensor | None
    before: int


@dataclass(frozen=True)
class _Plan:
    """All calls of one layer, and the place of each column's output.

    Attributes:
        order: int64 ``[B*T]`` index into the buckets' outputs, one after another, followed by one
            row of zeros for padding columns.
    """

    buckets: tuple[_Bucket, ...]
    order: Tensor


@lru_cache(maxsize=16)  # all layers of a forward pass share it
def _plan(
    segments: tuple[Segment, ...], rows: int, columns: int, window: int | None, device: torch.device
) -> _Plan:
    buckets: dict[object, list[tuple[Segment, np.ndarray]]] = {}
    for s, keys in zip(segments, columns_seen(segments, columns), strict=True):
        length, total = s.stop - s.start, len(keys)
        short = (-(-length // STEP), -(-total // STEP)) if total <= SHORT else s
        buckets.setdefault(short, []).append((s, keys))
    order = np.full(rows * columns, -1, dtype=np.int64)
    made, done = [], 0
    for members in buckets.values():
        seen = [keys for _, keys in members]
        lengths = [s.stop - s.start for s, _ in members]
        longest, most = max(lengths), max(map(len, seen))
        for i, (length, keys) in enumerate(zip(lengths, seen, strict=True)):
            first = done + i * longest
            order[keys[len(keys) - length :]] = np.arange(first, first + length)
        done += len(members) * longest
        made.append(_bucket(seen, lengths, longest, most, window, device))
    order[order < 0] = done
    return _Plan(tuple(made), torch.from_numpy(order).to(device))


def _bucket(
    seen: Sequence[np.ndarray],
    lengths: Sequence[int],
    longest: int,
    most: int,
    window: int | None,
    device: torch.device,
) -> _Bucket:
    n = len(seen)
    queries, keys = np.empty((n, longest), np.int64), np.empty((n, most), np.int64)
    for i, (columns, length) in enumerate(zip(seen, lengths, strict=True)):
        queries[i, :length], queries[i, length:] = columns[len(columns) - length :], columns[-1]
        keys[i, : len(columns)], keys[i, len(columns) :] = columns, columns[-1]
    columns_of = torch.from_numpy(queries).to(device), torch.from_numpy(keys).to(device)
    if n == 1:  # its mask would be large, and cached with the plan
        return _Bucket(*columns_of, None, most - longest)
    totals = np.array([len(columns) for columns in seen])[:, None, None]
    before = totals - np.array(lengths)[:, None, None]
    distance = before + np.arange(longest)[:, None] - np.arange(most)
    allowed = (distance >= 0) & (np.arange(most) < totals)
    if window is not None:
        allowed &= distance < window
    # a padding query is discarded, but without a visible key its softmax would be NaN
    allowed[..., 0] |= ~allowed.any(-1)
    mask = torch.from_numpy(allowed[:, None]).to(device)
    return _Bucket(*columns_of, mask, int(before.max()))


def _packed(
    query: Tensor, key: Tensor, value: Tensor, segments: tuple[Segment, ...], options: _Options
) -> Tensor:
    """Attend within segments: ``[B,heads,T,D]`` -> ``[B,T,heads,D]``, zeros outside segments."""
    batch, heads, time, _ = query.shape
    sizes = [t.shape[-1] for t in (query, key, value)]  # values may be smaller (DeepSeek)
    plan = _plan(segments, batch, time, options.window, query.device)
    # one row of all heads per column; embedding, because its backward is fast on every device
    flat = [t.transpose(1, 2).reshape(batch * time, -1) for t in (query, key, value)]
    outputs = []
    for bucket in plan.buckets:
        places = (bucket.queries, bucket.keys, bucket.keys)
        q, k, v = (
            F.embedding(columns, t).unflatten(-1, (-1, size)).transpose(1, 2)
            for columns, t, size in zip(places, flat, sizes, strict=True)
        )
        out = _attend(q, k, v, bucket.mask, options, before=bucket.before)
        outputs.append(out.transpose(1, 2).flatten(2).flatten(0, 1))
    outputs.append(flat[0].new_zeros(1, heads * sizes[2]))
    return F.embedding(plan.order, torch.cat(outputs)).view(batch, time, heads, sizes[2])


def _flash(
    query: Tensor, key: Tensor, value: Tensor, segments: tuple[Segment, ...], options: _Options
) -> Tensor:
    if options.dropout or options.softcap is not None:
        raise NotImplementedError("attention=flash has neither dropout nor capped scores")
    scale, window = options.scale, options.window
    return flash.attend(query, key, value, segments, scale=scale, window=window)


def _flex(
    query: Tensor, key: Tensor, value: Tensor, segments: tuple[Segment, ...], options: _Options
) -> Tensor:
    if options.dropout:
        raise NotImplementedError("attention=flex has no dropout")
    scale, window, softcap = options.scale, options.window, options.softcap
    return flex.attend(query, key, value, segments, scale=scale, window=window, softcap=softcap)


_WAYS = {"segments": _packed, "flash": _flash, "flex": _flex}


def _decode(
    query: Tensor, key: Tensor, value: Tensor, decode: DecodeState, options: _Options
) -> Tensor:
    """Attend one new token per row: ``[R,heads,1,D]`` to ``[R,kv,C,D]`` -> ``[R,1,heads,D]``."""
    rows, heads, _, dim = query.shape
    mask = decode.mask
    if options.window is not None and mask.shape[1] > options.window:
        mask = mask.clone()
        mask[:, : -options.window] = False
    # query heads of one kv head take the place of positions, so that no key is repeated
    grouped = query.view(rows, key.shape[1], -1, dim)
    seen = mask[:, None, None, :]
    if options.softcap is None:
        scale = options.scale
        out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=seen, scale=scale)
    else:
        out = _capped(grouped, key, value, seen, options)
    return out.reshape(rows, 1, heads, -1)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: _Options,
    *,
    before: int,
) -> Tensor:
    """Attend ``[n,heads,L,D]`` queries to ``[n,kv,S,D]`` keys -> ``[n,heads,L,D]``."""
    n, heads, length, _ = query.shape
    kv, total = key.shape[1:3]
    if options.softcap is None and cpu.pays(query, total, options.dropout):
        scale, window = options.scale, options.window
        return cpu.attend(query, key, value, mask, scale, before=before, window=window)
    # grouped queries: kv heads as the batch, their queries as heads; keys expand without a copy
    grouped = query.reshape(n * kv, heads // kv, length, -1)
    key, value = (t.flatten(0, 1)[:, None].expand(-1, heads // kv, -1, -1) for t in (key, value))
    fused = partial(F.scaled_dot_product_attention, dropout_p=options.dropout, scale=options.scale)
    windowed = options.window is not None and total > options.window
    if mask is None and before == 0 and not windowed and options.softcap is None:
        return fused(grouped, key, value, is_causal=True).reshape(n, heads, length, -1)
    if mask is None:
        places = (before, before + length)
        mask = cpu.visible(places, (0, total), options.window, query.device)
    else:
        mask = mask.expand(-1, kv, -1, -1).reshape(n * kv, 1, length, -1)
    if options.softcap is None:
        out = fused(grouped, key, value, attn_mask=mask)
    else:
        out = _capped(grouped, key, value, mask, options)
    return out.reshape(n, heads, length, -1)


def _capped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, options: _Options) -> Tensor:
    """Attend with capped scores (Gemma 2), which no fused kernel on a CPU offers."""
    assert options.softcap is not None
    scores = torch.tanh(query @ key.transpose(-1, -2) * (options.scale / options.softcap))
    scores = (scores.float() * options.softcap).masked_fill(~mask, float("-inf"))
    return F.dropout(scores.softmax(-1), options.dropout).to(value.dtype) @ value


for _backend, _name in BACKENDS.items():
    AttentionInterface.register(_name, partial(segment_attention, backend=_backend))


INSTEAD = "take a decoder such as Llama, Qwen 3, Mistral, Gemma 2, Phi-3, OLMo 2 or GPT-NeoX"


def not_on_the_interface(kind: str) -> str:
    """Say why an architecture that computes its attention by itself is refused."""
    return (
        f"{kind} is not on transformers' attention interface, through which align packs "
        f"sequences; {INSTEAD}"
    )


def own_attention(kind: Any) -> bool:
    """Tell whether a class of transformers models computes its attention by itself."""
    library = str(kind.__module__).startswith("transformers.")
    return library and not kind._can_set_attn_implementation()
