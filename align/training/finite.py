"""NaN and infinity: named, with the ids of what they came from on disk, and the run stopped or the
step left out. A step that is no number never reaches the weights.
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
"""Steps left out one after another that end a run all the same: it no longer learns."""


class FiniteGuard:
    """Counts what was left out; ``on_nonfinite`` is the recipe's key."""

    def __init__(self, run: Run, *, on_nonfinite: str) -> None:
        self.run, self.skips = run, on_nonfinite == "skip"
        # those of the run that is resumed count too
        self.skipped = run.count(NONFINITE)
        # a run that is resumed goes on counting
        self.in_a_row = 0

    def accepts(
        self,
        step: int,
        numbers: Mapping[str, float],
        ids: Sequence[str],
        *,
        learns: bool = True,
    ) -> bool:
        """Whether all numbers are finite; if not, the step is written down, to be left out.

        Args:
            step: The step or iteration that is being taken, from 1.
            numbers: What must be finite, such as ``loss`` and ``gradient``.
            ids: Rows that they were computed from.
            learns: Whether an optimizer step follows, which ends a row of steps left out.

        Raises:
            AlignError: ``on_nonfinite`` is stop, or too many steps in a row were left out.
        """
        bad = [(what, value) for what, value in numbers.items() if not math.isfinite(value)]
        if bad:
            row = {"step": step, "what": bad[0][0], "value": str(bad[0][1]), "ids": list(ids)}
            self._leave_out(row, "lower optim.lr")
        elif learns:
            self.in_a_row = 0
        return not bad

    def leave_out(self, step: int, error: NonFiniteError, ids: Sequence[str]) -> None:
        """Write down a step of which a part could not be computed on the rows ``ids``.

        Raises:
            AlignError: As in `accepts`; what is wrong with the number has been found before.
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
