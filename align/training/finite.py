"""NaN and infinity: named, with the ids of what they came from on disk, and the run stopped or the
step left out. A step that is no number never reaches the weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from align.progress import warn
from align.run_files import NONFINITE
from align.run_folder import Run
from align.types import AlignError

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
        self, step: int, numbers: Mapping[str, float], ids: Sequence[str], *, learns: bool = True
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
            self._leave_out(step, *bad[0], ids)
        elif learns:
            self.in_a_row = 0
        return not bad

    def _leave_out(self, step: int, what: str, value: float, ids: Sequence[str]) -> None:
        row = {"step": step, "what": what, "value": str(value), "ids": list(ids)}
        self.run.append(NONFINITE, [row])
        self.skipped += 1
        self.in_a_row += 1
        first = ", ".join(list(ids)[:3]) + (", ..." if len(ids) > 3 else "")
        told = f"step {step}: the {what} became {value} on {first}"
        path = self.run.folder / NONFINITE
        if not self.skips:
            raise AlignError(
                f"{self.run.stage}: {told} (all in {path}); look at these rows, lower optim.lr, or "
                "leave such steps out with on_nonfinite=skip"
            )
        if self.in_a_row >= IN_A_ROW:
            raise AlignError(
                f"{self.run.stage}: {told}, the {IN_A_ROW}th in a row to be left out; "
                f"lower optim.lr, or look at the rows in {path}"
            )
        if self.run.is_main:
            warn(f"{self.run.stage}: {told}; left out (on_nonfinite=skip)")

    def metrics(self) -> dict[str, float]:
        return {"nonfinite_skipped": float(self.skipped)} if self.skips else {}
