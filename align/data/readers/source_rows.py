"""Rows of sources one after another, from any place on: what `stream.py` reads.

Nothing is kept of a row that was handed out. A state is a few numbers, as JSON has them: to go back
to one, rows of files before it are read over again, and a streamed data set is told where it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from align.config.sections import DataSource
from align.data.sources import BadRow, FilePart, Row, find_parts, open_stream, stream_rows

State: TypeAlias = dict[str, Any]


class SourceRows(Iterator[Row | BadRow]):
    """Iterate over the rows of one source, its files in order.

    Args:
        state: From `state_dict`; None = the beginning.
    """

    def __init__(self, source: DataSource, state: Mapping[str, Any] | None = None) -> None:
        state = state or {}
        # rows that were handed out of this file, of the data set
        self._file, self._done = int(state.get("file", 0)), int(state.get("rows", 0))
        self._source, self._state = source, state.get("state")
        self._dataset: Any = None
        parts = find_parts(source)
        self._rows = self._of_files(parts) if parts else self._of_set()

    def __next__(self) -> Row | BadRow:
        return next(self._rows)

    def state_dict(self) -> State:
        """State before the next row."""
        if hasattr(self._dataset, "state_dict"):
            return {"rows": self._done, "state": self._dataset.state_dict()}
        if self._state is not None:  # not opened yet
            return {"rows": self._done, "state": self._state}
        return {"file": self._file, "rows": self._done}

    def _of_files(self, parts: Sequence[FilePart]) -> Iterator[Row | BadRow]:
        while self._file < len(parts):
            for row in parts[self._file].rows(done=self._done):
                self._done += 1
                yield row
            self._file, self._done = self._file + 1, 0

    def _of_set(self) -> Iterator[Row | BadRow]:
        self._dataset = open_stream(self._source)
        if self._state is not None:
            self._dataset.load_state_dict(self._state)
        for row in stream_rows(self._dataset, self._source, done=self._done):
            self._done += 1
            yield row


class PassRows(Iterator[tuple[int, Row | BadRow | None]]):
    """Iterate once over the rows of several sources, as (number of the source, row).

    (number, None) says that a source has ended.

    Args:
        in_turns: A row of each source in turn as long as it has any; False = one source after
            another.
        state: From `state_dict`; None = the beginning.
    """

    def __init__(
        self,
        sources: Sequence[DataSource],
        *,
        in_turns: bool,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        states = state["sources"] if state else [{}] * len(sources)
        self._in_turns = in_turns
        self._turn = int(state["turn"]) if state else 0
        self._sources = [
            None if at is None else SourceRows(source, at)
            for source, at in zip(sources, states, strict=True)
        ]

    def __next__(self) -> tuple[int, Row | BadRow | None]:
        if not any(rows is not None for rows in self._sources):
            raise StopIteration
        while True:
            number = self._turn % len(self._sources)
            rows = self._sources[number]
            row = None if rows is None else next(rows, None)
            if self._in_turns or row is None:
                self._turn = number + 1
            if row is None and rows is not None:
                self._sources[number] = None
            if rows is not None:
                return number, row

    def state_dict(self) -> State:
        """State before the next row."""
        states = [None if rows is None else rows.state_dict() for rows in self._sources]
        return {"turn": self._turn, "sources": states}
