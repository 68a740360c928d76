"""Compare measured models: paired tests, win rates, pooled seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

import numpy as np

from align.base.intervals import student_ci95
from align.evaluation.compare import Comparison, compare_statistics, compare_values
from align.evaluation.measure import System
from align.evaluation.wins import length_controlled_difference, shares_won, win_rate
from align.rewards.function import FunctionReward, checked_scores
from align.types import AlignError, PromptExample

Judge = Callable[[Sequence[str], Sequence[str]], np.ndarray]


def by_name(systems: Sequence[System]) -> dict[str, list[System]]:
    """Group seeds: ``ppo#0`` and ``ppo#1`` are seeds of ``ppo``."""
    groups: dict[str, list[System]] = {}
    for system in systems:
        groups.setdefault(system.name.partition("#")[0], []).append(system)
    return groups


def pooled(systems: Sequence[System]) -> list[dict[str, Any]]:
    """Average every figure over the seeds of each model that has several.

    ``std`` is over seeds: how much a rerun may move the figure. ``ci95`` is of the mean over seeds,
    Student's t: wide with few of them, as it has to be; None if they do not vary.
    """
    found = []
    for name, seeds in by_name(systems).items():
        if len(seeds) < 2:
            continue
        figures: dict[str, dict[str, Any]] = {}
        for key in seeds[0].row:
            values = [seed.row.get(key) for seed in seeds]
            if all(isinstance(v, int | float) for v in values):
                numbers = np.array(values, dtype=float)
                figures[key] = {
                    "mean": float(numbers.mean()),
                    "std": float(numbers.std(ddof=1)),
                    "ci95": student_ci95(numbers),
                }
        found.append({"name": name, "seeds": len(seeds), "figures": figures})
    return found


def comparisons(systems: Sequence[System], num_resamples: int) -> list[dict[str, Any]]:
    """Compare every two models, later against earlier, by every metric that both have."""
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
                found.append(asdict(test) | _at_equal_length(test, groups[a], groups[b]))
    return found


def _at_equal_length(test: Comparison, a: list[System], b: list[System]) -> dict[str, Any]:
    """Compare rewards of the answers at equal length; scores and lengths are means over seeds."""
    if test.metric not in ("reward", "gold"):
        return {}
    mean_a, mean_b = (np.mean([s.values[test.metric] for s in seeds], axis=0) for seeds in (a, b))
    controlled = length_controlled_difference(
        mean_a, mean_b, mean_characters(a), mean_characters(b)
    )
    return {"at_equal_length": None if controlled is None else asdict(controlled)}


def win_rates(
    systems: Sequence[System], judges: dict[str, Judge | str], *, tie_margin: float, resamples: int
) -> list[dict[str, Any]]:
    """Compute win rates of every two models by every judge (a function, or a key of ``values``)."""
    groups = by_name(systems)
    found = []
    for judge, decide in judges.items():
        for a, b in ((a, b) for b, a in combinations(groups, 2)):
            if isinstance(decide, str) and any(
                decide not in s.values for s in groups[a] + groups[b]
            ):
                continue
            rate = win_rate(
                a,
                b,
                np.stack(
                    [_shares(*pair, decide, tie_margin) for pair in met(groups[a], groups[b])]
                ),
                judge=judge,
                lengths_a=mean_characters(groups[a]),
                lengths_b=mean_characters(groups[b]),
                num_seeds=(len(groups[a]), len(groups[b])),
                num_resamples=resamples,
            )
            found.append(asdict(rate))
    return found


def met(a: Sequence[System], b: Sequence[System]) -> list[tuple[System, System]]:
    """Pair each seed with one of the other side, so that a judge is called no more than needed."""
    return [(a[i % len(a)], b[i % len(b)]) for i in range(max(len(a), len(b)))]


def _shares(a: System, b: System, decide: Judge | str, tie_margin: float) -> np.ndarray:
    if isinstance(decide, str):
        return shares_won(a.values[decide], b.values[decide], tie_margin=tie_margin)
    return decide(a.outputs.responses, b.outputs.responses)


def judge_of(judge: FunctionReward, examples: Sequence[PromptExample]) -> Judge:
    """Call a judge function in both orders, so that a bias for the first answer cancels."""
    name = judge.name
    prompts = [e.prompt for e in examples]
    references = [e.references for e in examples]

    def ask(first: Sequence[str], second: Sequence[str]) -> np.ndarray:
        given = dict(prompts=prompts, a=first, b=second, references=references)  # noqa: C408
        shares = np.array(checked_scores(f"judge {name}", judge.call(given), len(prompts)))
        if ((shares < 0) | (shares > 1)).any():
            raise AlignError(
                f"judge {name}: gave {shares.min():g} .. {shares.max():g}; wanted 1 where the "
                "first answer is better, 0 where the second is, 0.5 for a tie"
            )
        return shares

    return lambda a, b: (ask(a, b) + 1 - ask(b, a)) / 2


def mean_characters(seeds: Sequence[System]) -> np.ndarray:
    """Average length of each prompt's answers over seeds, in characters."""
    return np.mean([[len(text) for text in s.outputs.responses] for s in seeds], axis=0)
