"""What ``align eval`` prints."""

from __future__ import annotations

from typing import Any

from align.evaluation.verdict import p_in_words
from align.progress import table

SHOWN = {
    "bleu": "BLEU",
    "chrf": "chrF",
    "reward_mean": "reward",
    "gold_mean": "gold",
    "sample_chrf_mean": "chrF of samples",
    "sample_reward_mean": "reward of samples",
    "sample_gold_mean": "gold of samples",
    "kl": "KL, nats",
    "length_mean": "tokens",
    "eos_rate": "ended",
    "repetition_4": "repeated",
}


def closing_table(results: dict[str, Any]) -> list[list[str]]:
    """A row for each model, a column for each number that some model has."""
    rows = list(results["models"])
    if results["copy_baseline"] is not None:
        rows = [{"name": "copy the input", **results["copy_baseline"]}, *rows]
    keys = [key for key in SHOWN if any(row.get(key) is not None for row in rows)]
    heading = ["model", *(SHOWN[key] for key in keys)]
    return [heading, *([row["name"], *(_cell(row.get(key)) for key in keys)] for row in rows)]


def significance(results: dict[str, Any]) -> str:
    """Every paired difference with its interval and what it says."""
    rows = [["difference", "metric", "by", "95% interval", "verdict"]]
    for c in results["comparisons"]:
        low, high = c["ci95"]
        interval = f"{low:+.3f} .. {high:+.3f}"
        name = f"{c['a']} - {c['b']}"
        rows.append([name, c["metric"], f"{c['difference']:+.3f}", interval, c["verdict"]])
        controlled = c.get("at_equal_length")
        if controlled is not None:
            low, high = controlled["ci95"]
            by = f"{controlled['difference']:+.3f}"
            rows.append(["", "at equal length", by, f"{low:+.3f} .. {high:+.3f}", ""])
    for w in results["win_rates"]:
        low, high = w["win_rate_ci95"]
        rate = f"{w['win_rate']:.0%}"
        if w["length_controlled_win_rate"] is not None:
            rate += f" ({w['length_controlled_win_rate']:.0%} at equal length)"
        name = f"{w['a']} over {w['b']}"
        rows.append([name, "wins", rate, f"{low:.0%} .. {high:.0%}", p_in_words(w["win_rate_p"])])
    return table(rows, title="paired differences") if len(rows) > 1 else "nothing to compare"


def reward_table(found: dict[str, Any]) -> str:
    """The reward itself, on held-out preferences."""
    low, high = found["accuracy_ci95"]
    rows = [["the reward", f"on {found['pairs']} pairs"]]
    rows.append(["accuracy", f"{found['accuracy']:.3f} ({low:.3f} .. {high:.3f})"])
    rows.append(["accuracy of longer wins", f"{found['longer_wins']:.3f}"])
    rows.append(["correlation with length", _cell(found["length_correlation"])])
    rows.append(["calibration error", f"{found['ece']:.3f}"])
    rows.append(["temperature that mends it", f"{found['temperature']:.2f}"])
    for way, change in found["broken"].items():
        rows.append([f"{way} answers preferred", f"{change['preferred']:.0%}"])
    return table(rows, title="\nreward model")


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
