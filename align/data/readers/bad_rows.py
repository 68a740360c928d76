"""Rows that cannot be used: counted by reason, and what is said where a source has no others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from align.data.formats.columns import RANK, is_judgement
from align.data.formats.fields import NEEDED, Kind
from align.data.formats.naming import KIND_NAMES, flags, other_kind, overrides
from align.data.readers.rows import Ambiguous, LeftOut
from align.data.sources import BadRow
from align.types import AlignError

NUM_SHOWN = 5
"""Bad rows that a report tells in full."""


@dataclass
class BadRows:
    """Bad rows by reason, and the first of them in full: of each reason one at least.

    Rows that are left out without being bad have a reason and are not told in full.
    """

    reasons: Counter[str] = field(default_factory=Counter)
    first: list[str] = field(default_factory=list)

    def add(self, row: BadRow) -> None:
        """Count a row.

        Raises:
            AlignError: It is `Ambiguous`, whether or not bad rows are skipped.
        """
        if isinstance(row, Ambiguous):
            raise AlignError(str(row))
        reason = f"{row.field}: {row.reason}"
        self.reasons[reason] += 1
        if isinstance(row, LeftOut):
            return
        if len(self.first) < NUM_SHOWN or self.reasons[reason] == 1:
            self.first.append(str(row))

    def stop_at_first(self) -> str:
        """The line that ends a run under ``on_bad_row=stop``."""
        return f"{self.first[0]}; or set data.on_bad_row=skip"


def no_row(path: str, bad: BadRows, kind: Kind, columns: Sequence[str]) -> str:
    """Say why nothing of ``path`` can be used; ``columns`` are those that it has."""
    if not bad.first:
        left_out = ", ".join(bad.reasons)
        found = f"none of {bad.reasons.total()} rows is used: {left_out}" if left_out else ""
        return f"{path}: {found or 'no row in it'}; give a file with rows"
    if kind != "prompt" and is_judgement(columns):
        return f"{path}: holds judgements, which no stage trains on; {RANK}"
    # a name of `data.columns` that is wrong says so itself
    if flags(kind, columns) and all(reason.endswith(": missing") for reason in bad.reasons):
        other = other_kind(kind, columns)
        return (
            f"{path}: none of {bad.reasons.total()} rows has the columns of {KIND_NAMES[kind]}: "
            f"{NEEDED[kind]}; its columns: {', '.join(columns) or 'none'}; "
            f"{f'{other}; if not, ' if other else ''}say which is which: "
            f"{overrides(kind, columns)} (`align data`: --columns {flags(kind, columns)})"
        )
    return f"{path}: none of {bad.reasons.total()} rows can be used; the first: {bad.first[0]}"
