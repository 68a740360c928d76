"""The one loader: sources -> examples, bad rows stopped at or counted, prompts split honestly.

Rows go through one at a time. What is kept of them lies in a list, or in a `Spool` on disk; in
memory are then a few numbers of each, so that weights, rated rows and the split need no texts.
"""

from __future__ import annotations

import hashlib
import json
import random
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np

from align.data.formats.columns import Example, read_row
from align.data.formats.fields import Kind, check_names
from align.data.formats.rankings import Rated, pairs_of
from align.data.formats.turn_keys import TOOLS
from align.data.readers.bad_rows import BadRows, no_row
from align.data.readers.spool import Spool, Store
from align.data.sources import BadRow, Row, file_sha256, find_parts, name_of, read_set
from align.data.subset import Lazy
from align.types import AlignError, DataSource, SFTExample, SourceReport, Text

OnBadRow: TypeAlias = Literal["stop", "skip"]
NEEDS_TWO = "a pair needs two answers to one prompt, with different scores"
NO_KTO = (
    f"{NEEDS_TWO}; there is no KTO: `align sft` with data.on_bad_row=skip learns from the answers "
    "whose label is true"
)
AnyExample = TypeVar("AnyExample", bound=Example)


@dataclass(frozen=True)
class Loaded:
    """Examples of all sources in order, and what became of every file's rows."""

    examples: Sequence[Example]
    reports: tuple[SourceReport, ...]


@dataclass(frozen=True)
class _Units:
    """What a weight keeps or leaves out as a whole: a row, or all rated rows of one prompt.

    Unit u has records ``starts[u]`` to ``stops[u]`` of the store, made of ``num_rows[u]`` rows.
    """

    store: Store
    starts: array[int] = field(default_factory=lambda: array("q"))
    stops: array[int] = field(default_factory=lambda: array("q"))
    num_rows: array[int] = field(default_factory=lambda: array("q"))

    def add(self, examples: Sequence[Example], num_rows: int = 1) -> None:
        self.starts.append(len(self.store))
        for example in examples:
            self.store.append(example)
        self.stops.append(len(self.store))
        self.num_rows.append(num_rows)


class _Used(Lazy[Example]):
    """The records that weights leave, in order."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._records, self._copies = array("q"), array("q")

    def add(self, records: range, copy: int) -> None:
        self._records.extend(records)
        self._copies.extend([copy] * len(records))

    def __len__(self) -> int:
        return len(self._records)

    def _item(self, index: int) -> Example:
        example: Example = self._store[self._records[index]]
        copy = self._copies[index]
        return example if copy == 1 else replace(example, id=f"{example.id}#{copy}")


def with_columns(
    sources: Sequence[DataSource], columns: Mapping[str, str]
) -> tuple[DataSource, ...]:
    """The sources with ``columns`` for all of them; what a source says itself comes first."""
    return tuple(replace(s, columns={**columns, **s.columns}) for s in sources)


def load_examples(
    sources: Sequence[DataSource],
    *,
    kind: Kind,
    on_bad_row: OnBadRow = "stop",
    seed: int = 0,
    spool: Spool | None = None,
) -> Loaded:
    """Read every row of every source.

    Args:
        sources: Files, folders, hub data sets; ``weight`` says how many copies of each are used.
        kind: What rows are read as: ``sft``, ``preference`` or ``prompt``.
        on_bad_row: ``stop`` at the first bad row, or ``skip`` it and count it by reason.
        seed: Picks the rows of a source whose weight has a fraction.
        spool: Where the examples are kept, and read from while it is open; None = in memory, as
            a tuple.

    Raises:
        AlignError: A bad row (``stop``), a file without one good row, a source that is not there.
    """
    store: Store = [] if spool is None else spool
    examples = _Used(store)
    reports: list[SourceReport] = []
    for source in sources:
        check_names(source.columns)
        if source.weight <= 0:
            raise AlignError(f"{source.path}: weight is {source.weight}, must be above 0")
        for path, sha256, rows in _open(source):
            unread: dict[str, None] = {}
            noted = BadRows()
            kept, bad, columns = _read(
                rows, source, kind, on_bad_row, _Units(store), unread=unread, note=noted.add
            )
            if not kept.num_rows:
                raise AlignError(no_row(path, bad, kind, columns))
            num_kept, num_used = sum(kept.num_rows), 0
            for unit, copy in _weighted(len(kept.num_rows), source.weight, f"{seed} {path}"):
                examples.add(range(kept.starts[unit], kept.stops[unit]), copy)
                num_used += kept.num_rows[unit]
            if not num_used:
                raise AlignError(
                    f"{path}: a weight of {source.weight} leaves none of its "
                    f"{len(kept.num_rows)} rows; raise it, or leave the source out"
                )
            num_used = min(num_kept, num_used)
            dropped = dict(bad.reasons)
            if num_used < num_kept:
                dropped[f"left out by weight {source.weight}"] = num_kept - num_used
            reports.append(
                SourceReport(
                    path=path,
                    sha256=sha256,
                    rows_read=num_kept + bad.reasons.total(),
                    rows_kept=num_used,
                    dropped=dropped,
                    first_dropped=tuple(bad.first),
                    unread=tuple(unread),
                    noted=dict(noted.reasons),
                    first_noted=tuple(noted.first),
                )
            )
    return Loaded(tuple(examples) if spool is None else examples, tuple(reports))


def split_by_prompt(
    examples: Sequence[AnyExample], *, test_fraction: float, seed: int
) -> tuple[tuple[AnyExample, ...], tuple[AnyExample, ...]]:
    """(train, test), decided by a hash of each prompt.

    Rows of one prompt never fall on both sides, and a prompt stays on its side when rows are added
    or reordered. The fraction holds for prompts, on average.
    """
    is_test = held_out(examples, test_fraction=test_fraction, seed=seed).tolist()
    train = tuple(e for e, test in zip(examples, is_test, strict=True) if not test)
    return train, tuple(e for e, test in zip(examples, is_test, strict=True) if test)


def held_out(examples: Sequence[Example], *, test_fraction: float, seed: int) -> np.ndarray:
    """For each example whether `split_by_prompt` puts it on the test side, bool."""
    sides = (is_held_out(e, test_fraction=test_fraction, seed=seed) for e in examples)
    return np.fromiter(sides, dtype=bool, count=len(examples))


def is_held_out(example: Example, *, test_fraction: float, seed: int) -> bool:
    """Whether `split_by_prompt` puts it on the test side: nothing but its prompt decides."""
    digest = hashlib.sha256(f"{seed} {prompt_key(example)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < test_fraction * 2**64


def prompt_key(example: Example) -> str:
    """What makes two rows rows of one prompt.

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
    """What tells two questions of the same words apart: the tools that may be called."""
    tools = prompt[0].get(TOOLS) if isinstance(prompt, tuple) else None
    return json.dumps(tools) if tools else ""


def _open(source: DataSource) -> Iterator[tuple[str, str | None, Iterator[Row | BadRow]]]:
    """(path, sha256, rows) of what is read of each file of a source."""
    parts = find_parts(source)
    if not parts:
        yield name_of(source), None, read_set(source)
    for part in parts:
        yield str(part.path), file_sha256(part.path), part.rows()


def _read(
    rows: Iterator[Row | BadRow],
    source: DataSource,
    kind: Kind,
    on_bad_row: OnBadRow,
    kept: _Units,
    **remarks: Any,
) -> tuple[_Units, BadRows, list[str]]:
    """What is used, what is not, and the file's columns; ``remarks`` are options of `read_row`.

    To stop takes a row that can be used, before the bad one or after it: leaving bad rows out is no
    way out for a file that has no other.
    """
    bad = BadRows()
    rated: dict[bytes, list[int]] = {}  # by prompt, in the order in which prompts turn up
    columns: dict[str, None] = {}  # in their order
    for row in rows:
        try:
            if isinstance(row, BadRow):
                raise row
            columns |= dict.fromkeys(map(str, row.values))
            found = read_row(row, kind, columns=source.columns, source=source.path, **remarks)
            if isinstance(found, Rated):
                asked = _text_key(found.prompt) + _tools_key(found.prompt)
                text = asked.encode("utf-8", "surrogatepass")
                prompt = hashlib.sha256(text).digest()
                rated.setdefault(prompt, []).append(len(kept.store))
                kept.store.append(found)
            else:
                kept.add(found)
        except BadRow as error:
            bad.add(error)
        if bad.first and (kept.num_rows or rated) and on_bad_row == "stop":
            raise AlignError(bad.stop_at_first())
    for records in rated.values():
        same_prompt = [kept.store[record] for record in records]
        pairs = pairs_of(same_prompt)
        if pairs:
            kept.add(pairs, len(same_prompt))
        else:  # as good as any row; there is nothing to compare it with
            reason = "nothing rated otherwise to compare with"
            for row in same_prompt:
                advice = NO_KTO if row.by == "label" else NEEDS_TWO
                bad.add(BadRow(row.id, row.by, reason, advice))
    return kept, bad, list(columns)


def _weighted(num_units: int, weight: float, seed: str) -> Iterator[tuple[int, int]]:
    """(unit, number of the copy, from 1): ``weight`` copies of all, of the last one a fraction.

    The fraction is picked by seed, its order kept.
    """
    whole = int(weight)
    yield from ((unit, copy) for copy in range(1, whole + 1) for unit in range(num_units))
    num_extra = round((weight - whole) * num_units)
    extra = random.Random(seed).sample(range(num_units), num_extra)
    yield from ((unit, whole + 1) for unit in sorted(extra))
