"""Order of the training rows: a pure function of (seed, step), so nothing of it is saved.

A resumed run and ``align data trace`` work out the same order again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeAlias

import numpy as np

Order: TypeAlias = Literal["shuffled", "given", "shortest_first"]

EpochOrder: TypeAlias = Callable[[int], "np.ndarray | range"]
"""Epoch, from 0 -> the rows' numbers in their order, each once."""


def epoch_order(order: Order, lengths: Sequence[int] | np.ndarray, seed: int) -> EpochOrder:
    """
    Args:
        order: ``shuffled``, another one each epoch; ``given``, sources and files as they are
            listed and rows as they stand; ``shortest_first``, equal ones as given.
        lengths: Tokens of each row.
    """
    if order == "given":
        return lambda epoch: np.arange(len(lengths))
    if order == "shortest_first":
        return lambda epoch: np.argsort(lengths, kind="stable")
    return lambda epoch: np.random.default_rng([seed, epoch]).permutation(len(lengths))


def minibatches(
    num_rows: int, size: int, order: EpochOrder, *, start: int, stop: int
) -> Iterator[list[int]]:
    """Members of steps ``start`` to ``stop``; the last minibatch of an epoch may be short."""
    per_epoch = math.ceil(num_rows / size)
    epoch = -1
    rows: np.ndarray | range = range(0)
    for step in range(start, stop):
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            rows = order(epoch)
        at = (step % per_epoch) * size
        yield [int(row) for row in rows[at : at + size]]


def prompt_batch(num_prompts: int, size: int, order: EpochOrder, iteration: int) -> list[int]:
    """The prompts of one PPO iteration, always ``size``: an epoch may end in the middle of it."""
    start = iteration * size
    orders: dict[int, np.ndarray | range] = {}
    members = []
    for position in range(start, start + size):
        epoch = position // num_prompts
        if epoch not in orders:
            orders[epoch] = order(epoch)
        members.append(int(orders[epoch][position % num_prompts]))
    return members
