"""Draw figures as inline SVG with matplotlib, in the page's own colours.

Lines and text use CSS variables, so one figure serves light and dark. Screen readers get the
figure's title; its content is also in a table or in words beside it.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape

# placeholders in the drawing for the page's --c1 ... --c6
COLOURS = ("#010101", "#020202", "#030303", "#040404", "#050505", "#060606")
MARKERS = ("o", "s", "^", "D", "v", "P")
MAX_POINTS = 300


@dataclass(frozen=True)
class Line:
    """One curve with its label."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    dots: bool = False


@dataclass(frozen=True)
class Point:
    """One model on the frontier."""

    label: str
    x: float
    y: float
    y_low: float | None = None
    y_high: float | None = None
    group: str = ""


def curves(title: str, lines: Sequence[Line], *, xlabel: str = "step") -> Markup:
    """Draw lines over steps; with two lines, the second has dots."""
    figure, axes = _axes(3.4, 2.1)
    for number, line in enumerate(lines):
        x, y = _thinned(line.x, line.y)
        style: dict[str, Any] = {"color": COLOURS[number % 6], "linewidth": 1.5}
        if line.dots or len(x) == 1:
            style |= {"marker": MARKERS[number % 6], "markersize": 4}
        axes.plot(x, y, label=line.label, **style)
    axes.set_xlabel(xlabel)
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=8)
    return _svg(figure, title)


def frontier(title: str, points: Sequence[Point], paths: Sequence[Line], *, ylabel: str) -> Markup:
    """Draw reward against KL: models as points with intervals, best-of-n and training as lines."""
    figure, axes = _axes(4.4, 3.2)
    groups = list(dict.fromkeys(p.group or p.label for p in points))
    for number, group in enumerate(groups):
        own = sorted((p for p in points if (p.group or p.label) == group), key=lambda p: p.x)
        colour, marker = COLOURS[number % 6], MARKERS[number % 6]
        low = [p.y - p.y_low if p.y_low is not None else 0.0 for p in own]
        high = [p.y_high - p.y if p.y_high is not None else 0.0 for p in own]
        axes.errorbar(
            [p.x for p in own],
            [p.y for p in own],
            yerr=np.maximum([low, high], 0),
            color=colour,
            marker=marker,
            linewidth=1.2 if len(own) > 1 else 0,
            elinewidth=1.2,
            capsize=3,
            label=group,
        )
        for p in own if len(own) > 1 else ():
            axes.annotate(p.label, (p.x, p.y), xytext=(5, 4), textcoords="offset points", size=7)
    for number, path in enumerate(paths, start=len(groups)):
        x, y = _thinned(path.x, path.y)
        style: dict[str, Any] = {"color": COLOURS[number % 6], "linestyle": "--", "linewidth": 1.2}
        axes.plot(x, y, label=path.label, marker=".", **style)
    axes.set_xlabel("KL to the reference, nats per response")
    axes.set_ylabel(ylabel)
    axes.legend(frameon=False, fontsize=8)
    return _svg(figure, title, largest=1.8)


def reliability(title: str, bins: Sequence[dict[str, float]]) -> Markup:
    """Draw the share right against confidence; the diagonal is perfect calibration."""
    figure, axes = _axes(3.4, 3.0)
    axes.plot([0.5, 1], [0.5, 1], color="black", linewidth=0.8, linestyle=":", label="perfect")
    sizes = [20 + 200 * b["pairs"] / sum(x["pairs"] for x in bins) for b in bins]
    x, y = [b["confidence"] for b in bins], [b["right"] for b in bins]
    axes.scatter(x, y, s=sizes, color=COLOURS[0], label="pairs, by confidence")
    axes.plot(x, y, color=COLOURS[0], linewidth=1)
    axes.set_xlabel("confidence")
    axes.set_ylabel("share right")
    axes.set_ylim(-0.03, 1.03)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return _svg(figure, title)


def histogram(title: str, values: Sequence[float], *, xlabel: str, ylabel: str) -> Markup:
    figure, axes = _axes(3.4, 3.0)
    axes.hist(np.asarray(values), bins=20, color=COLOURS[0])
    axes.axvline(0, color="black", linewidth=1)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    return _svg(figure, title)


def _axes(width: float, height: float) -> tuple[Any, Any]:
    # the figure class, not pyplot: no window, no global state, no warning about many figures
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.xaxis.label.set_fontsize(9)
    axes.yaxis.label.set_fontsize(9)
    axes.patch.set_alpha(0)
    return figure, axes


def _svg(figure: Any, title: str, *, largest: float = 1.35) -> Markup:
    import matplotlib
    from matplotlib.text import Text

    for text in figure.findobj(Text):  # two dollars in a name are not a formula
        text.set_parse_math(False)
    stream = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    # text stays text: it can be read aloud and searched
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "align"}):
        figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    drawing = stream.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.S)
    drawing = re.sub(r"<!--.*?-->\s*", "", drawing, flags=re.S)
    for number, colour in enumerate(COLOURS, start=1):
        drawing = drawing.replace(colour, f"var(--c{number})")
    drawing = re.sub(r"#000000|\bblack\b", "currentColor", drawing)
    # matplotlib omits the fill of black text
    drawing = drawing.replace("<text ", '<text fill="currentColor" ')
    drawing = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font: \1 system-ui, sans-serif", drawing)
    drawing = _own_ids(drawing, f"{title}{drawing}")
    width, height = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', drawing)[0]
    name = f"t{_digest(title + drawing)}"
    head = (
        f'<svg role="img" aria-labelledby="{name}" viewBox="0 0 {width} {height}" '
        f'style="max-width:{float(width) * largest:.0f}px" xmlns="http://www.w3.org/2000/svg" '
        f'xmlns:xlink="http://www.w3.org/1999/xlink"><title id="{name}">{escape(title)}</title>'
    )
    return Markup(re.sub(r"<svg[^>]*>", lambda _: head, drawing, count=1))


def _own_ids(drawing: str, salt: str) -> str:
    """Make ids unique in a page of many figures, and remove those without references."""
    used = set(re.findall(r'(?:url\(#|href="#)([\w.-]+)', drawing))
    prefix = f"f{_digest(salt)}-"

    def rename(match: re.Match[str]) -> str:
        return f' id="{prefix}{match[1]}"' if match[1] in used else ""

    drawing = re.sub(r' id="([^"]*)"', rename, drawing)
    return re.sub(r'(url\(#|href="#)([\w.-]+)', rf"\g<1>{prefix}\2", drawing)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _thinned(x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Reduce to MAX_POINTS points at most, each the mean of its neighbourhood."""
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(a) <= MAX_POINTS:
        return a, b
    parts = np.array_split(np.arange(len(a)), MAX_POINTS)
    return np.array([a[p].mean() for p in parts]), np.array([b[p].mean() for p in parts])
