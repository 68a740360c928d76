"""Which columns of packed rows a segment sees: its own and those of all that it continues."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from align.types import Segment


def columns_seen(segments: Sequence[Segment], columns: int) -> list[np.ndarray]:
    """Of each segment, int64 ``[S]``: in order, its own ones last.

    Row r's columns are numbered from ``r * columns`` on. What a segment continues comes before it.
    """
    seen: dict[tuple[int, int, int], np.ndarray] = {}
    for s in segments:
        own = np.arange(s.start, s.stop) + s.row * columns
        before = seen[s.row, s.prefix_start, s.prefix_stop] if s.prefix_stop else own[:0]
        seen[s.row, s.start, s.stop] = np.concatenate([before, own])
    return [seen[s.row, s.start, s.stop] for s in segments]
