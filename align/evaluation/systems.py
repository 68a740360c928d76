"""Measured models against each other: paired tests, win rates, seeds taken together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

import numpy as np

from align.evaluation.compare import Comparison, compare_statistics, compare_values
from align.evaluation.intervals import mean_ci95
from align.evaluation.measure import System
from align.evaluation.wins import length_controlled_difference, shares_won, win_rate
from align.types import PromptExample

Judge = Callable[[Sequence[str], Sequence[str]], np.ndarray]


def by_name(systems: Sequence[System]) -> dict[str, list[System]]:
    """``ppo#0`` and ``ppo#1`` are seeds of ``ppo``."""
    groups: dict[str, list[System]] = {}
    for system in systems:
        groups.setdefault(system.name.partition("#")[0], []).append(system)
    return groups


def pooled(systems: Sequence[System]) -> list[dict[str, Any]]:
    """Of each model with several seeds the mean of every per-prompt number, and its spread.

    ``std`` is over seeds: how much a rerun may move the figure. ``ci95`` is of the mean over seeds,
    Student's t over seeds: wide with few of them, as it has to be.
    """
    found = []
    for name, seeds in by_name(systems).items():
        if len(seeds) < 2:
            continue
        figures: dict[str, dict[str, Any]] = {}
        for key in seeds[0].row:
            values = [seed.row.get(key) for seed in seeds]
            if all(isinstance(v, int | float) for v in values):
                average, interval = mean_ci95([float(v) for v in values])  # type: ignore[arg-type]
                spread = float(np.std(values, ddof=1))  # type: ignore[arg-type]
                figures[key] = {"mean": average, "std": spread, "ci95": interval}
        found.append({"name": name, "seeds": len(seeds), "figures": figures})
    return found


def comparisons(systems: Sequence[System], num_resamples: int) -> list[dict[str, Any]]:
    """Every two models, later against earlier, by every metric that both have."""
    groups = by_name(systems)
    found = []
    for a, b in ((a, b) for b, a in combinations(groups, 2)):
        for metric in groups[a][0].statistics:
            if all(metric in s.statistics for s in groups[a] + groups[b]):
                test = compare_statistics(
                    (a, np.stack([s.statistics[metric] for s in groups[a]])),
                    (b, np.stack([s.statistics[metric] for s in groups[b]])),
                    metric=metric,
                    num_resamples=num_resamples,
                )
                found.append(asdict(test))
        for metric in groups[a][0].values:
            if all(metric in s.values for s in groups[a] + groups[b]):
                values = {n: np.array([s.values[metric] for s in groups[n]]) for n in (a, b)}
                test = compare_values(
                    (a, values[a]), (b, values[b]), metric=metric, num_resamples=num_resamples
                )
                found.append(asdict(test) | _at_equal_length(test, groups[a][0], groups[b][0]))
    return found


def _at_equal_length(test: Comparison, a: System, b: System) -> dict[str, Any]:
    """For rewards of the answers themselves; of a model's first seed."""
    if test.metric not in ("reward", "gold"):
        return {}
    controlled = length_controlled_difference(
        a.values[test.metric], b.values[test.metric], characters(a), characters(b)
    )
    return {"at_equal_length": None if controlled is None else asdict(controlled)}


def win_rates(
    systems: Sequence[System], judges: dict[str, Judge | str], *, tie_margin: float, resamples: int
) -> list[dict[str, Any]]:
    """Every two models by every judge: a function of both answers, or a key of ``values``."""
    groups = by_name(systems)
    found = []
    for judge, decide in judges.items():
        for a, b in ((a, b) for b, a in combinations(groups, 2)):
            one, other = groups[a][0], groups[b][0]
            if isinstance(decide, str):
                if decide not in one.values or decide not in other.values:
                    continue
                shares = shares_won(one.values[decide], other.values[decide], tie_margin=tie_margin)
            else:
                shares = decide(one.outputs.responses, other.outputs.responses)
            rate = win_rate(
                a,
                b,
                shares,
                judge=judge,
                lengths_a=characters(one),
                lengths_b=characters(other),
                num_resamples=resamples,
            )
            found.append(asdict(rate))
    return found


def judge_of(function: Any, name: str, examples: Sequence[PromptExample]) -> Judge:
    """A judge function asked in both orders, so that a taste for the first answer cancels."""
    from align.rewards.function import checked_scores
    from align.types import AlignError

    prompts = [e.prompt for e in examples]
    references = [e.references for e in examples]

    def ask(first: Sequence[str], second: Sequence[str]) -> np.ndarray:
        try:
            answers = function(prompts, list(first), list(second), references)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise AlignError(f"judge {name}: raised {reason}; mend the function") from error
        shares = np.array(checked_scores(f"judge {name}", answers, len(prompts)))
        if ((shares < 0) | (shares > 1)).any():
            raise AlignError(
                f"judge {name}: gave {shares.min():g} .. {shares.max():g}; wanted 1 where the "
                "first answer is better, 0 where the second is, 0.5 for a tie"
            )
        return shares

    return lambda a, b: (ask(a, b) + 1 - ask(b, a)) / 2


def characters(system: System) -> list[int]:
    return [len(text) for text in system.outputs.responses]
