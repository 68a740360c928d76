"""Progress bars and closing tables: bars on a terminal or in a notebook, tables in a log too."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType

from tqdm import tqdm

from align.base.console import one_line, printable, say, terminal_may_be_gone

__all__ = ["Progress", "change", "duration", "say", "table", "warn"]


class Progress:
    """A bar over steps with ETA and tokens per second, on a terminal or in a notebook only."""

    def __init__(self, total: int, what: str, *, unit: str = "step", shown: bool = True) -> None:
        notebook = in_notebook()
        self._bar = _bars(notebook)(
            total=total,
            desc=printable(what),
            unit=unit,
            disable=not (shown and (notebook or sys.stderr.isatty())),
            leave=False,
            dynamic_ncols=True,
            delay=1.0,
        )
        self._tokens = 0
        self._start = time.monotonic()

    def advance(self, *, steps: int = 1, tokens: int = 0, **shown: float) -> None:
        self._tokens += tokens
        if self._tokens:
            rate = self._tokens / max(time.monotonic() - self._start, 1e-9)
            shown = {**shown, "tokens/s": rate}
        self._bar.set_postfix({k: f"{v:.4g}" for k, v in shown.items()}, refresh=False)
        self._bar.update(steps)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()


def in_notebook() -> bool:
    """Tell whether a Jupyter kernel runs this process."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and "IPKernelApp" in shell.config


def _bars(notebook: bool) -> type[tqdm]:
    """The class of a bar: a widget where the notebook can show one."""
    if not notebook:
        return tqdm
    from tqdm.auto import tqdm as widget

    return widget


def table(rows: Sequence[Sequence[str]], *, title: str) -> str:
    """Format rows as aligned plain text: the first row is the heading, the first column the
    names.
    """
    rows = [[printable(cell.replace("\n", " ")) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "  " + "  ".join(cells).rstrip()

    return "\n".join([title, *(line(row) for row in rows)])


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def change(before: Mapping[str, float], after: Mapping[str, float]) -> list[list[str]]:
    """Rows of a closing table: every held-out number before and after."""
    if not after:
        return [
            ["held out", ""],
            ["nothing", "no row fell on that side; see data.test, data.test_fraction"],
        ]
    rows = [["held out", "before", "after"]]
    rows += [[n, _short(before[n]) if n in before else "", _short(after[n])] for n in after]
    return rows


def _short(value: float) -> str:
    """Format with four digits; 0 with rounding error is 0."""
    return "0" if abs(value) < 1e-6 else f"{value:.4g}"


def warn(text: str) -> None:
    """Print a warning line on stderr, above a progress bar if there is one."""
    with terminal_may_be_gone():
        tqdm.write(f"align: warning: {one_line(text)}", file=sys.stderr)
        sys.stderr.flush()
