"""Read the sliding windows of a model's attention layers from transformers' own masks.

Some architectures pass a sliding window to their attention function, some write it into the mask
alone, some do both. So each layer runs once with a mask that carries its definition, and the layer
keeps the window found in it. Masks that are neither causal nor a sliding window (chunks,
bidirectional blocks) are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from align.models.attention.packed import (
    WINDOW,
    UnpackableError,
    require_supported,
    segment_attention,
)

RECORDED = "align_recorded"
"""Name of an attention function that computes ``segments`` and records each layer's arguments."""
FAR = 2**20
"""Distance in tokens beyond any window in use."""


class Record:
    """Masks given to the attention layers in one forward pass.

    Attributes:
        windows: Attention module -> its window in tokens, None = full causal attention.
        calls: Calls of attention functions; a layer may run more than once.
    """

    def __init__(self) -> None:
        self.windows: dict[nn.Module, int | None] = {}
        self.calls = 0

    def note(self, module: nn.Module, window: int | None) -> None:
        self.calls += 1
        if self.windows.setdefault(module, window) != window:
            raise UnpackableError("one attention layer has two sliding windows")

    def apply(self) -> None:
        """Store each layer's window on the layer; it overrides the window that the layer passes."""
        for module, window in self.windows.items():
            setattr(module, WINDOW, window)


def window_of(allowed: Callable[..., Tensor], size: int | None) -> int | None:
    """Return the sliding window of a transformers mask function, None = full causal attention.

    Args:
        allowed: ``(batch, head, query, key)`` of integer tensors -> bool, True = visible.
        size: Size of the window or chunk, according to transformers.

    Raises:
        UnpackableError: It is neither causal nor a sliding window.
    """
    zero = torch.zeros((), dtype=torch.int64)
    steps = sorted({0, 1, 2, 3, *(2**i for i in range(2, 20)), *near(size or 1), *near(FAR)})
    distance = torch.tensor([-1, *steps])
    want = distance >= 0 if size is None else (distance >= 0) & (distance < size)
    for first in (0, 1):  # chunks have borders: try queries on both sides of one
        query = torch.tensor(4 * FAR + first * ((size or 2) // 2))
        key = query - distance
        if not torch.equal(allowed(zero, zero, query, key).expand_as(want), want):
            raise UnpackableError(
                "its attention mask is neither causal nor a sliding window"
                + (f", but has chunks or blocks of {size}" if size is not None else "")
            )
    return size


def near(size: int) -> range:
    return range(max(0, size - 1), size + 2)


def _mask(
    batch_size: int, q_length: int, kv_length: int, mask_function: Any, **more: Any
) -> Tensor:
    """Make a causal mask ``[B,1,q,kv]`` that carries its function and transformers' size."""
    seen = torch.ones(q_length, kv_length, dtype=torch.bool, device=more.get("device")).tril()
    mask: Any = seen.expand(batch_size, 1, q_length, kv_length)
    mask.function = (mask_function, more.get("local_size"))
    return mask


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    record: Record | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    if record is None:
        raise UnpackableError(
            "it passes no further arguments to its attention layers, which have to know where a "
            "sequence of a packed row begins"
        )
    window = more.pop("sliding_window", None) or None
    if attention_mask is not None:
        if not hasattr(attention_mask, "function"):
            raise UnpackableError("its attention layers make masks or biases of their own")
        window = window_of(*attention_mask.function)
    record.note(module, window)
    if query.device.type == "meta":
        require_supported(more)
        return query.new_empty(*query.shape[:3], value.shape[-1]).transpose(1, 2), None
    more["sliding_window"] = window
    return segment_attention(module, query, key, value, None, *args, **more)


AttentionInterface.register(RECORDED, _attention)
AttentionMaskInterface.register(RECORDED, _mask)
