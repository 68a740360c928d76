"""Plot reward against KL, and find where the gold reward turns down.

Points are the models of an evaluation, whose names carry a sweep or a training step
(``ppo@step-10``, ``dpo.beta=0.1``); best-of-n of the reference is a line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from align.evaluation.frontier import turning_point
from align.report.figures import Line, Point, frontier
from align.report.runs import RunRecord

LABELS = {"reward": "reward (what was optimised)", "gold": "gold reward (what counts as true)"}

FAR = 5.0
"""Multiple of the second largest KL above which a model is not drawn."""


@dataclass(frozen=True)
class Frontier:
    """Figures by reward, the points as a table, and over-optimisation in words."""

    figures: list[Markup]
    points: list[dict[str, Any]]
    best_of_n: list[dict[str, Any]]
    sentences: list[str]
    notes: list[str]


def frontier_of(run: RunRecord) -> Frontier | None:
    """Build the frontier; None if fewer than two models have both a KL and a reward."""
    evaluation = run.evaluation or {}
    points = [p for p in map(_point, evaluation.get("models", [])) if p is not None]
    curve = evaluation.get("best_of_n") or []
    if len(points) < 2:
        return None
    far = _far_away(points)
    notes = [f"Not drawn: {p['name']}, {p['kl']:.1f} nats away; it is in the table." for p in far]
    drawn, sentences = [], []
    for key in ("reward", "gold"):
        own = [p for p in points if p[key] is not None and p not in far]
        if not own:
            continue
        line = [c for c in curve if c[key] is not None]
        paths = []
        if line:
            x, y = [c["kl"] for c in line], [c[key] for c in line]
            paths = [Line(f"best of n, n = 1 to {len(line)}", x, y)]
        drawn.append(
            frontier(
                f"{run.name}: {LABELS[key]} against KL",
                [_drawn(p, key) for p in own],
                paths,
                ylabel=LABELS[key],
            )
        )
    for group in dict.fromkeys(p["group"] for p in points):
        own = [p for p in points if p["group"] == group and p["gold"] is not None]
        turn = turning_point([p["kl"] for p in own], [p["gold"] for p in own])
        if turn is not None:
            sentences.append(
                f"{group}: the gold reward turns at about {turn[0]:.2f} nats, where it is "
                f"{turn[1]:.3g}; beyond that the policy is over-optimised."
            )
    return Frontier(drawn, points, curve, sentences, notes)


def _far_away(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Find the one model that would squeeze all others into a corner, such as a base model."""
    *others, last = sorted(points, key=lambda p: p["kl"])
    nearest = others[-1]["kl"]
    return [last] if len(others) > 1 and last["kl"] > FAR * max(nearest, 1.0) else []


def group_of(name: str) -> str:
    """Strip a name's step or value: ``ppo@step-10`` and ``ppo@step-20`` are one curve."""
    return re.sub(r"(@step-\d+|=[^=]*|#\d+)$", "", name)


def _point(row: dict[str, Any]) -> dict[str, Any] | None:
    """Read a model's point: rewards of samples if there are any, since KL is taken on samples."""
    if row.get("kl") is None:
        return None
    found: dict[str, Any] = {"name": row["name"], "group": group_of(row["name"]), "kl": row["kl"]}
    for key in ("reward", "gold"):
        prefix = f"sample_{key}" if row.get(f"sample_{key}_mean") is not None else key
        found[key], found[f"{key}_ci95"] = row.get(f"{prefix}_mean"), row.get(f"{prefix}_ci95")
    return None if found["reward"] is None and found["gold"] is None else found


def _drawn(point: dict[str, Any], key: str) -> Point:
    low, high = point[f"{key}_ci95"] or (None, None)
    label = point["name"].removeprefix(point["group"]).lstrip("@=#")
    return Point(label, point["kl"], point[key], low, high, group=point["group"])
