"""One picture: how much faster than the peer, how near the limit, memory, and how cost grows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

OURS, THEIRS = "#1f6f8b", "#d08c60"


def draw(stages: list[dict[str, Any]], growth: list[dict[str, Any]], path: Path) -> None:
    kinds = list(dict.fromkeys(row["by"] for row in growth))
    figure = plt.figure(figsize=(13, 8 if kinds else 4), layout="constrained")
    above, *below = figure.subfigures(1 + bool(kinds), 1, squeeze=False)[:, 0]
    speed, limit, memory = above.subplots(1, 3)
    names = [row["stage"].replace("_", " ") for row in stages]
    _bars(speed, names, {"TRL / align": [row["ratio"] for row in stages]}, "times as fast as TRL")
    limited = [row for row in stages if row["of_limit"]]
    _bars(
        limit,
        [row["stage"].replace("_", " ") for row in limited],
        {"align": [row["of_limit"] for row in limited]},
        "bare matrix products / step time",
    )
    peaks = {
        side: [(row[f"{key}_gib"],) * 3 for row in stages]
        for side, key in (("align", "align"), ("TRL", "trl"))
    }
    _bars(memory, names, peaks, "peak memory, GiB")
    for part in below:
        for axes, kind in zip(part.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
            _line(axes, kind, [row for row in growth if row["by"] == kind])
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bars(axes: Axes, names: list[str], groups: dict[str, list[Any]], title: str) -> None:
    """A bar for each (median, smallest, largest), the range as a whisker."""
    width = 0.8 / len(groups)
    for k, (label, values) in enumerate(groups.items()):
        places = [i + k * width for i in range(len(values))]
        middles = [v[0] for v in values]
        ranges = [[v[0] - v[1] for v in values], [v[2] - v[0] for v in values]]
        colour = (OURS, THEIRS)[k]
        bars = axes.bar(places, middles, width, yerr=ranges, label=label, color=colour)
        axes.bar_label(bars, fmt="%.2g")
    axes.set_xticks([i + 0.4 - width / 2 for i in range(len(names))], names)
    axes.set_title(title)
    if len(groups) > 1:
        axes.legend()


def _line(axes: Axes, kind: str, points: list[dict[str, Any]]) -> None:
    key, unit = ("seconds", "s to the first step") if kind == "pairs" else ("ms_per_token", "ms")
    axes.plot([p["value"] for p in points], [p[key] for p in points], "o-", color=OURS)
    axes.set_xscale("log", base=10 if kind == "pairs" else 2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(kind)
    axes.set_title(unit if kind == "pairs" else "milliseconds a token")
