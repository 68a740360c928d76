"""Windows of a stream: rows in order, pass after pass, tokenised so many at a time.

A window ends where a pass ends; the order of its groups is shuffled by seed. What it holds is a
function of the recipe and its number alone, and the mark of its beginning is enough to read it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from align.config.sections import DataSource
from align.data.examples import OnBadRow, is_held_out
from align.data.formats.columns import Example
from align.data.formats.fields import Kind, check_names
from align.data.readers.source_rows import PassRows, Place
from align.data.sources import BadRow, Row
from align.data.stream_counts import Counts, SourceCounts, examples_of, require_some
from align.data.tokens.chat import LossOn, encode_some
from align.data.tokens.text_ids import Tokenizer
from align.types import AlignError, TokenGroup

Mark: TypeAlias = Mapping[str, Any]
"""Where a window begins and what was counted before it, as JSON has it."""


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
        """Of the first pass up to the window's end: later passes bring the same rows again."""
        return Counts.of(self.next["counts"])


class WindowReader:
    """Reads windows by their marks.

    Args:
        sources: With their columns, as `preferences.with_columns` gives them.
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
            check_names(source.columns)
            if source.weight <= 0:
                raise AlignError(f"{source.path}: weight is {source.weight}, must be above 0")
        self._sources, self._tokenizer = sources, tokenizer
        self._kind, self._size, self._seed = kind, size, seed
        self._shuffled, self._test_fraction = shuffled, test_fraction
        self._on_bad_row: OnBadRow = on_bad_row
        self._encoding: dict[str, Any] = {
            "max_tokens": max_tokens,
            "on_bad_row": on_bad_row,
            "loss_on": loss_on,
        }
        # what is open, and the mark of where it stands
        self._rows = self._open(None)
        self._at: Mark | None = None

    def beginning(self) -> Mark:
        counts = Counts([SourceCounts(source.path) for source in self._sources])
        return _mark(0, 0, 0, 0, None, counts)

    def read(self, mark: Mark, *, wanted: Callable[[], bool] = lambda: True) -> Window:
        """The window that begins at ``mark``; less of it where it is not ``wanted`` any more.

        Raises:
            AlignError: A bad row under ``stop``, a source without a usable row, or none in all of a
                pass.
        """
        if self._at is not mark:
            self._rows = self._open(mark["place"])
        self._at = None  # an error leaves it nowhere
        passes, in_pass, of_pass = int(mark["passes"]), int(mark["in_pass"]), int(mark["passes"])
        counts = Counts.of(mark["counts"])
        groups: list[TokenGroup] = []
        held_out: list[Example] = []
        while len(groups) < self._size and wanted():
            found = self._rows.next()
            if found is None:
                _require_groups(in_pass, counts)
                passes, in_pass, self._rows = passes + 1, 0, self._open(None)
                if groups:
                    break
                continue
            # of later passes nothing is counted
            new, tested = self._of_row(*found, None if passes else counts)
            groups += new
            held_out += tested if mark["number"] == 0 else ()
            in_pass, of_pass = in_pass + len(new), passes
        number, stop = int(mark["number"]), int(mark["start"]) + len(groups)
        self._at = _mark(number + 1, stop, passes, in_pass, self._rows.place(), counts)
        tests = encode_some(self._tokenizer, held_out, **self._encoding)
        if self._shuffled:
            order = np.random.default_rng([self._seed, number]).permutation(len(groups))
            groups = [groups[i] for i in order]
        return Window(groups, of_pass, tests.groups, tests.dropped, mark, self._at)

    def _open(self, place: Mapping[str, Any] | None) -> PassRows:
        return PassRows(self._sources, in_turns=self._shuffled, place=place)

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
    number: int, start: int, passes: int, in_pass: int, place: Place | None, counts: Counts
) -> Mark:
    """Of a window before which lie ``start`` groups, ``in_pass`` of them in its own pass."""
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
