"""A row as its file has it, a row that cannot be used, and how large a row may be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

MAX_CHARS = 4_000_000
"""Characters of one row, names and punctuation included: about a million tokens, more than any
model's context. Tokenising takes about 90 bytes of memory a character."""


@dataclass(frozen=True)
class Row:
    """A row as the file has it; ``where`` is ``path:line``, or ``path:row N`` without lines."""

    values: Mapping[str, Any]
    where: str


class BadRow(Exception):
    """A row that cannot be used: ``field`` and ``reason`` are few, so that they can be counted."""

    def __init__(self, where: str, field: str, reason: str, advice: str) -> None:
        super().__init__(f"{where}: {field}: {reason}; {advice}")
        self.where, self.field, self.reason, self.advice = where, field, reason, advice


class LeftOut(BadRow):
    """A row that is as it should be and gives no example, a tie: counted, and no reason to stop."""


class Ambiguous(BadRow):
    """A row that shows that others of its file may be misread: skipping it alone is no way out."""


TIE = "a tie, which prefers neither"
"""Reason of rows that are left out."""


def too_long(where: str) -> BadRow:
    """A row that was skipped before it was decoded."""
    advice = "write its text as several rows, or leave out the column that fills it"
    return BadRow(where, "row", f"longer than {MAX_CHARS:,} characters", advice)


def not_utf8(where: str, detail: str) -> BadRow:
    return BadRow(where, "row", "not UTF-8", f"{detail}: save the file as UTF-8")


def object_row(value: Any, where: str) -> Row | BadRow:
    """A JSON value as a row, which an object alone is."""
    if isinstance(value, dict):
        return Row(value, where)
    kind = type(value).__name__
    return BadRow(where, "row", "not a JSON object", f"it is a {kind}: give {{...}} with columns")


def numbered(rows: Iterable[Mapping[str, Any] | None], path: str) -> Iterator[Row | BadRow]:
    """Rows of a file that has no lines; None is one that was too long to read."""
    for number, values in enumerate(rows, start=1):
        where = f"{path}:row {number}"
        yield too_long(where) if values is None else Row(values, where)


def unless_too_long(values: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The values of a row, or None if they are too long."""
    return None if num_chars(values) > MAX_CHARS else values


def num_chars(value: Any) -> int:
    """Characters of all texts in a value."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, Mapping):
        return sum(num_chars(inner) for inner in value.values())
    if isinstance(value, list | tuple):
        return sum(num_chars(inner) for inner in value)
    return 0
