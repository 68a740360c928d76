"""Format the tables that ``align eval`` prints."""

from __future__ import annotations

from typing import Any

from align.base.progress import table
from align.evaluation.columns import columns
from align.evaluation.verdict import ALPHA, p_in_words


def closing_table(results: dict[str, Any]) -> list[list[str]]:
    """Make a row for each model and a column for each metric and each number that some model
    has.
    """
    rows = list(results["models"])
    if results["copy_baseline"] is not None:
        rows = [{"name": "copy the input", **results["copy_baseline"]}, *rows]
    shown = columns(rows)
    heading = ["model", *shown.values()]
    return [heading, *([row["name"], *(_cell(row.get(key)) for key in shown)] for row in rows)]


def significance(results: dict[str, Any]) -> str:
    """List every paired difference with its interval and verdict."""
    rows = [["difference", "metric", "by", "95% interval", "verdict"]]
    for c in results["comparisons"]:
        name = f"{c['a']} - {c['b']}"
        by = f"{c['difference']:+.3f}"
        rows.append([name, c["metric"], by, _interval(c["ci95"], "+.3f"), c["verdict"]])
        controlled = c.get("at_equal_length")
        if controlled is not None:
            by = f"{controlled['difference']:+.3f}"
            rows.append(["", "at equal length", by, _interval(controlled["ci95"], "+.3f"), ""])
    for w in results["win_rates"]:
        rate = f"{w['win_rate']:.0%}"
        if w["length_controlled_win_rate"] is not None:
            rate += f" ({w['length_controlled_win_rate']:.0%} at equal length)"
        name = f"{w['a']} over {w['b']}"
        interval = _interval(w["win_rate_ci95"], ".0%")
        rows.append([name, f"wins by {w['judge']}", rate, interval, w["win_rate_verdict"]])
    if len(rows) == 1:
        return "nothing to compare"
    return "\n".join([table(rows, title="paired differences"), *_of_many(results)])


def _of_many(results: dict[str, Any]) -> list[str]:
    """Warn about several verdicts together: no p is corrected for their number."""
    count = len(results["comparisons"]) + len(results["win_rates"])
    if count < 2:
        return []
    return [
        f"  each p is of one comparison alone; of {count} without any true difference, about "
        f"{ALPHA * count:.2g} would fall below .05 (docs/evaluation.md)"
    ]


def _interval(ends: Any, form: str) -> str:
    return "unknown" if ends is None else f"{ends[0]:{form}} .. {ends[1]:{form}}"


def reward_table(found: dict[str, Any]) -> str:
    """Format the judgement of the reward itself, on held-out preferences."""
    low, high = found["accuracy_ci95"]
    rows = [["the reward", f"on {found['pairs']} pairs"]]
    rows.append(["accuracy", f"{found['accuracy']:.3f} ({low:.3f} .. {high:.3f})"])
    rival = found["above_longer"]
    by = f"reward {rival['difference']:+.3f}, {p_in_words(rival['p'])}"
    rows.append(["accuracy of longer wins", f"{found['longer_wins']:.3f} ({by})"])
    rows.append(["correlation with length", _cell(found["length_correlation"])])
    by = f"by chance up to {found['ece_by_chance']:.3f}"
    rows.append(["calibration error", f"{found['ece']:.3f} ({by})"])
    rows.append(["temperature that corrects it", f"{found['temperature']:.2f}"])
    for way, change in found["broken"].items():
        rows.append([f"{way} answers preferred", f"{change['preferred']:.0%}"])
    return table(rows, title="\nreward model")


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
