"""CSV and TSV files -> rows. A cell with nothing in it is null; no cell is ever cut or guessed.

Spreadsheets export more than they show: lines of separators alone, and columns without a name
behind the last one. Both are passed over as long as nothing is in them.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from align.data.readers.rows import MAX_CHARS, BadRow, Row, not_utf8, too_long
from align.types import AlignError

PIECE = 1 << 16
"""Characters at a time of a row that is skipped."""
NAMES = {"\t": "tabs", ";": "semicolons", ",": "commas"}
CUT_OFF = "breaks off inside a quoted cell"


def read_csv(stream: IO[bytes], path: Path, separator: str) -> Iterator[Row | BadRow]:
    """Rows under the names of the first line that has any."""
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    csv.field_size_limit(2**31 - 1)  # `_Table` bounds them
    table = _Table(text, separator)
    records = _records(table, path)
    at, header = next((record for record in records if not _is_blank(record[1])), (1, []))
    if header is None:
        raise AlignError(f"{path}:{at}: its header is longer than {MAX_CHARS:,} characters")
    _check_header(header, path, at, separator)
    # a column without a name is called as pandas calls it; behind the last name there is none
    names = [name if name.strip() else f"Unnamed: {i}" for i, name in enumerate(header)]
    num_named = max((i for i, name in enumerate(header, start=1) if name.strip()), default=0)
    for line, cells in records:
        where = f"{path}:{line}"
        if cells is None:
            yield too_long(where)
        elif _is_blank(cells):
            continue
        elif isinstance(cells, str):
            advice = "the file is cut off there, or the cell lacks its last quote: mend the line"
            if _hides_rows(table.record, len(header), separator):
                raise _stray_quote(path, line, "unexpected end of data")
            yield BadRow(where, "row", cells, advice)
        elif len(cells) != len(header):
            advice = (
                f"it has {len(cells)} cells and the header {len(header)}: quote the "
                f"{NAMES[separator]}, or mend a line that is cut off"
            )
            yield BadRow(where, "row", "wrong number of cells", advice)
        elif not _is_blank(cells[num_named:]):
            shown = next(cell for cell in cells[num_named:] if cell.strip())
            advice = f"{shown!r:.40}: quote the {NAMES[separator]} of the line, or name the column"
            yield BadRow(where, "row", "a cell behind the last column that has a name", advice)
        elif any("\udc80" <= c <= "\udcff" for c in "".join(cells)):
            yield not_utf8(where, "a byte that no character has")
        else:
            values = (cell if cell.strip() else None for cell in cells)
            yield Row(dict(zip(names[:num_named], values, strict=False)), where)


def _is_blank(cells: list[str] | str | None) -> bool:
    """Tell whether a record has no cell with a value; one that is too long or cut off has one."""
    return isinstance(cells, list) and not any(cell.strip() for cell in cells)


class _TooLong(Exception):
    """The record that is being read passes `MAX_CHARS`."""


class _Table:
    """Lines for ``csv.reader``; ``record`` keeps those of the record that is being read."""

    def __init__(self, text: IO[str], separator: str) -> None:
        self.text, self.separator = text, separator
        self.record: list[str] = []
        self.line, self.chars = 0, 0
        self._at_start = True  # of a line

    def __iter__(self) -> _Table:
        return self

    def __next__(self) -> str:
        line = self._read(MAX_CHARS + 1 - self.chars)
        if not line:
            raise StopIteration
        self.record.append(line)
        self.chars += len(line)
        if self.chars > MAX_CHARS:
            raise _TooLong
        return line

    def begin(self) -> int:
        """Forget the last record; return the number of the line that the next one begins in."""
        self.record, self.chars = [], 0
        return self.line + 1

    def skip_rest(self) -> None:
        """Go on behind the end of a record that is too long, without keeping it."""
        end = _End(self.separator)
        for piece in self.record:
            end.read(piece)
        while not (self._at_start and end.state == START):
            piece = self._read(PIECE)
            if not piece:
                return
            end.read(piece)

    def _read(self, most: int) -> str:
        piece = self.text.readline(most)
        if piece:
            self.line += self._at_start
            self._at_start = piece[-1] in "\r\n"
        return piece


START, PLAIN, QUOTED, CLOSED = range(4)


class _End:
    """Find the ends of a record's pieces in its cells, as ``csv`` reads them.

    A quote that does not begin a cell is text, and two of them in a quoted cell are one.
    """

    def __init__(self, separator: str) -> None:
        self.state = START
        self._ends_cell = re.compile(f"[{separator}\r\n]")

    def read(self, piece: str) -> None:
        at = 0
        while at < len(piece):
            if self.state == QUOTED:
                at = piece.find('"', at) + 1
                if not at:
                    return
                self.state = CLOSED
            elif self.state == CLOSED or (self.state == START and piece[at] == '"'):
                is_quote = piece[at] == '"'
                self.state, at = (QUOTED, at + 1) if is_quote else (PLAIN, at)
            else:
                found = self._ends_cell.search(piece, at)
                self.state = START if found else PLAIN
                at = found.end() if found else len(piece)


def _records(table: _Table, path: Path) -> Iterator[tuple[int, list[str] | str | None]]:
    """(first line, cells) of each record: None if it is too long, text if the file ends in it."""
    # strict: else a cell that begins with a stray quote would swallow the lines up to the next one
    reader = csv.reader(table, delimiter=table.separator, strict=True)
    while True:
        line = table.begin()
        try:
            yield line, next(reader)
        except StopIteration:
            return
        except _TooLong:
            table.skip_rest()
            yield line, None
        except csv.Error as error:
            if "unexpected end of data" in str(error):
                yield line, CUT_OFF
                return
            raise _stray_quote(path, table.line, str(error)) from error


def _stray_quote(path: Path, line: int, error: str) -> AlignError:
    return AlignError(
        f"{path}:{line}: {error}: a cell that begins with a quote ends with one; "
        "write quotes inside it twice, and quote a cell that begins with one"
    )


def _hides_rows(record: list[str], num_cells: int, separator: str) -> bool:
    """Tell whether a cell that never ends holds lines that are rows: its quote is a stray one."""
    for line in record[1:]:
        try:
            (cells,) = csv.reader([line], delimiter=separator, strict=True)
        except (csv.Error, ValueError):
            continue
        if len(cells) == num_cells:
            return True
    return False


def _check_header(header: Any, path: Path, line: int, separator: str) -> None:
    if isinstance(header, str):
        raise _stray_quote(path, line, "unexpected end of data")
    other = next((s for s in ";\t," if len(header) == 1 and s in header[0]), None)
    if other:
        raise AlignError(
            f"{path}:{line}: its cells are separated by {NAMES[other]}, not by {NAMES[separator]}; "
            "save it with commas (.csv) or tabs (.tsv)"
        )
    twice = next((name for name in header if name.strip() and header.count(name) > 1), None)
    if twice:
        raise AlignError(f"{path}:{line}: two columns are called {twice!r}; rename one of them")
