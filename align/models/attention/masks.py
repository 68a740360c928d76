"""Windows that a model's attention layers really see, as transformers' own masks say it.

Some architectures hand a sliding window to their attention function, some write it into the mask
alone, some do both. So each layer is run once with a mask that says what it is, and the layer keeps
the window found in it. Masks that are neither causal nor a sliding window (chunks, bidirectional
blocks) are refused.
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
"""As ``segments``, and notes what each layer is given."""
FAR = 2**20
"""Tokens, further than any window that is in use."""


class Record:
    """Masks that the attention layers of one forward pass were given.

    Attributes:
        windows: Attention module -> its window in tokens, None = sees all that precede.
        calls: Of attention functions; a layer may be run more than once.
    """

    def __init__(self) -> None:
        self.windows: dict[nn.Module, int | None] = {}
        self.calls = 0

    def note(self, module: nn.Module, window: int | None) -> None:
        self.calls += 1
        if self.windows.setdefault(module, window) != window:
            raise UnpackableError("one attention layer has two sliding windows")

    def apply(self) -> None:
        """Every layer keeps its window, which counts before what it hands over."""
        for module, window in self.windows.items():
            setattr(module, WINDOW, window)


def window_of(allowed: Callable[..., Tensor], size: int | None) -> int | None:
    """The sliding window of a mask function of transformers, None = sees all that precede.

    Args:
        allowed: ``(batch, head, query, key)`` of integer tensors -> bool, True = may be seen.
        size: What transformers says it is, of a window or a chunk.

    Raises:
        UnpackableError: It is neither causal nor a sliding window.
    """
    zero = torch.zeros((), dtype=torch.int64)
    steps = sorted({0, 1, 2, 3, *(2**i for i in range(2, 20)), *near(size or 1), *near(FAR)})
    distance = torch.tensor([-1, *steps])
    want = distance >= 0 if size is None else (distance >= 0) & (distance < size)
    for first in (0, 1):  # chunks have borders, and a query stands on one side of them
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
    """A causal mask ``[B,1,q,kv]`` that carries its function, and what transformers says of it."""
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
            "it hands no further arguments to its attention layers, which have to know where a "
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
