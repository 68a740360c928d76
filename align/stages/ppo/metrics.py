"""Report of a PPO iteration: the numbers of metrics.jsonl and the rows of samples.jsonl."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from align.losses import explained_variance, masked_mean
from align.rollout.experience import repetition
from align.types import Experience, PromptExample


def describe(
    experience: Experience, scores: Tensor, *, kl_coef: float, samples_per_prompt: int
) -> dict[str, float]:
    """Compute the numbers that docs/metrics.md explains, of the rollout before the update.

    Args:
        scores: ``[B]`` as the reward gave them.
    """
    rollout, k = experience.rollout, samples_per_prompt
    mask = rollout.response_mask
    log_ratio = rollout.logprobs - experience.ref_logprobs
    kl = log_ratio.sum(1)
    # the same for every response to a prompt at the optimum: the live distance to it
    soft_value = (experience.scores - kl_coef * kl).view(-1, k)
    gap = {"optimality_gap": soft_value.std(1).mean().item()} if k > 1 else {}
    engine = rollout.engine_logprobs
    if engine is not None:
        gap["engine_mismatch"] = masked_mean((engine - rollout.logprobs).abs(), mask).item()
    return gap | {
        "score_mean": scores.mean().item(),
        "score_std": scores.std().item() if len(scores) > 1 else 0.0,
        "reward_mean": experience.rewards.sum(1).mean().item(),
        "kl": kl.mean().item(),
        "kl_per_token": masked_mean(log_ratio, mask).item(),
        "kl_coef": kl_coef,
        "entropy": -masked_mean(rollout.logprobs, mask).item(),
        "length_mean": mask.sum(1).float().mean().item(),
        "eos_rate": rollout.finished.float().mean().item(),
        "repetition": repetition(rollout),
        "explained_variance": explained_variance(
            experience.values, experience.returns, mask
        ).item(),
        "tokens": float(mask.sum()),
    }


def sample_rows(
    iteration: int,
    examples: Sequence[PromptExample],
    responses: Sequence[str],
    experience: Experience,
    scores: Tensor,
) -> list[dict[str, Any]]:
    """Every response with its prompt, its raw score and its KL, nats."""
    k = len(responses) // len(examples)
    rollout = experience.rollout
    kl = (rollout.logprobs - experience.ref_logprobs).sum(1).tolist()
    return [
        {
            "iteration": iteration,
            "id": examples[i // k].id,
            "prompt": examples[i // k].prompt,
            "response": responses[i],
            "score": scores[i].item(),
            "kl": kl[i],
            "finished": bool(rollout.finished[i]),
        }
        for i in range(len(responses))
    ]


class Clock:
    """When the phases of an iteration were over."""

    def __init__(self) -> None:
        self._marks = [time.monotonic()]

    def mark(self) -> None:
        """Another one is over: sampling, then scoring, then the update."""
        self._marks.append(time.monotonic())

    def seconds(self, *, tokens: float) -> dict[str, float]:
        """Durations for metrics.jsonl; ``tokens`` are the sampled ones."""
        started, sampled, scored, updated = self._marks
        return {
            "seconds_sampling": sampled - started,
            "seconds_scoring": scored - sampled,
            "seconds_updating": updated - scored,
            "tokens_per_second": tokens / (updated - started),
        }
