"""Rows of sources one after another, from any place on: what `stream.py` reads.

Nothing is kept of a row that was handed out. A place is a few numbers, as JSON has them: to go back
to one, rows of files before it are read over again, and a streamed data set is told where it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from align.config.sections import DataSource
from align.data.sources import BadRow, FilePart, Row, find_parts, open_stream, stream_rows

Place: TypeAlias = dict[str, Any]


class SourceRows:
    """The rows of one source, its files in order.

    Args:
        place: Of `place`; None = the beginning.
    """

    def __init__(self, source: DataSource, place: Mapping[str, Any] | None = None) -> None:
        place = place or {}
        # rows that were handed out of this file, of the data set
        self._file, self._done = int(place.get("file", 0)), int(place.get("rows", 0))
        self._source, self._state = source, place.get("state")
        self._dataset: Any = None
        parts = find_parts(source)
        self._rows = self._of_files(parts) if parts else self._of_set()

    def next(self) -> Row | BadRow | None:
        """None = there is no more."""
        return next(self._rows, None)

    def place(self) -> Place:
        """Where the next row stands."""
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


class PassRows:
    """One pass over the rows of several sources.

    Args:
        in_turns: A row of each source in turn as long as it has any; False = one source after
            another.
        place: Of `place`; None = the beginning.
    """

    def __init__(
        self,
        sources: Sequence[DataSource],
        *,
        in_turns: bool,
        place: Mapping[str, Any] | None = None,
    ) -> None:
        places = place["sources"] if place else [{}] * len(sources)
        self._in_turns = in_turns
        self._turn = int(place["turn"]) if place else 0
        self._sources = [
            None if at is None else SourceRows(source, at)
            for source, at in zip(sources, places, strict=True)
        ]

    def next(self) -> tuple[int, Row | BadRow | None] | None:
        """(number of the source, row); (number, None) where it ends; None = all have ended."""
        if not any(self._sources):
            return None
        while True:
            number = self._turn % len(self._sources)
            rows = self._sources[number]
            row = None if rows is None else rows.next()
            if self._in_turns or row is None:
                self._turn = number + 1
            if row is None and rows is not None:
                self._sources[number] = None
            if rows is not None:
                return number, row

    def place(self) -> Place:
        """Where the next row stands."""
        places = [None if rows is None else rows.place() for rows in self._sources]
        return {"turn": self._turn, "sources": places}
