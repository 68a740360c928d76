"""Streamed rows -> examples, and what became of them: counted as they come, source by source.

Rules and messages are those of ``examples.py``, where all rows are there at once. What needs all
rows of a source is refused: ratings of one prompt in several rows, an exact fraction by weight.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from align.config.sections import DataSource
from align.data.examples import OnBadRow
from align.data.formats.columns import Example, read_row
from align.data.formats.fields import Kind
from align.data.formats.rankings import Rated
from align.data.readers.bad_rows import BadRows, no_row
from align.data.sources import BadRow, Row
from align.types import AlignError

PATIENCE = 1000
"""Bad rows from its beginning on after which a source is given up under ``on_bad_row=stop``."""


@dataclass
class SourceCounts:
    """Counts of the rows of one source so far, by what became of them.

    Attributes:
        left_out: By the source's weight.
        columns: Of the rows, as long as none could be used.
        unread: Columns that the rows' format does not read.
        noted: Remarks on rows that are used.
    """

    path: str
    num_read: int = 0
    num_kept: int = 0
    left_out: int = 0
    bad: BadRows = field(default_factory=BadRows)
    columns: dict[str, None] = field(default_factory=dict)
    unread: dict[str, None] = field(default_factory=dict)
    noted: BadRows = field(default_factory=BadRows)

    @property
    def num_good(self) -> int:
        return self.num_kept + self.left_out

    def report(self) -> dict[str, Any]:
        """As the manifest and a checkpoint have it."""
        dropped = dict(self.bad.reasons)
        return {
            "path": self.path,
            "rows_read": self.num_read,
            "rows_kept": self.num_kept,
            "dropped": dropped,
            "left_out_by_weight": self.left_out,
            "first_dropped": list(self.bad.first),
            "unread": list(self.unread),
            "noted": dict(self.noted.reasons),
            "first_noted": list(self.noted.first),
        }

    @classmethod
    def of(cls, report: Mapping[str, Any]) -> SourceCounts:
        bad = BadRows(Counter(report["dropped"]), list(report["first_dropped"]))
        left_out = report["left_out_by_weight"]
        counted = cls(report["path"], report["rows_read"], report["rows_kept"], left_out, bad)
        counted.unread |= dict.fromkeys(report.get("unread", ()))
        noted = Counter(report.get("noted", {}))
        counted.noted = BadRows(noted, list(report.get("first_noted", ())))
        return counted


@dataclass
class Counts:
    """Counts of all sources; ``rows`` and ``tokens`` of what is trained on, shared prompts once.

    Attributes:
        held_out: Rows that fell on the test side.
        dropped: Rows by reason that could be read but not be used as tokens.
        first_dropped: The first of them in full.
    """

    sources: list[SourceCounts]
    rows: int = 0
    tokens: int = 0
    held_out: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    first_dropped: str = ""

    def report(self) -> dict[str, Any]:
        mine = {k: v for k, v in vars(self).items() if k not in ("sources", "dropped")}
        sources = [counts.report() for counts in self.sources]
        return {**mine, "dropped": dict(self.dropped), "sources": sources}

    @classmethod
    def of(cls, report: Mapping[str, Any]) -> Counts:
        sources = [SourceCounts.of(source) for source in report["sources"]]
        return cls(**{**report, "sources": sources, "dropped": Counter(report["dropped"])})


def examples_of(
    row: Row | BadRow,
    source: DataSource,
    counts: SourceCounts,
    *,
    kind: Kind,
    on_bad_row: OnBadRow,
    seed: int,
) -> Sequence[Example]:
    """Read a row's examples, as often as the source's weight says; none of a bad row.

    Args:
        source: With its columns, as `preferences.with_columns` gives it.
        seed: Decides with a row's place in its file whether a fractional weight keeps it.

    Raises:
        AlignError: A bad row under ``stop``, if the source has a row that can be used before it or
            after it; `PATIENCE` rows of it without one; a row that is one rating of several.
    """
    counts.num_read += 1
    found: Sequence[Example] | Rated = ()
    try:
        if isinstance(row, BadRow):
            raise row
        if not counts.num_good:
            counts.columns |= dict.fromkeys(map(str, row.values))
        found = read_row(
            row,
            kind,
            columns=source.columns,
            source=source.path,
            unread=counts.unread,
            note=counts.noted.add,
        )
    except BadRow as error:
        counts.bad.add(error)
    if isinstance(found, Rated):
        raise AlignError(
            f"{found.id}: one rated response to a prompt, and pairs need all of them: they cannot "
            "be streamed; make pairs first: align data convert FILE --to messages -o pairs.jsonl"
        )
    copies = _copies(source.weight, f"{seed} {row.where}") if found else 0
    counts.num_kept += bool(copies)
    counts.left_out += bool(found and not copies)
    if counts.bad.first and on_bad_row == "stop":
        if counts.num_good:
            raise AlignError(counts.bad.stop_at_first())
        if counts.num_read >= PATIENCE:
            raise AlignError(no_row(counts.path, counts.bad, kind, list(counts.columns)))
    return [
        example if copy == 1 else replace(example, id=f"{example.id}#{copy}")
        for copy in range(1, copies + 1)
        for example in found
    ]


def require_some(counts: SourceCounts, source: DataSource, kind: Kind) -> None:
    """Refuse a source that has ended without a row that is used."""
    if not counts.num_good:
        raise AlignError(no_row(counts.path, counts.bad, kind, list(counts.columns)))
    if not counts.num_kept:
        raise AlignError(
            f"{counts.path}: a weight of {source.weight} leaves none of its {counts.num_good} "
            "rows; raise it, or leave the source out"
        )


def _copies(weight: float, row: str) -> int:
    """``weight`` copies of each row, of the last one a fraction, picked by a hash."""
    whole = int(weight)
    if weight == whole:
        return whole
    digest = hashlib.sha256(row.encode("utf-8", "surrogatepass")).digest()
    return whole + (int.from_bytes(digest[:8], "big") < (weight - whole) * 2**64)
