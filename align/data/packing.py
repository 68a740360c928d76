"""Token groups -> microbatches under a token budget: the one place that builds a ``TokenBatch``.

Everything of a microbatch lies in one row, prompts once, so there is no padding at all. Nothing is
cut here: a group is placed whole, or gets a microbatch of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from align.types import Segment, TokenBatch, TokenGroup


def collate(groups: Sequence[TokenGroup], *, first_sequence: int = 0) -> TokenBatch:
    """Lay the groups behind one another in one row.

    Args:
        groups: At least one group with at least one token.
        first_sequence: Number of the first continuation; the others count on in order.
    """
    return _one_row(zip(groups, _first_sequences(groups, first_sequence), strict=True))


def pack(groups: Sequence[TokenGroup], *, tokens_per_microbatch: int) -> list[TokenBatch]:
    """First-fit decreasing by length: few microbatches, each within the budget.

    A group longer than the budget gets a microbatch of its own. ``Segment.sequence`` numbers the
    continuations in the caller's order over the whole list, so results can be put back in place.
    """
    numbered = list(zip(groups, _first_sequences(groups, 0), strict=True))
    bins = _first_fit([g.num_tokens for g in groups], tokens_per_microbatch)
    return [_one_row(numbered[i] for i in sorted(members)) for members in bins]


def counted_coordinates(batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Where each counted token belongs, in row-major order.

    Returns:
        ``(sequence, offset)``, int64 ``[N]`` on the batch's device: the number of the continuation,
        and the token's index inside it.
    """
    rows, columns = batch.loss_mask.nonzero(as_tuple=True)
    segment = batch.segment_ids[rows, columns].long() - 1  # segment s is segments[s - 1]
    device = batch.input_ids.device
    sequence = torch.tensor([s.sequence for s in batch.segments], dtype=torch.int64, device=device)
    start = torch.tensor([s.start for s in batch.segments], dtype=torch.int64, device=device)
    return sequence[segment], columns - start[segment]


def _first_sequences(groups: Sequence[TokenGroup], first: int) -> list[int]:
    counts = [len(g.continuations) for g in groups]
    return [first + sum_before for sum_before in np.cumsum([0, *counts])[:-1].tolist()]


def _first_fit(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Bins of indices. Bins too full for the shortest group are no longer looked at."""
    shortest = min(lengths, default=0)
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (bin, free tokens) of the open bins, oldest first
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = next((k for k, (_, free) in enumerate(room) if lengths[i] <= free), None)
        if at is None:
            bins.append([i])
            at, slot = len(room), (len(bins) - 1, budget - lengths[i])
            room.append(slot)
        else:
            which, free = room[at]
            bins[which].append(i)
            room[at] = (which, free - lengths[i])
        if room[at][1] < shortest:
            del room[at]
    return bins


@dataclass(frozen=True)
class _Piece:
    """One segment before it has a place: columns are relative to the piece's own start."""

    input_ids: np.ndarray
    loss_mask: np.ndarray
    segment: Segment
    prefix_id: int  # 1-based segment number, 0 = none


def _pieces(group: TokenGroup, sequence: int, start: int, num_segments: int) -> list[_Piece]:
    """The group's segments, the prefix first, from column ``start`` on."""
    pieces: list[_Piece] = []
    prefix_start, prefix_stop, prefix_id, column = 0, 0, 0, start
    if len(group.prefix_ids):
        prefix_start, prefix_stop = start, start + len(group.prefix_ids)
        prefix_id, column = num_segments + 1, prefix_stop
        uncounted = np.zeros(len(group.prefix_ids), dtype=bool)
        segment = Segment(row=0, start=prefix_start, stop=prefix_stop)
        pieces.append(_Piece(group.prefix_ids, uncounted, segment, 0))
    for k, continuation in enumerate(group.continuations):
        stop = column + len(continuation.input_ids)
        segment = Segment(0, column, stop, prefix_start, prefix_stop, sequence + k)
        pieces.append(_Piece(continuation.input_ids, continuation.loss_mask, segment, prefix_id))
        column = stop
    return pieces


def _one_row(numbered: Iterable[tuple[TokenGroup, int]]) -> TokenBatch:
    pieces: list[_Piece] = []
    for group, sequence in numbered:
        start = pieces[-1].segment.stop if pieces else 0
        pieces += _pieces(group, sequence, start, len(pieces))
    if not pieces:
        raise ValueError("nothing to collate: no group has a token; give at least one group")
    length = pieces[-1].segment.stop
    input_ids = np.concatenate([p.input_ids for p in pieces]).astype(np.int64)
    loss_mask = np.concatenate([p.loss_mask for p in pieces]).astype(bool)
    position_ids = np.empty(length, dtype=np.int64)
    segment_ids = np.empty(length, dtype=np.int32)
    prefix_ids = np.empty(length, dtype=np.int32)
    predictor = np.arange(length, dtype=np.int64) - 1
    for number, piece in enumerate(pieces, start=1):
        s = piece.segment
        len_prefix = s.prefix_stop - s.prefix_start
        position_ids[s.start : s.stop] = len_prefix + np.arange(s.stop - s.start)
        segment_ids[s.start : s.stop] = number
        prefix_ids[s.start : s.stop] = piece.prefix_id
        if s.stop > s.start:
            predictor[s.start] = s.prefix_stop - 1 if len_prefix else s.start
            loss_mask[s.start] &= bool(len_prefix)  # nothing predicts a sequence's first token
    return TokenBatch(
        input_ids=torch.from_numpy(input_ids)[None],
        position_ids=torch.from_numpy(position_ids)[None],
        segment_ids=torch.from_numpy(segment_ids)[None],
        prefix_ids=torch.from_numpy(prefix_ids)[None],
        predictor=torch.from_numpy(predictor)[None],
        loss_mask=torch.from_numpy(loss_mask)[None],
        segments=tuple(p.segment for p in pieces),
    )
