"""Training rows of a data set that lies neither in memory nor on the disk, read as steps need them.

At hand are the window that steps are in and the next one, which a thread reads meanwhile. A run
that goes on from a checkpoint trains on what the whole run did.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from align.data.stream_windows import Mark, Window, WindowReader
from align.data.subset import Lazy
from align.types import TokenGroup

RECENT = 100
"""Groups at least that stay at hand behind the newest one: a reward model is normalised on them."""


class TokenStream(Lazy[TokenGroup]):
    """The groups of a run, ``num_groups`` of a stream's beginning, to be asked for in order.

    Going back further than ``behind`` groups is right too, but reads rows again.

    Args:
        behind: Groups at least that stay at hand behind the newest one that was asked for.
    """

    def __init__(self, reader: WindowReader, num_groups: int, *, behind: int) -> None:
        self._reader, self._num_groups = reader, num_groups
        self._behind = max(behind, RECENT)
        self._visits: list[Callable[[Window], None]] = []
        self._next = reader.beginning()
        self._windows: list[Window] = []
        self._newest = -1
        self._ahead: _Ahead | None = None

    def __len__(self) -> int:
        return self._num_groups

    def _item(self, index: int) -> TokenGroup:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        if index < self.mark()["start"]:
            self.go_to(self._reader.beginning())
        while index >= self._next["start"]:
            self._read_next()
            self._forget_before(min(index, self._windows[-1].stop - 1))
        self._forget_before(index)
        if self._ahead is None and self._next["start"] < len(self):
            self._ahead = _Ahead(self._reader, self._next)
        window = next(w for w in self._windows if index < w.stop)
        return window.groups[index - window.start]

    def windows(self) -> Sequence[Window]:
        """Those that lie in memory, at least one."""
        if not self._windows:
            self._read_next()
        return self._windows

    def each_window(self, visit: Callable[[Window], None]) -> None:
        """Let ``visit`` see the windows at hand now, and others whenever they are read."""
        for window in self.windows():
            visit(window)
        self._visits.append(visit)

    @property
    def epoch(self) -> int:
        """Whole passes over the sources before the newest group that was asked for."""
        return next((w.passes for w in self._windows if self._newest < w.stop), 0)

    def mark(self) -> Mark:
        """Where the oldest window at hand begins: to be kept for `go_to`."""
        return self._windows[0].mark if self._windows else self._next

    def go_to(self, mark: Mark) -> None:
        """Forget what is at hand and go on from there."""
        self._windows, self._next, self._newest = [], mark, -1

    def _read_next(self) -> None:
        ahead, self._ahead = self._ahead, None
        # waits in any case: the reader serves one at a time
        found = None if ahead is None else ahead.result(self._next)
        if found is None:
            found = self._reader.read(self._next)
        for visit in self._visits:
            visit(found)
        self._windows.append(found)
        self._next = found.next

    def _forget_before(self, index: int) -> None:
        self._newest = max(self._newest, index)
        needed = self._newest - self._behind + 1
        self._windows = [w for w in self._windows if w.stop > needed]


class _Ahead:
    """One window that a thread reads while steps are done."""

    def __init__(self, reader: WindowReader, mark: Mark) -> None:
        self._mark = mark
        self._found: Window | BaseException | None = None
        self._reader = reader
        # not a daemon: Python's end would tear it out of the tokenizer's own code
        self._thread = threading.Thread(target=self._read, name="align-stream")
        self._thread.start()

    def _read(self) -> None:
        try:
            self._found = self._reader.read(self._mark, wanted=threading.main_thread().is_alive)
        except BaseException as error:
            self._found = error

    def result(self, mark: Mark) -> Window | None:
        """The window at ``mark``, once it is read; None where another one was."""
        self._thread.join()
        if self._mark is not mark:
            return None
        if isinstance(self._found, BaseException):
            raise self._found
        return self._found


def check_groups(
    groups: Sequence[TokenGroup], check: Callable[[Sequence[TokenGroup]], None]
) -> None:
    """``check(groups)``; of a stream every window, when it is read."""
    if isinstance(groups, TokenStream):
        groups.each_window(lambda window: check(window.groups))
    else:
        check(groups)


def at_hand(groups: Sequence[TokenGroup]) -> Sequence[TokenGroup]:
    """All groups; of a stream those that lie in memory."""
    if isinstance(groups, TokenStream):
        return [group for window in groups.windows() for group in window.groups]
    return groups
