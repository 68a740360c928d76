"""Rows that are in memory already: a list of dicts, or a data set of Hugging Face ``datasets``.

A recipe is plain text, so it names such rows and the rows themselves are given beside it:

    with given(dataset) as path:      # "<data>"
        load_examples([DataSource(path=path)], kind="sft")

Row 3 is called ``data[3]`` in messages, ids and reports.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from align.base.console import reason_in_line
from align.config.sections import DataSource
from align.data.readers.rows import BadRow, Row, object_row, too_long, unless_too_long
from align.data.readers.values import NotPlainError, from_line, plain, to_line
from align.types import AlignError


@dataclass
class _Given:
    """Rows of one name; ``written`` has those of a split that are gone through once."""

    rows: Any
    written: dict[str, _Written] = field(default_factory=dict)
    folders: ExitStack = field(default_factory=ExitStack)


_GIVEN: dict[str, _Given] = {}
"""Path of a recipe -> the rows that were given for it."""

BATCH = 1000
"""Rows that are hashed at a time."""


@contextmanager
def given(rows: Any, name: str = "data") -> Iterator[str]:
    """Yield the path under which recipes find ``rows`` as long as the context is open.

    Args:
        rows: A sequence of mappings, a ``datasets.Dataset`` or ``IterableDataset``, or a mapping of
            split names to these (``DatasetDict``).
        name: What messages call them; several at a time need names of their own.

    Raises:
        AlignError: It is none of these.
    """
    path = f"<{name}>"
    if path in _GIVEN:
        raise AlignError(f"{name}: rows of this name are in use already; give them another name")
    if (
        isinstance(rows, str | bytes)
        or not isinstance(rows, Iterable)
        or isinstance(rows, Iterator)
    ):
        raise AlignError(
            f"{name}: is of type {type(rows).__name__}; wanted a path, a list of dicts, or a data "
            "set of Hugging Face datasets"
        )
    _GIVEN[path] = _Given(rows)
    try:
        with _GIVEN[path].folders:
            yield path
    finally:
        del _GIVEN[path]


def is_given(source: DataSource) -> bool:
    """Tell whether a source's rows are in memory: its path is one that `given` has made.

    Raises:
        AlignError: They were, in another process or earlier.
    """
    name = source.path
    if name.startswith("<") and name.endswith(">") and name not in _GIVEN:
        raise AlignError(
            f"data: {name} names rows that a program held in memory; call it again with them, or "
            "save them to a file and name that"
        )
    return name in _GIVEN


def open_given(source: DataSource) -> Any:
    """The rows of a source, of its split where there are several.

    Tensors of a format of ``datasets`` become Python values again; a transform of the user's own,
    and a choice of columns, decide what the rows are and stay.
    """
    rows, name = _GIVEN[source.path].rows, source.path[1:-1]
    if isinstance(rows, Mapping):
        if source.split not in rows:
            raise AlignError(f"{name}: has no split {source.split}; it has {', '.join(rows)}")
        rows = rows[source.split]
    elif source.split != "train":
        raise AlignError(
            f"{name}: split={source.split}: these rows are in memory and have no splits; give the "
            "part that is meant"
        )
    if not hasattr(rows, "with_format") or _is_transformed(rows):
        return rows
    own = getattr(rows, "format", None)  # an IterableDataset has none
    if own and not own["output_all_columns"] and set(own["columns"]) != set(rows.column_names):
        rows = rows.select_columns(own["columns"])
    return rows.with_format(None)


def _is_transformed(rows: Any) -> bool:
    """Tell whether a ``Dataset`` has the user's transform, which may differ at each reading."""
    own = getattr(rows, "format", None) if hasattr(rows, "with_format") else None
    return own is not None and own["type"] == "custom"


def open_whole(source: DataSource) -> Any:
    """The rows of `open_given`, the same in each reading: what may change is read once, to disk."""
    rows, of_source = open_given(source), _GIVEN[source.path]
    if isinstance(rows, Sequence) or (hasattr(rows, "select") and not _is_transformed(rows)):
        return rows
    if source.split not in of_source.written:
        of_source.written[source.split] = _write(rows, source, of_source.folders)
    return of_source.written[source.split]


@dataclass(frozen=True)
class _Written:
    """Rows in a temporary file, and the hash of what stands there."""

    path: Path
    sha256: str
    name: str

    def __iter__(self) -> Iterator[Row | BadRow]:
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines):
                where = f"{self.name}[{number}]"
                value = from_line(line)
                yield BadRow(where, *value) if isinstance(value, list) else Row(value, where)


def _write(rows: Any, source: DataSource, folders: ExitStack) -> _Written:
    """Go through rows once; their file is removed with ``folders``."""
    digest = hashlib.sha256()
    try:
        folder = folders.enter_context(tempfile.TemporaryDirectory(prefix="align-rows-"))
        path = Path(folder) / "rows.jsonl"
        with path.open("wb") as file:
            for line in _lines(rows, source):
                digest.update(line)
                file.write(line)
    except OSError as error:
        raise AlignError(
            f"{source.path[1:-1]}: cannot be kept in {tempfile.gettempdir()}: "
            f"{reason_in_line(error)}; set TMPDIR to a folder with room, or data.streaming"
        ) from error
    return _Written(path, digest.hexdigest(), source.path[1:-1])


def _lines(rows: Any, source: DataSource) -> Iterator[bytes]:
    """A line of JSON for each row as it is read."""
    for row in read_given(rows, source):
        if isinstance(row, BadRow):
            yield to_line([row.field, row.reason, row.advice])
        else:
            yield to_line(row.values)


def read_given(rows: Any, source: DataSource, *, done: int = 0) -> Iterator[Row | BadRow]:
    """Rows of what `open_given` or `open_whole` opened; ``done`` rows of it were read before.

    A list and a ``Dataset`` begin behind them; an ``IterableDataset`` was told where it was.
    """
    if isinstance(rows, _Written):
        yield from rows
        return
    name = source.path[1:-1]
    if done and hasattr(rows, "select"):
        rows = rows.select(range(done, len(rows))) if done < len(rows) else ()
    elif done and isinstance(rows, Sequence):
        rows = rows[done:]
    found: Iterator[Any] | None = None
    for number in count(done):
        where = f"{name}[{number}]"
        try:
            found = iter(rows) if found is None else found
            row = _row(next(found), where)
        except StopIteration:
            return
        except Exception as error:  # of what makes the rows: a generator, a file, the network
            raise AlignError(f"{where}: cannot be read: {reason_in_line(error)}") from error
        is_long = isinstance(row, Row) and unless_too_long(row.values) is None
        yield too_long(where) if is_long else row


def _row(values: Any, where: str) -> Row | BadRow:
    """A row of Python values alone."""
    if not isinstance(values, Mapping):
        return object_row(values, where)
    kept: dict[str, Any] = {}
    name: Any = "row"
    try:
        for name, value in values.items():
            if not isinstance(name, str):
                raise NotPlainError(f"has a key that is a {type(name).__name__}, not text")
            kept[str(name)] = plain(value)
    except NotPlainError as error:
        advice = "give text, numbers, lists and mappings of these, or remove the column"
        return BadRow(where, name if isinstance(name, str) else "row", str(error), advice)
    return Row(kept, where)


def hash_of(rows: Any, source: DataSource) -> str:
    """Hash of the content; never of the name, of the object or of a file's time."""
    if isinstance(rows, _Written):
        return rows.sha256
    digest = hashlib.sha256()
    if not hasattr(rows, "select") or _is_transformed(rows):
        for line in _lines(rows, source):
            digest.update(line)
        return digest.hexdigest()
    import numpy as np
    import pyarrow

    for table in rows.with_format("arrow").iter(BATCH):
        sink = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(sink, table.schema.remove_metadata()) as writer:
            # a copy: a slice would bring bytes of the rows beside it
            compact = table.replace_schema_metadata(None).take(np.arange(len(table)))
            writer.write_table(compact.combine_chunks())
        digest.update(sink.getvalue())
    return digest.hexdigest()
