"""List the columns that a segment of packed rows sees: its own and those it continues."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from align.types import Segment


def columns_seen(segments: Sequence[Segment], columns: int) -> list[np.ndarray]:
    """Return the visible columns of each segment, int64 ``[S]``, in order, its own last.

    The columns of row r are numbered from ``r * columns``. A segment comes after the one it
    continues.
    """
    seen: dict[tuple[int, int, int], np.ndarray] = {}
    for s in segments:
        own = np.arange(s.start, s.stop) + s.row * columns
        before = seen[s.row, s.prefix_start, s.prefix_stop] if s.prefix_stop else own[:0]
        seen[s.row, s.start, s.stop] = np.concatenate([before, own])
    return [seen[s.row, s.start, s.stop] for s in segments]
