"""Guard against NaN and inf: log the row ids, then stop the run or skip the step.

A non-finite update is never applied.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from align.base.progress import warn
from align.run.files import NONFINITE
from align.run.folder import Run
from align.types import AlignError, NonFiniteError

IN_A_ROW = 10
"""Consecutive skipped steps that end a run: it no longer learns."""


class FiniteGuard:
    """Counter of skipped steps; ``on_nonfinite`` is the recipe's key."""

    def __init__(self, run: Run, *, on_nonfinite: str) -> None:
        self.run, self.skips = run, on_nonfinite == "skip"
        self.skipped = run.count(NONFINITE)  # a resumed run's earlier ones count too
        self.in_a_row = 0

    def accepts(
        self,
        step: int,
        numbers: Mapping[str, float],
        ids: Sequence[str],
        *,
        learns: bool = True,
    ) -> bool:
        """Return True if all numbers are finite; otherwise log the step as skipped.

        Args:
            step: The current step or iteration, from 1.
            numbers: Numbers that must be finite, such as ``loss`` and ``gradient``.
            ids: Rows that they were computed from.
            learns: True if an optimizer step follows, which ends a series of skipped steps.

        Raises:
            AlignError: ``on_nonfinite`` is stop, or too many consecutive steps were skipped.
        """
        bad = [(what, value) for what, value in numbers.items() if not math.isfinite(value)]
        if bad:
            row = {"step": step, "what": bad[0][0], "value": str(bad[0][1]), "ids": list(ids)}
            self._leave_out(row, "lower optim.lr")
        elif learns:
            self.in_a_row = 0
        return not bad

    def leave_out(self, step: int, error: NonFiniteError, ids: Sequence[str]) -> None:
        """Log a step as skipped, of which a part could not be computed on the rows ``ids``.

        Raises:
            AlignError: As in `accepts`.
        """
        limit = ", too large for float32," if math.isfinite(error.value) else ""
        value = f"{error.value}{limit}"
        row = {"step": step, "what": error.what, "value": value, "ids": list(ids)}
        if error.responses:
            row["responses"] = list(error.responses)
        self._leave_out(row, error.cure)

    def _leave_out(self, row: dict[str, Any], cure: str) -> None:
        self.run.append(NONFINITE, [row])
        self.skipped += 1
        self.in_a_row += 1
        ids = row["ids"]
        first = ", ".join(ids[:3]) + (", ..." if len(ids) > 3 else "")
        told = f"step {row['step']}: the {row['what']} became {row['value']} on {first}"
        whole = "all, with the responses," if "responses" in row else "all"
        path = self.run.folder / NONFINITE
        if not self.skips:
            raise AlignError(
                f"{self.run.stage}: {told} ({whole} in {path}); look at these rows, {cure}, or "
                "leave such steps out with on_nonfinite=skip"
            )
        if self.in_a_row >= IN_A_ROW:
            raise AlignError(
                f"{self.run.stage}: {told}, the {IN_A_ROW}th in a row to be left out; "
                f"{cure}, or look at the rows in {path}"
            )
        if self.run.is_main:
            warn(f"{self.run.stage}: {told}; left out (on_nonfinite=skip)")

    def metrics(self) -> dict[str, float]:
        return {"nonfinite_skipped": float(self.skipped)} if self.skips else {}
