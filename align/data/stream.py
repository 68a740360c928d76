"""Training rows of a data set that lies neither in memory nor on the disk, read as steps need them.

Rows are read in order, pass after pass, and tokenised a window at a time. A window ends where a
pass ends, and the order of its groups is shuffled: what it holds is a function of the recipe and
its number alone, and the mark of its beginning is enough to read it. A run that goes on from a
checkpoint trains on what the whole run did.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from align.config.sections import DataSource
from align.data.examples import OnBadRow, check_source, is_held_out
from align.data.formats.columns import Example
from align.data.formats.fields import Kind
from align.data.readers.source_rows import PassRows
from align.data.sources import BadRow, Row
from align.data.stream_counts import Counts, SourceCounts, examples_of, require_some
from align.data.tokens.chat import LossOn, encode_some
from align.data.tokens.text_ids import Tokenizer
from align.types import AlignError, TokenGroup

Mark: TypeAlias = Mapping[str, Any]
"""State at the beginning of a window: its place and the counts before it, as JSON has it."""

RECENT = 100
"""Groups at least that stay at hand behind the newest one: a reward model is normalised on them."""


class TokenStream(Iterator[list[TokenGroup]]):
    """Minibatches of the beginning of a stream: `batches.Batches` of rows that are read meanwhile.

    At hand are the windows of the newest minibatch, of `RECENT` groups before it, and the next one,
    which a thread reads.

    Args:
        reader: At the first window.
        size: Groups of a minibatch.
        num_rows: Groups of the run, behind which nothing is read.
    """

    def __init__(self, reader: WindowReader, *, size: int, num_rows: int) -> None:
        self._reader, self._size, self.num_rows = reader, size, num_rows
        self._visits: list[Callable[[Window], None]] = []
        self._windows: list[Window] = []
        self._step = 0
        self._ahead: _Ahead | None = None

    def __next__(self) -> list[TokenGroup]:
        stop = (self._step + 1) * self._size
        self._read_up_to(stop)
        self._step += 1
        needed = stop - max(self._size, RECENT)
        self._windows = [w for w in self._windows if w.stop > needed]
        if self._ahead is None and self._windows[-1].stop < self.num_rows:
            self._ahead = _Ahead(self._reader)
        return self._between(stop - self._size, stop)

    @property
    def epoch(self) -> float:
        """Whole passes over the sources before the window of the newest group."""
        done = self._step * self._size
        return float(next((w.passes for w in self._windows if done <= w.stop), 0))

    def state_dict(self) -> dict[str, Any]:
        """The step, and where the oldest window at hand begins."""
        mark = self._windows[0].mark if self._windows else self._reader.state_dict()
        return {"step": self._step, "mark": mark}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Forget what is at hand and go on from there."""
        if self._ahead is not None:
            self._ahead.join()
        self._ahead, self._windows, self._step = None, [], int(state["step"])
        self._reader.load_state_dict(state["mark"])

    def check(self, check: Callable[[Sequence[TokenGroup]], None]) -> None:
        """``check`` every window's groups: those at hand now, others when they are read."""
        self.each_window(lambda window: check(window.groups))

    def each_window(self, visit: Callable[[Window], None]) -> None:
        """Let ``visit`` see the windows at hand now, and others whenever they are read."""
        for window in self.windows():
            visit(window)
        self._visits.append(visit)

    def windows(self) -> Sequence[Window]:
        """Windows that are in memory, at least one."""
        self._read_up_to(1)
        return self._windows

    def at_hand(self) -> Sequence[TokenGroup]:
        """Groups that lie in memory."""
        return [group for window in self.windows() for group in window.groups]

    def sample(self, count: int, seed: int) -> Sequence[TokenGroup]:
        """The newest groups: others would have to be read again."""
        done = self._step * self._size
        self._read_up_to(done)
        return self._between(max(done - count, self._windows[0].start), done)

    def _between(self, start: int, stop: int) -> list[TokenGroup]:
        return [
            group
            for window in self._windows
            for group in window.groups[max(start - window.start, 0) : max(stop - window.start, 0)]
        ]

    def _read_up_to(self, stop: int) -> None:
        while not self._windows or self._windows[-1].stop < stop:
            ahead, self._ahead = self._ahead, None
            found = self._reader.read() if ahead is None else ahead.result()
            for visit in self._visits:
                visit(found)
            self._windows.append(found)


class _Ahead:
    """The next window, which a thread reads while steps are done."""

    def __init__(self, reader: WindowReader) -> None:
        self._found: Window | BaseException | None = None
        self._reader = reader
        # not a daemon: Python's end would tear it out of the tokenizer's own code
        self._thread = threading.Thread(target=self._read, name="align-stream")
        self._thread.start()

    def _read(self) -> None:
        try:
            self._found = self._reader.read(wanted=threading.main_thread().is_alive)
        except BaseException as error:
            self._found = error

    def join(self) -> None:
        """Wait for it: the reader serves one at a time."""
        self._thread.join()

    def result(self) -> Window:
        """The window, once it is read."""
        self.join()
        if isinstance(self._found, BaseException):
            raise self._found
        assert self._found is not None
        return self._found


@dataclass(frozen=True)
class Window:
    """Groups ``start`` to ``stop`` of a stream, in the order in which they are trained on.

    Attributes:
        passes: Whole passes over the sources that lie before it.
        held_out: The first window's rows of the test side; of other windows they are left out.
        dropped_held_out: Of those, rows by reason that could not be used.
        mark: Where it begins; ``next`` is the one behind it.
    """

    groups: Sequence[TokenGroup]
    passes: int
    held_out: Sequence[TokenGroup]
    dropped_held_out: Mapping[str, int]
    mark: Mark
    next: Mark

    @property
    def start(self) -> int:
        return int(self.mark["start"])

    @property
    def stop(self) -> int:
        return self.start + len(self.groups)

    @property
    def counts(self) -> Counts:
        """Counts of the first pass up to the window's end: later passes bring the same rows."""
        return Counts.of(self.next["counts"])


class WindowReader:
    """Reads the windows of a stream one after another, from any of them on.

    Args:
        sources: With their columns, as `examples.with_columns` gives them.
        kind: What rows are read as.
        size: Groups of a window; it ends with a row, so a few more may be in it.
        shuffled: Sources take turns row by row, and a window's groups are shuffled; False = all as
            it is given.
        test_fraction: Share of the prompts that is never trained on, as `split_by_prompt` does it.
        max_tokens, on_bad_row, loss_on: Of `encode_some`.
    """

    def __init__(
        self,
        sources: Sequence[DataSource],
        tokenizer: Tokenizer,
        *,
        kind: Kind,
        size: int,
        seed: int,
        shuffled: bool,
        test_fraction: float,
        max_tokens: int,
        on_bad_row: OnBadRow,
        loss_on: LossOn,
    ) -> None:
        for source in sources:
            check_source(source)
        self._sources, self._tokenizer = sources, tokenizer
        self._kind, self._size, self._seed = kind, size, seed
        self._shuffled, self._test_fraction = shuffled, test_fraction
        self._on_bad_row: OnBadRow = on_bad_row
        self._encoding: dict[str, Any] = {
            "max_tokens": max_tokens,
            "on_bad_row": on_bad_row,
            "loss_on": loss_on,
        }
        counts = Counts([SourceCounts(source.path) for source in sources])
        self._mark: Mark = _mark(0, 0, 0, 0, None, counts)
        # None: to be opened where the mark says
        self._rows: PassRows | None = None

    def state_dict(self) -> Mark:
        """State at the beginning of the next window."""
        return self._mark

    def load_state_dict(self, mark: Mark) -> None:
        """Go on with the window that begins at ``mark``."""
        self._mark, self._rows = mark, None

    def read(self, *, wanted: Callable[[], bool] = lambda: True) -> Window:
        """The next window; less of it where it is not ``wanted`` any more.

        Raises:
            AlignError: A bad row under ``stop``, a source without a usable row, or none in all of a
                pass.
        """
        mark = self._mark
        rows = self._rows or self._open(mark["place"])
        self._rows = None  # an error leaves it at the beginning of its window
        passes, in_pass, of_pass = int(mark["passes"]), int(mark["in_pass"]), int(mark["passes"])
        counts = Counts.of(mark["counts"])
        groups: list[TokenGroup] = []
        held_out: list[Example] = []
        while len(groups) < self._size and wanted():
            found = next(rows, None)
            if found is None:
                _require_groups(in_pass, counts)
                passes, in_pass, rows = passes + 1, 0, self._open(None)
                if groups:
                    break
                continue
            # of later passes nothing is counted
            new, tested = self._of_row(*found, None if passes else counts)
            groups += new
            held_out += tested if mark["number"] == 0 else ()
            in_pass, of_pass = in_pass + len(new), passes
        number, stop = int(mark["number"]), int(mark["start"]) + len(groups)
        self._mark = _mark(number + 1, stop, passes, in_pass, rows.state_dict(), counts)
        self._rows = rows
        tests = encode_some(self._tokenizer, held_out, **self._encoding)
        if self._shuffled:
            order = np.random.default_rng([self._seed, number]).permutation(len(groups))
            groups = [groups[i] for i in order]
        return Window(groups, of_pass, tests.groups, tests.dropped, mark, self._mark)

    def _open(self, place: Mapping[str, Any] | None) -> PassRows:
        return PassRows(self._sources, in_turns=self._shuffled, state=place)

    def _of_row(
        self, number: int, row: Row | BadRow | None, counts: Counts | None
    ) -> tuple[list[TokenGroup], list[Example]]:
        """(groups to train on, examples of the test side); None = the source ends."""
        source = self._sources[number]
        if row is None:
            if counts is not None:
                require_some(counts.sources[number], source, self._kind)
            return [], []
        found = examples_of(
            row,
            source,
            counts.sources[number] if counts is not None else SourceCounts(source.path),
            kind=self._kind,
            on_bad_row=self._on_bad_row,
            seed=self._seed,
        )
        tested = [e for e in found if self._is_tested(e)]
        trained = [e for e in found if not self._is_tested(e)] if tested else found
        tokens = encode_some(self._tokenizer, trained, **self._encoding)
        if counts is not None:
            counts.held_out += len(tested)
            counts.rows += len(set(tokens.owners))
            counts.tokens += sum(group.num_tokens for group in tokens.groups)
            counts.dropped.update(tokens.dropped)
            counts.first_dropped = counts.first_dropped or tokens.first_dropped
        return tokens.groups, tested

    def _is_tested(self, example: Example) -> bool:
        fraction = self._test_fraction
        return fraction > 0 and is_held_out(example, test_fraction=fraction, seed=self._seed)


def _mark(
    number: int,
    start: int,
    passes: int,
    in_pass: int,
    place: Mapping[str, Any] | None,
    counts: Counts,
) -> Mark:
    """Resume state of a window that ``start`` groups precede, ``in_pass`` of them in its epoch."""
    return {
        "number": number,
        "start": start,
        "passes": passes,
        "in_pass": in_pass,
        "place": place,
        "counts": counts.report(),
    }


def _require_groups(in_pass: int, counts: Counts) -> None:
    """Refuse a pass that gave nothing: there would be no end to it."""
    if in_pass:
        return
    why = f"; the first that was dropped: {counts.first_dropped}" if counts.first_dropped else ""
    raise AlignError(
        f"data: no training row is left of {sum(s.num_read for s in counts.sources)} that were "
        f"streamed, {counts.held_out} of them held out{why}"
    )
