"""Fewer rows, chosen by seed or by number."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TypeVar, overload

import numpy as np

T = TypeVar("T")


def pick(items: Sequence[T], limit: int | None, seed: int) -> tuple[T, ...]:
    """At most ``limit`` items, in their own order; the same ones for the same seed."""
    return tuple(items[i] for i in picked(len(items), limit, seed).tolist())


def picked(count: int, limit: int | None, seed: int) -> np.ndarray:
    """The numbers of `pick`'s items among ``count``, int64, ascending."""
    if limit is None or limit >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng([seed, 7]).permutation(count)[:limit])


class Lazy(Sequence[T]):
    """A sequence whose items are made when they are asked for, one by one, by ``_item``."""

    @abstractmethod
    def _item(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self._item(i) for i in range(*index.indices(len(self)))]
        return self._item(index)
