"""Minibatches of a run as an iterator: the training loop asks for the next one, whatever it is.

``stream.TokenStream`` is the other kind, of rows that are not all there.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from align.data.order import EpochOrder, minibatches
from align.data.subset import pick
from align.types import TokenGroup


class Batches(Protocol):
    """Minibatches without end, from any step on.

    Attributes:
        num_rows: Groups of an epoch; of a stream, those of the run.
        epoch: Epochs that lie behind the newest minibatch.
    """

    num_rows: int

    @property
    def epoch(self) -> float: ...

    def __iter__(self) -> Iterator[list[TokenGroup]]: ...

    def state_dict(self) -> dict[str, Any]:
        """State before the next minibatch, as JSON has it."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on there."""
        ...

    def check(self, check: Callable[[Sequence[TokenGroup]], None]) -> None:
        """Let ``check`` see all groups, before the first step that has them."""
        ...

    def at_hand(self) -> Sequence[TokenGroup]:
        """Groups that can be looked at without reading others: all of them if there is a choice."""
        ...

    def sample(self, count: int, seed: int) -> Sequence[TokenGroup]:
        """At most ``count`` groups that were trained on."""
        ...


class EpochBatches(Iterator[list[TokenGroup]]):
    """Minibatches of groups that are all there, epoch after epoch; the last of one may be short.

    Args:
        groups: By index.
        order: In which order an epoch goes through them.
        size: Groups of a minibatch.
    """

    def __init__(self, groups: Sequence[TokenGroup], order: EpochOrder, size: int) -> None:
        self.num_rows = len(groups)
        self._groups, self._order, self._size = groups, order, size
        self.load_state_dict({"step": 0})

    def __next__(self) -> list[TokenGroup]:
        members = next(self._members)
        self._step += 1
        return [self._groups[i] for i in members]

    @property
    def epoch(self) -> float:
        """Epochs that lie behind the newest minibatch."""
        return self._step / math.ceil(self.num_rows / self._size)

    def state_dict(self) -> dict[str, Any]:
        """The step: all else is a function of it."""
        return {"step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on at a step."""
        self._step = int(state["step"])
        self._members = minibatches(
            self.num_rows, self._size, self._order, start=self._step, stop=sys.maxsize
        )

    def check(self, check: Callable[[Sequence[TokenGroup]], None]) -> None:
        """``check`` all groups now."""
        check(self._groups)

    def at_hand(self) -> Sequence[TokenGroup]:
        """All groups."""
        return self._groups

    def sample(self, count: int, seed: int) -> Sequence[TokenGroup]:
        """Groups picked by seed."""
        return pick(self._groups, count, seed)
