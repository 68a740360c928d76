"""Slots that hold keys and values of the sequences being decoded.

All slots share one write column. A prompt's keys end at the column at which its slot was filled, so
a slot can be refilled at any time and a row's keys are always one contiguous run that ends at the
write column. Rotary positions are in the keys already; the column has no meaning to the model.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from align.models.attention.packed import DecodeState


class _RecordLayer(CacheLayerMixin):
    """Store keys and values unchanged: a prefill over packed prompts."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        self.keys, self.values = key_states, value_states
        return key_states, value_states

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1


class _SlotLayer(_RecordLayer):
    """Preallocated ``[slots, kv_heads, columns, D]``; a step writes one column in place."""

    length = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        self.keys[:, :, self.length] = key_states[:, :, 0]
        self.values[:, :, self.length] = value_states[:, :, 0]
        self.length += 1
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def reserve(self, first: int, more: int) -> None:
        """Drop the columns before ``first`` and allocate ``more`` new ones."""
        kept = self.length - first
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(*old.shape[:2], kept + more, old.shape[3])
            new[:, :, :kept] = old[:, :, first : self.length]
            setattr(self, name, new)
        self.length = kept


def recording_cache() -> Cache:
    return Cache(layer_class_to_replicate=_RecordLayer)


class SlotCache(Cache):
    """A cache whose slots are filled, refilled and released one by one.

    Attributes:
        starts: int64 ``[slots]``, first column of each slot's sequence.
    """

    GROW = 64

    def __init__(self, num_slots: int, prefill: Cache, columns: int) -> None:
        layers = []
        for recorded in prefill.layers:
            layer = _SlotLayer()
            # under autocast values have its dtype; keys may be float32 after rotation
            for name in ("keys", "values"):
                _, heads, _, size = getattr(recorded, name).shape
                empty = recorded.values.new_zeros((num_slots, heads, columns, size))
                setattr(layer, name, empty)
            layer.length = columns
            layers.append(layer)
        super().__init__(layers=layers)
        self.starts = torch.full((num_slots,), columns, dtype=torch.int64)

    @property
    def length(self) -> int:
        return self.layers[0].length

    def fill(self, slots: list[int], prefill: Cache, prompts: list[list[int]]) -> None:
        """Copy columns ``prompts[i]`` of a packed prefill into ``slots[i]``, up to the write
        column.
        """
        longest = max(len(columns) for columns in prompts)
        if longest > self.length:
            self._shift(longest - self.length)
        end = self.length
        # right-aligned; columns before a shorter prompt are before its start, so never read
        index = torch.zeros(len(slots), longest, dtype=torch.int64)
        for i, columns in enumerate(prompts):
            index[i, longest - len(columns) :] = torch.tensor(columns)
        device = prefill.layers[0].keys.device
        index, where = index.to(device), torch.tensor(slots, device=device)
        for layer, recorded in zip(self.layers, prefill.layers, strict=True):
            for name in ("keys", "values"):
                rows = getattr(recorded, name)[0][:, index].transpose(0, 1)
                kept = getattr(layer, name)
                kept[where, :, end - longest : end] = rows.to(kept.dtype)
        for slot, columns in zip(slots, prompts, strict=True):
            self.starts[slot] = end - len(columns)

    def release(self, slot: int) -> None:
        """Mark a slot as empty until it is filled again."""
        self.starts[slot] = self.length

    def keep(self, slots: Tensor) -> None:
        """Drop every slot that is not listed, and the columns that none of the others uses."""
        self.starts = self.starts[slots]
        unused = int(self.starts.min())
        for layer in self.layers:
            layer.keys = layer.keys[:, :, unused:][slots]
            layer.values = layer.values[:, :, unused:][slots]
            layer.length -= unused
        self.starts -= unused

    def next_step(self) -> DecodeState:
        """Reserve one more column and return the columns that each slot may attend to."""
        if self.length == self.layers[0].keys.shape[2]:
            # refilled slots start further right, so the first columns may be unused
            unused = int(self.starts.min())
            for layer in self.layers:
                layer.reserve(unused, self.GROW)
            self.starts -= unused
        columns = torch.arange(self.length + 1)
        mask = columns[None] >= self.starts[:, None]
        return DecodeState(mask.to(self.layers[0].keys.device))

    def _shift(self, by: int) -> None:
        """Move all columns right by ``by``, so that a longer prompt fits before the write
        column.
        """
        for layer in self.layers:
            for name in ("keys", "values"):
                old = getattr(layer, name)
                new = old.new_zeros(*old.shape[:2], old.shape[2] + by, old.shape[3])
                new[:, :, by:] = old
                setattr(layer, name, new)
            layer.length += by
        self.starts += by
