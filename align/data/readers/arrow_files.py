"""Parquet and Arrow files -> values of rows, a few at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from align.base.console import reason_in_line
from align.base.files import Unreadable
from align.data.readers.rows import MAX_CHARS, unless_too_long

BATCH = 1024
"""Rows that are Python values at a time."""


def read_parquet(path: Path) -> Iterator[Mapping[str, Any] | None]:
    """Values of each row; None for a row that is too long."""
    from pyarrow import parquet

    with _arrow_errors():
        file = parquet.ParquetFile(path)
        for group in range(file.num_row_groups):  # asked for all of them, it keeps what it has read
            for batch in file.iter_batches(BATCH, row_groups=[group]):
                yield from _values(batch)


def read_arrow(path: Path) -> Iterator[Mapping[str, Any] | None]:
    """Read both of Arrow's formats: the stream, which ``datasets`` writes, and the file."""
    import pyarrow

    with _arrow_errors(), pyarrow.memory_map(str(path)) as stream:
        try:
            batches: Iterable[Any] = pyarrow.ipc.open_stream(stream)
        except pyarrow.ArrowInvalid:
            reader = pyarrow.ipc.open_file(stream)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        for batch in batches:
            # a broken offset would read memory that is not the file's
            batch.validate(full=True)
            yield from _values(batch)


def _values(batch: Any) -> Iterator[Mapping[str, Any] | None]:
    """A few rows at a time: a file may be one batch, and Python's values are larger."""
    for start in range(0, batch.num_rows, BATCH):
        rows = batch.slice(start, BATCH)
        if rows.nbytes <= MAX_CHARS:  # so no row of them is too long
            yield from rows.to_pylist()
            continue
        for number in range(rows.num_rows):
            row = rows.slice(number, 1)
            # UTF-8 takes four bytes a character at most; a category's names count in every row
            if row.nbytes > 4 * MAX_CHARS and not _has_categories(row):
                yield None
            else:
                yield from map(unless_too_long, row.to_pylist())


def _has_categories(batch: Any) -> bool:
    return any(str(field.type).startswith("dictionary") for field in batch.schema)


@contextmanager
def _arrow_errors() -> Iterator[None]:
    """Arrow raises its own errors, and Python's where a value has no Python form."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, ValueError, OverflowError, TypeError) as error:
        raise Unreadable(reason_in_line(error)) from error
