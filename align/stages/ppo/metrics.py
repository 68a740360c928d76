"""Numbers and rows that a PPO iteration reports, and the gate on its first probability ratio."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from align.config.keys import PPORecipe
from align.losses import explained_variance, masked_mean
from align.models import Policy
from align.rollout.experience import repetition
from align.types import AlignError, Experience, PromptExample


def describe(
    experience: Experience, scores: Tensor, num_prompts: int, *, kl_coef: float
) -> dict[str, float]:
    """Compute the numbers of a rollout before the update; docs/metrics.md explains them.

    Args:
        scores: Raw scores of the reward, ``[B]``.
    """
    rollout, k = experience.rollout, len(scores) // num_prompts
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
    """List every response with its prompt, its raw score and its KL in nats."""
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
    """A stopwatch over the three phases of an iteration: sampling, scoring, update."""

    def __init__(self) -> None:
        self._marks = [time.monotonic()]

    def mark(self) -> None:
        """Note that the next phase is over."""
        self._marks.append(time.monotonic())

    def seconds(self, *, tokens: float) -> dict[str, float]:
        """Return the durations of the phases, and the rate of ``tokens`` sampled ones."""
        started, sampled, scored, updated = self._marks
        return {
            "seconds_sampling": sampled - started,
            "seconds_scoring": scored - sampled,
            "seconds_updating": updated - scored,
            "tokens_per_second": tokens / (updated - started),
        }


LARGEST_RATIO_ERROR = 1e-4
"""Limit in float32 at temperature 1 and up to `DEPTH` layers; mostly 1e-5 or less is measured."""
DEPTH = 8
"""Deeper models round more, and have larger logits: the limit grows with their layers. Random
models of 12 to 48 layers with logits of about 30 are off by .6e-4 to .8e-4."""

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
SAFEST = ("generation.engine=align", "attention=segments")


def largest_ratio_error(actor: Policy, temperature: float) -> float:
    """Bound what rounding explains: logits are off by a little and divided by the temperature."""
    layers = getattr(actor.inner.config.get_text_config(), "num_hidden_layers", None) or 1
    return LARGEST_RATIO_ERROR * max(1, layers / DEPTH) / min(1, temperature or 1)


def require_first_ratio(actor: Policy, error: float, recipe: PPORecipe) -> None:
    """Stop where training and sampling compute other probabilities with the same weights.

    A mixture of experts may take another expert in a tie; bf16 rounds: `align doctor` judges both.

    Raises:
        AlignError: In float32 a probability ratio of the first step that is taken is not 1.
    """
    config = actor.inner.config.get_text_config()
    experts = any(getattr(config, n, None) for n in EXPERTS)
    limit = largest_ratio_error(actor, recipe.generation.temperature)
    if actor.precision == "fp32" and not experts and not error <= limit:
        engine = recipe.generation.engine
        in_force = (f"generation.engine={engine}", f"attention={recipe.attention}")
        untried = [key for key in SAFEST if key not in in_force]
        advice = f"try {' and '.join(untried)}, and " if untried else ""
        raise AlignError(
            f"ppo: {actor.name} gives tokens other probabilities in training than when it sampled "
            f"them, with the same weights: their ratio is off from 1 by {error:.2g} "
            f"(first_ratio_error; here, in fp32, at most {limit:.2g}), so that clipping would be "
            f"wrong from the first step on; {advice}report it with the model's name"
        )
