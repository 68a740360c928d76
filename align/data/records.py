"""Examples on disk between reading and tokenising, so that a data set never lies in memory.

They are written to an Arrow file while the rows are read, and read from it as a
``datasets.Dataset`` in any order, by forked processes too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, overload

import numpy as np
import pyarrow as pa

from align.data.formats.columns import Example
from align.data.formats.rankings import Rated
from align.data.tokens.cache import write_arrow
from align.types import PreferencePair, PromptExample, SFTExample

Record: TypeAlias = Example | Rated
R = TypeVar("R")

CHUNK = 2048
"""Records that are read at a time, where all of them are gone through."""
_KINDS: tuple[type[Any], ...] = (SFTExample, PreferencePair, PromptExample, Rated)
# a row of the file is [number of the kind, fields] as JSON
_SCHEMA = pa.schema([("record", pa.large_string())])
_BATCH_CHARS = 1 << 20


class Records:
    """Records of Arrow files, numbered through all of them.

    The files are opened anew for each reading: what was read of a mapped file counts as this
    process's memory for as long as it is open.
    """

    def __init__(self, *paths: Path) -> None:
        self._paths = [str(path) for path in paths]

    def read(self, numbers: Sequence[int] | np.ndarray) -> list[Any]:
        """The records of these numbers, in their order."""
        from datasets import Dataset, concatenate_datasets

        if not len(numbers):
            return []
        files = [Dataset.from_file(path) for path in self._paths]
        whole = concatenate_datasets(files) if len(files) > 1 else files[0]
        first, last = int(numbers[0]), int(numbers[-1])
        in_a_row = len(numbers) == last - first + 1 and all(np.diff(numbers) == 1)
        found = whole[first : last + 1] if in_a_row else whole[[int(n) for n in numbers]]
        return [_decoded(text) for text in found["record"]]


class InMemory:
    """Records that are few."""

    def __init__(self, records: list[Record]) -> None:
        self._records = records

    def read(self, numbers: Sequence[int] | np.ndarray) -> list[Any]:
        """The records of these numbers, in their order."""
        return [self._records[number] for number in numbers]


def write_records(path: Path, records: Iterable[Record]) -> int:
    """Write records as they come, about a million characters at a time; return how many."""
    return write_arrow(path, _SCHEMA, _batches(records))


def _batches(records: Iterable[Record]) -> Iterator[pa.RecordBatch]:
    texts: list[str] = []
    size = 0
    for record in records:
        # ASCII: surrogates are kept as they are, only what a model reads is checked for them
        texts.append(json.dumps([_KINDS.index(type(record)), vars(record)]))
        size += len(texts[-1])
        if size > _BATCH_CHARS:
            yield pa.record_batch([pa.array(texts, pa.large_string())], schema=_SCHEMA)
            texts, size = [], 0
    if texts:
        yield pa.record_batch([pa.array(texts, pa.large_string())], schema=_SCHEMA)


def _decoded(text: str) -> Record:
    kind, values = json.loads(text)
    record: Record = restored(_KINDS[kind], values)
    return record


def restored(kind: type[R], values: Mapping[str, Any]) -> R:
    """A record from its fields as JSON has them, where tuples have become lists."""
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


class Examples(Sequence[Example]):
    """Some of the records in some order, a few of which are copies.

    Args:
        records: Where they are.
        numbers: Record of each example.
        copies: 1, or the number of the copy, which its id says: ``file:3#2``.
    """

    def __init__(
        self, records: Records | InMemory, numbers: np.ndarray, copies: np.ndarray
    ) -> None:
        self._records, self._numbers, self._copies = records, numbers, copies

    def select(self, indices: np.ndarray) -> Examples:
        """The examples of these indices."""
        return Examples(self._records, self._numbers[indices], self._copies[indices])

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[Example]:
        for start in range(0, len(self), CHUNK):
            yield from self[start : start + CHUNK]

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if not isinstance(index, slice):
            at = range(len(self))[index]
            return self[at : at + 1][0]
        found = self._records.read(self._numbers[index])
        return [
            example if copy == 1 else replace(example, id=f"{example.id}#{copy}")
            for example, copy in zip(found, self._copies[index], strict=True)
        ]
