"""``results.json`` -> ``table.md``, ``plot.png``; again: ``python -m benchmarks.report FOLDER``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks.plan import PEER, STAGES, rows_of
from benchmarks.plot import draw

NO_LOSS = {"ppo"}  # the two sides sample different responses


def write_report(results: Path, folder: Path) -> str:
    """Write the table and the plot into ``folder``; returns the table."""
    found = json.loads(results.read_text("utf-8"))
    rows = [row for stage in STAGES if (row := stage_row(found, stage))]
    growth = list(growth_rows(found))
    tables = [_about(found), _stage_table(rows), _settings_table(found), _growth_table(growth)]
    text = "\n".join(line for table in tables for line in (*table, ""))
    (folder / "table.md").write_text(text, encoding="utf-8")
    draw(rows, growth, folder / "plot.png")
    return text


def stage_row(found: dict[str, Any], stage: str) -> dict[str, Any] | None:
    """Figures of one stage over all rounds; times are of the same steps on all sides."""
    about, peer = found["about"], PEER[stage]
    mine = [m for m in found["measurements"] if m["name"] == stage]
    ours = [m for m in mine if m["side"] == "align"]
    limits = [m for m in mine if m["side"] == "limit"]
    tried = [m for m in mine if m["side"] == peer]
    if not ours or not tried:
        return None
    best = min(tried, key=lambda m: sum(m["seconds"]))["settings"]
    theirs = [m for m in tried if m["settings"] == best]
    steps = len(ours[0]["seconds"])
    tokens = sum(t for t, _ in about["tokens"].get(rows_of(stage), [])[-steps:])
    row = {
        "stage": stage,
        "peer": peer,
        "settings": best,
        "align": spread(sum(m["seconds"]) / steps for m in ours),
        "trl": spread(sum(m["seconds"]) / steps for m in theirs),
        "ratio": spread(_ratios(theirs, ours)),
        "cpu_ratio": spread(_ratios(theirs, ours, "cpu_seconds")),
        "examples_per_second": about["batch"][stage] * steps / sum(_middle(ours)),
        "tokens_per_second": tokens / sum(_middle(ours)) if tokens else None,
        "align_gib": max(m["peak_gib"] for m in ours),
        "trl_gib": min(m["peak_gib"] for m in theirs),
        "of_limit": spread(_ratios(limits, ours)) if limits else None,
        "cpu_of_limit": spread(_ratios(limits, ours, "cpu_seconds")) if limits else None,
        "loss_difference": None,
    }
    if stage not in NO_LOSS:
        pairs = zip(ours[0]["losses"], theirs[0]["losses"], strict=True)
        row["loss_difference"] = max(abs(a - b) for a, b in pairs)
    return row


def spread(values: Any) -> tuple[float, float, float]:
    """Median, smallest and largest over the rounds."""
    known = sorted(values)
    return median(known), known[0], known[-1]


def growth_rows(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every point of how cost grows: milliseconds per token, or the start with many pairs."""
    for m in found["measurements"]:
        if not m["name"].startswith("by "):
            continue
        row = {"by": m["name"].removeprefix("by "), "value": m["value"], "gib": m["peak_gib"]}
        if row["by"] == "pairs":
            yield row | {"seconds": m["seconds"][0], "again": m["seconds"][1]}
        else:
            counted = m["tokens"][-len(m["seconds"]) :]
            each = [1e3 * s / t for s, t in zip(m["seconds"], counted, strict=True)]
            yield row | {"ms_per_token": median(each)}


def _ratios(numerators: list[Any], denominators: list[Any], time: str = "seconds") -> list[float]:
    """Of the time for all steps, one for every round."""
    both = zip(numerators, denominators, strict=False)
    return [sum(a[time]) / sum(b[time]) for a, b in both]


def _middle(measured: list[dict[str, Any]]) -> list[float]:
    """Each step's median over the rounds."""
    return [median(times) for times in zip(*(m["seconds"] for m in measured), strict=True)]


def _about(found: dict[str, Any]) -> list[str]:
    about = found["about"]
    dtypes = {m["dtype"] for m in found["measurements"] if "dtype" in m} or {"float32"}
    return [
        f"`{about['model']}`, {', '.join(dtypes)}, {about['threads']} threads on "
        f"{about['processor']}; {about['form']} form, load average "
        f"{about['load_average'][0]:.1f} when it ended."
        if about["load_average"]
        else ""
    ]


def _stage_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| stage | align, s a step | TRL, s a step | TRL / align | in CPU time | examples/s "
        "| tokens/s | of the limit | in CPU time | GiB align | GiB TRL | difference of losses |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        tokens = f"{r['tokens_per_second']:.0f}" if r["tokens_per_second"] else ""
        limits = (_with_range(r[k]) if r[k] else "" for k in ("of_limit", "cpu_of_limit"))
        loss = "" if r["loss_difference"] is None else f"{r['loss_difference']:.1e}"
        lines.append(
            f"| {r['stage']} | {_with_range(r['align'])} | {_with_range(r['trl'])} "
            f"| **{_with_range(r['ratio'])}** | {_with_range(r['cpu_ratio'])} "
            f"| {r['examples_per_second']:.2f} | {tokens} | {' | '.join(limits)} "
            f"| {r['align_gib']:.1f} | {r['trl_gib']:.1f} | {loss} |"
        )
    return lines


def _settings_table(found: dict[str, Any]) -> list[str]:
    """Every setting of a peer that was tried."""
    tried: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for m in found["measurements"]:
        if m["side"] in PEER.values():
            options = ", ".join(f"{k} {v}".lower() for k, v in m["settings"].items())
            tried.setdefault((m["name"], m["side"], options), []).append(m)
    lines = ["| stage | peer | settings | s a step | GiB |", "|---|---|---|---|---|"]
    for (stage, peer, options), measured in tried.items():
        seconds = _with_range(spread(mean(m["seconds"]) for m in measured))
        gib = max(m["peak_gib"] for m in measured)
        lines.append(f"| {stage} | {peer} | {options} | {seconds} | {gib:.1f} |")
    return lines


def _growth_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| grows | to | ms a token | seconds to the first step | the second time | GiB |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        cost = f"{r['ms_per_token']:.2f}" if "ms_per_token" in r else ""
        start = f"{r['seconds']:.1f} | {r['again']:.1f}" if "seconds" in r else "|"
        lines.append(f"| {r['by']} | {r['value']:,} | {cost} | {start} | {r['gib']:.1f} |")
    return lines if rows else []


def _with_range(values: tuple[float, float, float]) -> str:
    middle, low, high = values
    return f"{middle:.2f}" if low == high else f"{middle:.2f} ({low:.2f}–{high:.2f})"


if __name__ == "__main__":
    print(write_report(Path(sys.argv[1], "results.json"), Path(sys.argv[1])))
