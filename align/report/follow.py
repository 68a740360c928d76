"""``align report --follow``: live numbers of running runs in the terminal."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from align.base.console import printable
from align.report.runs import RunRecord, read_run

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 32
# shown first; the other numbers follow in the order of the file
FIRST = ("loss", "eval_loss", "score_mean", "eval_score", "kl", "accuracy", "eval_accuracy")
HIDDEN = {"step", "seconds", "epoch"}


def follow(folders: list[Path], *, console: Console | None = None, every: float = 2.0) -> None:
    """Show the runs until none is running any more, or until Ctrl-C."""
    shown = console or Console()
    with Live(console=shown, auto_refresh=False) as live:
        while True:
            runs = [read_run(folder, folder) for folder in folders]
            live.update(Group(*(picture(run) for run in runs)), refresh=True)
            if not any(run.status == "running" for run in runs):
                return
            time.sleep(every)


def picture(run: RunRecord) -> Group:
    """Show a run's last values, each with its course as a line of blocks."""
    last = run.metrics[-1] if run.metrics else {}
    heading = f"{run.folder}  {run.stage}: {run.status}"
    if "step" in last:
        heading += f", step {last['step']}, {last.get('seconds', 0):.0f} s"
    grid = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("number", "first", "last", "course"):
        grid.add_column(name, justify="left" if name in ("number", "course") else "right")
    keys = dict.fromkeys(key for row in run.metrics for key in row)
    ordered = [k for k in FIRST if k in keys] + [k for k in keys if k not in FIRST]
    for key in (k for k in ordered if k not in HIDDEN):
        values = run.series(key)[1]
        if values:
            # Text, because rich reads brackets in strings as markup
            grid.add_row(
                Text(printable(key)), f"{values[0]:.4g}", f"{values[-1]:.4g}", sparkline(values)
            )
    return Group(Text(printable(heading), style="bold"), grid)


def sparkline(values: list[float]) -> str:
    """Draw a number's course in at most 32 blocks, from its smallest to its largest value."""
    size = max(1, -(-len(values) // WIDTH))
    means = [sum(v) / len(v) for v in (values[i : i + size] for i in range(0, len(values), size))]
    low, high = min(means), max(means)
    if high == low:
        return BARS[0] * len(means)
    return "".join(BARS[round((v - low) / (high - low) * (len(BARS) - 1))] for v in means)
