"""Rows that are in memory already: a list of dicts, or a data set of Hugging Face ``datasets``.

A recipe is plain text, so it names such rows and the rows themselves are given beside it:

    with given(dataset) as path:      # "<data>"
        load_examples([DataSource(path=path)], kind="sft")

Row 3 is called ``data[3]`` in messages, ids and reports.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

from align.config.sections import DataSource
from align.data.readers.rows import BadRow, Row, bounded, object_row, one_line, too_long
from align.types import AlignError

_GIVEN: dict[str, Any] = {}
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
    _GIVEN[path] = rows
    try:
        yield path
    finally:
        del _GIVEN[path]


def is_given(source: DataSource) -> bool:
    """Whether a source's rows are in memory: its path is one that `given` has made.

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
    """The rows of a source, of its split where there are several; as Python values, not tensors."""
    rows, name = _GIVEN[source.path], source.path[1:-1]
    if isinstance(rows, Mapping):
        if source.split not in rows:
            raise AlignError(f"{name}: has no split {source.split}; it has {', '.join(rows)}")
        rows = rows[source.split]
    elif source.split != "train":
        raise AlignError(
            f"{name}: split={source.split}: these rows are in memory and have no splits; give the "
            "part that is meant"
        )
    return rows.with_format(None) if hasattr(rows, "with_format") else rows


def read_given(rows: Any, source: DataSource, *, done: int = 0) -> Iterator[Row | BadRow]:
    """Rows of what `open_given` opened; ``done`` rows of it were read before.

    A list and a ``Dataset`` begin behind them; an ``IterableDataset`` was told where it was.
    """
    name = source.path[1:-1]
    if done and hasattr(rows, "select"):
        rows = rows.select(range(done, len(rows))) if done < len(rows) else ()
    elif done and isinstance(rows, Sequence):
        rows = rows[done:]
    found = iter(rows)
    for number in count(done):
        where = f"{name}[{number}]"
        try:
            values = next(found)
        except StopIteration:
            return
        except Exception as error:  # of what makes the rows: a generator, a file, the network
            raise AlignError(f"{where}: cannot be read: {one_line(error)}") from error
        row = object_row(dict(values) if isinstance(values, Mapping) else values, where)
        yield too_long(where) if isinstance(row, Row) and bounded(row.values) is None else row


def hash_of(rows: Any) -> str:
    """Hash of the content; never of the name, of the object or of a file's time."""
    digest = hashlib.sha256()
    if hasattr(rows, "with_format") and hasattr(rows, "select"):
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
    for row in rows:
        digest.update(json.dumps(row, default=repr).encode())
    return digest.hexdigest()
