"""Rows of all sources -> examples: bad rows stopped at or counted, rated rows made pairs, weights.

Rows go through one at a time. What is kept of them lies in a list, or on disk; in memory are then a
few numbers of each, so that weights, rated rows and the split need no texts.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Literal, TypeAlias, TypeVar

import numpy as np

from align.config.sections import DataSource
from align.data.formats.columns import Example, read_row
from align.data.formats.fields import Kind, check_names
from align.data.formats.rankings import Rated, pairs_of
from align.data.formats.turn_keys import TOOLS
from align.data.readers.bad_rows import BadRows, no_row
from align.data.records import CHUNK, Examples, InMemory, Record, Records, write_records
from align.data.sources import (
    BadRow,
    Row,
    file_sha256,
    find_parts,
    hash_of_given,
    name_of,
    read_set,
)
from align.types import AlignError, SFTExample, SourceReport, Text

OnBadRow: TypeAlias = Literal["stop", "skip"]
NEEDS_TWO = "a pair needs two answers to one prompt, with different scores"
NO_KTO = (
    f"{NEEDS_TWO}; there is no KTO: `align sft` with data.on_bad_row=skip learns from the answers "
    "whose label is true"
)
AnyExample = TypeVar("AnyExample", bound=Example)


@dataclass(frozen=True)
class Loaded:
    """Examples of all sources in order, and what became of every file's rows.

    ``places[i]``, uint64, is where example i's prompt falls by a hash, for `held_out_places`.
    """

    examples: Sequence[Example]
    reports: tuple[SourceReport, ...]
    places: np.ndarray


def _numbers() -> array[int]:
    return array("q")


@dataclass
class _File:
    """Numbers of one file's rows, its bad rows, and the prompts of rated ones.

    Unit u, which a weight keeps or leaves out as a whole, has records ``starts[u]`` to ``stops[u]``
    and is made of ``num_rows[u]`` rows: one, or all rated rows of a prompt.
    """

    path: str
    sha256: str | None
    source: DataSource
    bad: BadRows = field(default_factory=BadRows)
    noted: BadRows = field(default_factory=BadRows)
    unread: dict[str, None] = field(default_factory=dict)
    columns: dict[str, None] = field(default_factory=dict)  # in their order
    rated: dict[bytes, list[int]] = field(default_factory=dict)  # records by prompt, in order
    starts: array[int] = field(default_factory=_numbers)
    stops: array[int] = field(default_factory=_numbers)
    num_rows: array[int] = field(default_factory=_numbers)

    def add(self, start: int, stop: int, num_rows: int = 1) -> None:
        """Keep a unit."""
        self.starts.append(start)
        self.stops.append(stop)
        self.num_rows.append(num_rows)

    def require_some(self, kind: Kind) -> None:
        """Refuse a file of which nothing can be used."""
        if not self.num_rows and not self.rated:
            raise AlignError(no_row(self.path, self.bad, kind, list(self.columns)))

    def report(self, num_used: int) -> SourceReport:
        """Count the rows by what became of them; a weight uses ``num_used``."""
        num_kept = sum(self.num_rows)
        num_used = min(num_kept, num_used)
        dropped = dict(self.bad.reasons)
        if num_used < num_kept:
            dropped[f"left out by weight {self.source.weight}"] = num_kept - num_used
        return SourceReport(
            path=self.path,
            sha256=self.sha256,
            rows_read=num_kept + self.bad.reasons.total(),
            rows_kept=num_used,
            dropped=dropped,
            first_dropped=tuple(self.bad.first),
            unread=tuple(self.unread),
            noted=dict(self.noted.reasons),
            first_noted=tuple(self.noted.first),
        )


def with_columns(
    sources: Sequence[DataSource], columns: Mapping[str, str]
) -> tuple[DataSource, ...]:
    """The sources with ``columns`` for all of them; what a source says itself comes first."""
    return tuple(replace(s, columns={**columns, **s.columns}) for s in sources)


def check_source(source: DataSource) -> None:
    """Refuse a weight that is not above 0, and columns of other names than ours."""
    check_names(source.columns)
    if source.weight <= 0:
        raise AlignError(f"{source.path}: weight is {source.weight}, must be above 0")


def load_examples(
    sources: Sequence[DataSource],
    *,
    kind: Kind,
    on_bad_row: OnBadRow = "stop",
    seed: int = 0,
    folder: Path | None = None,
) -> Loaded:
    """Read every row of every source.

    Args:
        sources: Files, folders, hub data sets; ``weight`` says how many copies of each are used.
        kind: What rows are read as: ``sft``, ``preference`` or ``prompt``.
        on_bad_row: ``stop`` at the first bad row, or ``skip`` it and count it by reason.
        seed: Picks the rows of a source whose weight has a fraction.
        folder: Where the examples are kept, for as long as they are used; None = in memory, as a
            tuple.

    Raises:
        AlignError: A bad row (``stop``), a file without one good row, a source that is not there.
    """
    reading = _Reading(sources, kind, on_bad_row, seed)
    store: Records | InMemory
    if folder is None:
        read: list[Record] = list(reading.records())
        store = InMemory(read)
        read.extend(reading.pairs(store))
    else:
        paths = folder / "rows.arrow", folder / "pairs.arrow"
        write_records(paths[0], reading.records())
        # of rated rows alone, whose prompts are together only when all are read
        made = write_records(paths[1], reading.pairs(Records(paths[0])))
        store = Records(*paths) if made else Records(paths[0])
    numbers, copies, reports = reading.chosen()
    examples = Examples(store, numbers, copies)
    places = np.array(reading.places, dtype=np.uint64)[numbers]
    return Loaded(tuple(examples) if folder is None else examples, reports, places)


class _Reading:
    """One reading of sources: first `records`, then `pairs`, then `chosen`."""

    def __init__(
        self, sources: Sequence[DataSource], kind: Kind, on_bad_row: OnBadRow, seed: int
    ) -> None:
        self._sources, self._kind, self._on_bad_row = sources, kind, on_bad_row
        self._seed = seed
        self._files: list[_File] = []
        # by record, the hash of its prompt
        self.places = array("Q")

    def records(self) -> Iterator[Record]:
        """Yield an example, or several, of every good row; rated ones as they are."""
        for source in self._sources:
            check_source(source)
            for path, sha256, rows in _open(source):
                file = _File(path, sha256, source)
                self._files.append(file)
                for row in rows:
                    yield from self._of_row(row, file)
                file.require_some(self._kind)

    def _of_row(self, row: Row | BadRow, file: _File) -> Iterator[Record]:
        """Yield what a row says; note it where it is bad.

        To stop takes a row that can be used, before the bad one or after it: leaving bad rows out
        is no way out for a file that has no other.
        """
        found: Sequence[Record] = ()
        try:
            if isinstance(row, BadRow):
                raise row
            file.columns |= dict.fromkeys(map(str, row.values))
            read = read_row(
                row,
                self._kind,
                columns=file.source.columns,
                source=file.source.path,
                unread=file.unread,
                note=file.noted.add,
            )
            start = len(self.places)
            if isinstance(read, Rated):
                asked = _text_key(read.prompt) + _tools_key(read.prompt)
                prompt = hashlib.sha256(asked.encode("utf-8", "surrogatepass")).digest()
                file.rated.setdefault(prompt, []).append(start)
                found = (read,)
            else:
                file.add(start, start + len(read))
                found = read
        except BadRow as error:
            file.bad.add(error)
        if file.bad.first and (file.num_rows or file.rated) and self._on_bad_row == "stop":
            raise AlignError(file.bad.stop_at_first())
        self.places.extend(_place(record, self._seed) for record in found)
        yield from found

    def pairs(self, store: Records | InMemory) -> Iterator[Record]:
        """Yield the pairs of rated rows, which lie in ``store``; note rows without any."""
        for file in self._files:
            prompts = iter(file.rated.values())
            while some := list(islice(prompts, CHUNK // 8)):
                rows = iter(store.read([number for same in some for number in same]))
                for same in some:
                    yield from self._of_prompt([next(rows) for _ in same], file)
            file.rated.clear()

    def _of_prompt(self, rated: Sequence[Rated], file: _File) -> Iterator[Record]:
        pairs = pairs_of(rated)
        if pairs:
            start = len(self.places)
            file.add(start, start + len(pairs), len(rated))
            self.places.extend([_place(pairs[0], self._seed)] * len(pairs))
            yield from pairs
            return
        for row in rated:  # as good as any row; there is nothing to compare it with
            advice = NO_KTO if row.by == "label" else NEEDS_TWO
            file.bad.add(BadRow(row.id, row.by, "nothing rated otherwise to compare with", advice))

    def chosen(self) -> tuple[np.ndarray, np.ndarray, tuple[SourceReport, ...]]:
        """(record, number of the copy) of every example that is used, and the files' reports."""
        numbers, copies = _numbers(), _numbers()
        reports = []
        for file in self._files:
            file.require_some(self._kind)
            num_used = 0
            weight = file.source.weight
            for unit, copy in _weighted(len(file.num_rows), weight, f"{self._seed} {file.path}"):
                records = range(file.starts[unit], file.stops[unit])
                numbers.extend(records)
                copies.extend([copy] * len(records))
                num_used += file.num_rows[unit]
            if not num_used:
                raise AlignError(
                    f"{file.path}: a weight of {weight} leaves none of its "
                    f"{len(file.num_rows)} rows; raise it, or leave the source out"
                )
            reports.append(file.report(num_used))
        return np.array(numbers, np.int64), np.array(copies, np.int64), tuple(reports)


def split_by_prompt(
    examples: Sequence[AnyExample], *, test_fraction: float, seed: int
) -> tuple[tuple[AnyExample, ...], tuple[AnyExample, ...]]:
    """(train, test), decided by a hash of each prompt.

    Rows of one prompt never fall on both sides, and a prompt stays on its side when rows are added
    or reordered. The fraction holds for prompts, on average.
    """
    is_test = [is_held_out(e, test_fraction=test_fraction, seed=seed) for e in examples]
    train = tuple(e for e, test in zip(examples, is_test, strict=True) if not test)
    return train, tuple(e for e, test in zip(examples, is_test, strict=True) if test)


def held_out_places(places: np.ndarray, test_fraction: float) -> np.ndarray:
    """For each example of `Loaded` whether `split_by_prompt` puts it on the test side, bool."""
    return places < math.ceil(test_fraction * 2**64)


def is_held_out(example: Example, *, test_fraction: float, seed: int) -> bool:
    """Tell whether `split_by_prompt` puts it on the test side: nothing but its prompt decides."""
    return _place(example, seed) < test_fraction * 2**64


def _place(example: Record, seed: int) -> int:
    """Hash a prompt to a number between 0 and 2**64."""
    digest = hashlib.sha256(f"{seed} {prompt_key(example)}".encode("utf-8", "surrogatepass"))
    return int.from_bytes(digest.digest()[:8], "big")


def prompt_key(example: Record) -> str:
    """Text that two rows of one prompt have in common.

    The prompt itself; of a whole conversation its first user turn; of plain text all of it.
    """
    if not isinstance(example, SFTExample):
        return _text_key(example.prompt)
    if example.messages is not None:
        users = [m for m in example.messages if m["role"] == "user"]
        return _text_key((users or list(example.messages))[0]["content"])
    return _text_key(example.prompt if example.prompt is not None else example.text or "")


def _text_key(text: Text) -> str:
    if isinstance(text, str):
        return text.strip()
    if len(text) == 1:  # the same question, as a string or as a turn
        return text[0]["content"].strip()
    return "\n\n".join(f"{m['role']}: {m['content'].strip()}" for m in text)


def _tools_key(prompt: Text) -> str:
    """Text of the tools that may be called: it tells two questions of the same words apart."""
    tools = prompt[0].get(TOOLS) if isinstance(prompt, tuple) else None
    return json.dumps(tools) if tools else ""


def _open(source: DataSource) -> Iterator[tuple[str, str | None, Iterator[Row | BadRow]]]:
    """(path, sha256, rows) of what is read of each file of a source."""
    parts = find_parts(source)
    if not parts:
        yield name_of(source), hash_of_given(source), read_set(source)
    for part in parts:
        yield str(part.path), file_sha256(part.path), part.rows()


def _weighted(num_units: int, weight: float, seed: str) -> Iterator[tuple[int, int]]:
    """(unit, number of the copy, from 1): ``weight`` copies of all, of the last one a fraction.

    The fraction is picked by seed, its order kept.
    """
    whole = int(weight)
    yield from ((unit, copy) for copy in range(1, whole + 1) for unit in range(num_units))
    num_extra = round((weight - whole) * num_units)
    extra = random.Random(seed).sample(range(num_units), num_extra)
    yield from ((unit, whole + 1) for unit in sorted(extra))
