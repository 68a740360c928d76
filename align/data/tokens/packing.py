"""Token groups -> microbatches under a token budget: the one place that builds a ``TokenBatch``.

Everything of a microbatch lies in one row, prompts once, so there is no padding at all. What all
groups open with (the system prompt, the instruction) is computed once for the row. Nothing is cut
here: a group is placed whole, or gets a microbatch of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from align.data.tokens.groups import TokenGroups
from align.types import Segment, TokenBatch, TokenGroup

T = TypeVar("T")

SHORTEST_OPENING = 8
"""Tokens: sharing fewer saves less than the longer keys of every segment cost."""


def collate(groups: Sequence[TokenGroup]) -> TokenBatch:
    """Lay the groups, at least one with at least one token, behind one another in one row."""
    return _one_row(zip(groups, _first_sequences(groups), strict=True), _opening(groups))


def pack(groups: Sequence[TokenGroup], *, tokens_per_microbatch: int) -> list[TokenBatch]:
    """First-fit decreasing by length: few microbatches, each within the budget.

    A group longer than the budget gets a microbatch of its own. ``Segment.sequence`` numbers the
    continuations in the caller's order over the whole list, so results can be put back in place.
    """
    numbered = list(zip(groups, _first_sequences(groups), strict=True))
    opening = _opening(groups)
    costs = [_cost(group, len(opening)) for group in groups]
    bins = _first_fit(costs, tokens_per_microbatch - len(opening))
    return [_one_row((numbered[i] for i in sorted(members)), opening) for members in bins]


def longest_sequence(group: TokenGroup) -> int:
    """Tokens of the prefix and the longest continuation."""
    return len(group.prefix_ids) + max((len(c.input_ids) for c in group.continuations), default=0)


def longest_of(groups: Sequence[TokenGroup]) -> int:
    """`longest_sequence` of the longest group."""
    if isinstance(groups, TokenGroups):
        return groups.longest_sequence()
    return max((longest_sequence(group) for group in groups), default=0)


WINDOW = 4096
"""Groups that are packed together where a whole data set is gone through."""


def windows(items: Sequence[T], size: int = WINDOW) -> Iterator[Sequence[T]]:
    """Parts of a long list, in order: not all batches of a data set at once."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def counted_coordinates(batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Locate each counted token, in row-major order.

    Returns:
        ``(sequence, offset)``, int64 ``[N]`` on the batch's device: the number of the continuation,
        and the token's index inside it.
    """
    rows, columns = batch.loss_mask.nonzero(as_tuple=True)
    segment = batch.segment_ids[rows, columns].long() - 1  # segment s is segments[s - 1]
    device = batch.input_ids.device
    sequence = torch.tensor([s.sequence for s in batch.segments], dtype=torch.int64, device=device)
    first = [s.start - s.offset for s in batch.segments]
    start = torch.tensor(first, dtype=torch.int64, device=device)
    return sequence[segment], columns - start[segment]


def path(batch: TokenBatch, segment: Segment) -> list[int]:
    """Columns of a segment and of all that it continues, in the order of its tokens."""
    by_bounds = {(s.row, s.start, s.stop): s for s in batch.segments}
    columns: list[int] = []
    at: Segment | None = segment
    while at is not None:
        columns = [*range(at.start, at.stop), *columns]
        at = by_bounds[at.row, at.prefix_start, at.prefix_stop] if at.prefix_stop else None
    return columns


KEYS_PER_TOKEN = 4
"""Keys that attention may copy for each token of the budget: what many short answers to one long
prompt share, every one of them has copies of."""


def _cost(group: TokenGroup, opening: int) -> int:
    """Tokens of the budget that a group takes: its own, or its segments' keys if these are many."""
    # a continuation without a prompt begins with the opening itself
    keys = len(group.prefix_ids) * (1 + len(group.continuations))
    keys += sum(len(c.input_ids) for c in group.continuations)
    return max(group.num_tokens - opening, math.ceil(keys / KEYS_PER_TOKEN))


def _first_sequences(groups: Sequence[TokenGroup]) -> list[int]:
    """Number of each group's first continuation."""
    return np.cumsum([0, *(len(g.continuations) for g in groups)])[:-1].tolist()


def _opening(groups: Sequence[TokenGroup]) -> np.ndarray:
    """The uncounted tokens that all groups begin with, int32; empty where it would not pay."""
    nothing = np.zeros(0, dtype=np.int32)
    if len(groups) < 2:
        return nothing
    heads = [_uncounted_head(group) for group in groups]
    length = min(len(head) for head in heads)
    if length < SHORTEST_OPENING:
        return nothing
    same = np.all(np.stack([head[:length] for head in heads]) == heads[0][:length], axis=0)
    length = length if same.all() else int(same.argmin())
    return heads[0][:length] if length >= SHORTEST_OPENING else nothing


def _uncounted_head(group: TokenGroup) -> np.ndarray:
    """Return what may be shared of a group's beginning: each segment keeps a token of its own."""
    if len(group.prefix_ids):
        return group.prefix_ids[:-1]
    if len(group.continuations) != 1:
        return group.prefix_ids
    only = group.continuations[0]
    uncounted = len(only.loss_mask) if not only.loss_mask.any() else int(only.loss_mask.argmax())
    return only.input_ids[: min(uncounted, len(only.input_ids) - 1)]


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


def _pieces(group: TokenGroup, sequence: int, start: int, opening: int) -> list[_Piece]:
    """The group's segments, the prefix first, from column ``start`` on.

    ``opening`` tokens of the group already stand in the row's first segment.
    """
    pieces: list[_Piece] = []
    prefix_start, prefix_stop, column = 0, opening, start
    if len(group.prefix_ids):
        own = group.prefix_ids[opening:]
        segment = Segment(0, start, start + len(own), prefix_start, prefix_stop)
        pieces.append(_Piece(own, np.zeros(len(own), dtype=bool), segment))
        prefix_start, prefix_stop, opening = segment.start, segment.stop, 0
        column = segment.stop
    for k, continuation in enumerate(group.continuations):
        ids, mask = continuation.input_ids[opening:], continuation.loss_mask[opening:]
        stop = column + len(ids)
        segment = Segment(0, column, stop, prefix_start, prefix_stop, sequence + k, opening)
        pieces.append(_Piece(ids, mask, segment))
        column = stop
    return pieces


def _one_row(numbered: Iterable[tuple[TokenGroup, int]], opening: np.ndarray) -> TokenBatch:
    pieces: list[_Piece] = []
    if len(opening):
        uncounted = np.zeros(len(opening), dtype=bool)
        pieces.append(_Piece(opening, uncounted, Segment(0, 0, len(opening))))
    for group, sequence in numbered:
        start = pieces[-1].segment.stop if pieces else 0
        pieces += _pieces(group, sequence, start, len(opening))
    if not pieces:
        raise ValueError("nothing to collate: no group has a token; give at least one group")
    length = pieces[-1].segment.stop
    input_ids = np.concatenate([p.input_ids for p in pieces]).astype(np.int64)
    loss_mask = np.concatenate([p.loss_mask for p in pieces]).astype(bool)
    position_ids = np.empty(length, dtype=np.int64)
    segment_ids = np.empty(length, dtype=np.int32)
    predictor = np.arange(length, dtype=np.int64) - 1
    for number, piece in enumerate(pieces, start=1):
        s = piece.segment
        before = int(position_ids[s.prefix_stop - 1]) + 1 if s.prefix_stop else 0
        position_ids[s.start : s.stop] = before + np.arange(s.stop - s.start)
        segment_ids[s.start : s.stop] = number
        if s.stop > s.start:
            predictor[s.start] = s.prefix_stop - 1 if s.prefix_stop else s.start
            loss_mask[s.start] &= bool(s.prefix_stop)  # nothing predicts a sequence's first token
    return TokenBatch(
        input_ids=torch.from_numpy(input_ids)[None],
        position_ids=torch.from_numpy(position_ids)[None],
        segment_ids=torch.from_numpy(segment_ids)[None],
        predictor=torch.from_numpy(predictor)[None],
        loss_mask=torch.from_numpy(loss_mask)[None],
        segments=tuple(p.segment for p in pieces),
    )
