"""Judge a reward source on held-out preference pairs: section ``reward_model`` of ``eval.json``.

Every reward source can be judged: a trained model, a metric, a function. Nothing is trained.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from align.evaluation import agreement
from align.rewards import needs_references
from align.types import AlignError, PreferencePair, RewardSource, Text


def evaluate_reward(
    source: RewardSource,
    pairs: Sequence[PreferencePair],
    *,
    gold: RewardSource | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure accuracy, calibration, length bias, agreement with ``gold``, and broken text.

    Args:
        source: Reward to be judged.
        pairs: Held-out preferences; ``pair.source`` and ``pair.margin`` split the accuracy.
        gold: A reward taken as true, such as a larger model; compared response by response. It is
            skipped if it needs references, which pairs do not have.
        seed: Seed of the shuffling.
    """
    prompts = [pair.prompt for pair in pairs]
    chosen = [answer_text(pair.chosen, pair.id) for pair in pairs]
    rejected = [answer_text(pair.rejected, pair.id) for pair in pairs]
    scores = score_pairs(source, prompts, chosen, rejected)
    gaps = scores[:, 0] - scores[:, 1]
    lengths = np.array([[len(c), len(r)] for c, r in zip(chosen, rejected, strict=True)])
    length_gaps = (lengths[:, 0] - lengths[:, 1]).astype(float)
    found: dict[str, Any] = {
        "reward": source.name,
        **agreement.accuracy(gaps),
        "by_source": _by_source(gaps, pairs),
        "by_margin": _by_margin(gaps, pairs),
        **agreement.length_bias(gaps, length_gaps),
        "above_longer": agreement.above_longer(gaps, length_gaps),
        **agreement.calibration(gaps),
        "broken": _on_broken_text(source, prompts, chosen, scores[:, 0], seed),
        "gaps": np.round(gaps, 6).tolist(),
    }
    if gold is not None and not needs_references(gold):
        gold_scores = score_pairs(gold, prompts, chosen, rejected)
        found["gold"] = agreement_with(scores, gold_scores) | {"reward": gold.name}
    return found


def agreement_with(scores: np.ndarray, gold: np.ndarray) -> dict[str, Any]:
    """Kendall's and Spearman's correlation over responses ``[prompts, k]``, and within prompts.

    ``same_order`` is the share of two responses to one prompt that both rewards order alike,
    without ties of the gold reward; differences between prompts do not enter it.
    """
    flat, gold_flat = scores.ravel(), gold.ravel()
    above = np.triu_indices(scores.shape[1], k=1)
    ours = np.sign(scores[:, :, None] - scores[:, None, :])[:, above[0], above[1]]
    theirs = np.sign(gold[:, :, None] - gold[:, None, :])[:, above[0], above[1]]
    untied = theirs != 0
    agreed = np.where(ours == 0, 0.5, (ours == theirs).astype(float))
    return {
        "responses": int(flat.size),
        "kendall": agreement.kendall(flat, gold_flat),
        "spearman": agreement.spearman(flat, gold_flat),
        "same_order": float(agreed[untied].mean()) if untied.any() else None,
    }


def score_pairs(
    source: RewardSource, prompts: Sequence[Text], chosen: Sequence[str], rejected: Sequence[str]
) -> np.ndarray:
    """Score ``[pairs, 2]``: chosen, rejected. Neighbours share their prompt, computed once."""
    repeated = [prompt for prompt in prompts for _ in range(2)]
    answers = [text for both in zip(chosen, rejected, strict=True) for text in both]
    scores = source(repeated, answers, [()] * len(answers))
    return np.asarray(scores, dtype=float).reshape(-1, 2)


def answer_text(answer: Text, where: str) -> str:
    """Return the text of an answer of one turn."""
    if isinstance(answer, str):
        return answer
    if len(answer) != 1:
        raise AlignError(
            f"preferences: {where}: the answers have {len(answer)} turns; a reward scores one "
            "answer: remove such rows"
        )
    more = sorted(answer[0].keys() - {"role", "content"})
    if more:
        raise AlignError(
            f"preferences: {where}: an answer has {', '.join(more)}, and a reward scores its words "
            "alone: remove such rows"
        )
    return str(answer[0]["content"])


def shuffled(text: str, rng: random.Random) -> str:
    words = text.split()
    rng.shuffle(words)
    return " ".join(words)


def _on_broken_text(
    source: RewardSource,
    prompts: Sequence[Text],
    texts: Sequence[str],
    whole: np.ndarray,
    seed: int,
) -> dict[str, dict[str, float]]:
    """Score chosen answers with their words shuffled, cut to the first half, and repeated.

    ``score_change`` is the mean of broken minus whole; ``preferred`` is the share of broken texts
    that score higher. A policy will exploit a reward that does not mind.
    """
    rng = random.Random(seed)
    ways: dict[str, Callable[[str], str]] = {
        "shuffled": lambda text: shuffled(text, rng),
        "truncated": lambda text: " ".join(text.split()[: max(1, len(text.split()) // 2)]),
        "repeated": lambda text: f"{text} {text}",
    }
    found = {}
    for name, break_up in ways.items():
        broken = [break_up(text) for text in texts]
        # a text of one word cannot be shuffled or cut
        rows = [i for i, text in enumerate(broken) if text != texts[i]]
        if rows:
            scores = source([prompts[i] for i in rows], [broken[i] for i in rows], [()] * len(rows))
            change = np.asarray(scores, dtype=float) - whole[rows]
            found[name] = {
                "score_change": float(change.mean()),
                "preferred": float((change > 0).mean()),
                "responses": len(rows),
            }
    return found


def _by_source(gaps: np.ndarray, pairs: Sequence[PreferencePair]) -> dict[str, dict[str, Any]]:
    sources = np.array([pair.source for pair in pairs])
    return {str(s): agreement.accuracy(gaps[sources == s]) for s in dict.fromkeys(sources)}


def _by_margin(gaps: np.ndarray, pairs: Sequence[PreferencePair]) -> list[dict[str, Any]] | None:
    """Split the accuracy by the labels' margins; None unless every pair has one."""
    margins = [pair.margin for pair in pairs if pair.margin is not None]
    if len(margins) < len(pairs):
        return None
    return agreement.accuracy_by_margin(gaps, np.array(margins))
