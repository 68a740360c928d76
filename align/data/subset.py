"""Fewer rows, chosen by seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def pick(items: Sequence[T], limit: int | None, seed: int) -> tuple[T, ...]:
    """At most ``limit`` items, in their own order; the same ones for the same seed."""
    if limit is None or limit >= len(items):
        return tuple(items)
    chosen = np.random.default_rng([seed, 7]).permutation(len(items))[:limit]
    return tuple(items[i] for i in sorted(chosen.tolist()))
