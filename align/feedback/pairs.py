"""Choose preference pairs from scored responses to one prompt: the one definition.

Scores may come from a reward, a metric, or strengths from people's comparisons.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Literal

Choose = Literal["best_worst", "all", "threshold"]


def choose_pairs(
    responses: Sequence[str],
    scores: Sequence[float],
    *,
    choose: Choose,
    min_margin: float = 0.0,
    threshold: float = 0.0,
) -> tuple[list[tuple[int, int]], dict[str, int]]:
    """Choose pairs of indices ``(chosen, rejected)``; count the pairs skipped, by reason.

    Args:
        responses: The answers to one prompt.
        scores: One for each; higher is better.
        choose: ``best_worst`` one pair; ``all`` every two; ``threshold`` every response that
            scores at least ``threshold`` against every one that scores less.
        min_margin: Smallest difference of scores.
        threshold: Score units.
    """
    order = sorted(range(len(responses)), key=lambda i: -scores[i])
    if choose == "best_worst":
        candidates = [(order[0], order[-1])] if len(order) > 1 else []
    else:
        candidates = list(combinations(order, 2))
    if choose == "threshold":
        candidates = [(i, j) for i, j in candidates if scores[i] >= threshold > scores[j]]
    pairs, left_out = [], {"the same text twice": 0, "scores too close": 0}
    for chosen, rejected in candidates:
        margin = scores[chosen] - scores[rejected]
        if responses[chosen] == responses[rejected]:
            left_out["the same text twice"] += 1
        elif margin <= 0 or margin < min_margin:
            left_out["scores too close"] += 1
        else:
            pairs.append((chosen, rejected))
    if choose == "threshold" and not candidates:
        left_out["all on one side of the threshold"] = 1
    return pairs, {reason: count for reason, count in left_out.items() if count}
