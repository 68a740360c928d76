"""From a rollout to what an update needs: texts, token groups, shaped rewards, advantages."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from align.data.tokens.decode import decode_response
from align.data.tokens.packing import counted_coordinates, pack
from align.data.tokens.text_ids import Tokenizer
from align.losses import masked_whiten, shape_rewards
from align.losses.advantages import ESTIMATORS, Rewarded
from align.types import Rollout, Text, TokenBatch, TokenGroup, TokenSequence


def decode_rollout(
    tokenizer: Tokenizer, rollout: Rollout, prompts: Sequence[Text], *, end_ids: Sequence[int]
) -> list[str]:
    """Decode each response to ``prompts``, its end token removed."""
    tokens, mask = rollout.input_ids.cpu(), rollout.response_mask.cpu()
    samples_per_prompt = len(mask) // max(len(prompts), 1)
    return [
        decode_response(
            tokenizer,
            ids[own].tolist(),
            prompt=prompts[row // samples_per_prompt],
            prompt_ids=rollout.prompt_ids[row],
            end_ids=end_ids,
        )
        for row, (ids, own) in enumerate(zip(tokens, mask, strict=True))
    ]


def rollout_groups(rollout: Rollout, samples_per_prompt: int) -> list[TokenGroup]:
    """Group responses by prompt; response j of prompt i is row ``i * k + j``."""
    lengths = rollout.response_mask.sum(1).tolist()
    tokens = rollout.input_ids.cpu().numpy().astype(np.int32)
    answers = [
        TokenSequence(row[:length], np.ones(length, dtype=bool))
        for row, length in zip(tokens, lengths, strict=True)
    ]
    k = samples_per_prompt
    return [
        TokenGroup(rollout.prompt_ids[i], tuple(answers[i : i + k]))
        for i in range(0, len(answers), k)
    ]


def repetition(rollout: Rollout) -> float:
    """Share of trigrams that their own response had before, over all responses; 0 to 1."""
    lengths = rollout.response_mask.sum(1).tolist()
    total = distinct = 0
    for row, length in zip(rollout.input_ids.tolist(), lengths, strict=True):
        trigrams = [tuple(row[i : i + 3]) for i in range(length - 2)]
        total += len(trigrams)
        distinct += len(set(trigrams))
    return (total - distinct) / max(total, 1)


@torch.no_grad()
def over_rollout(
    groups: Sequence[TokenGroup],
    compute: Callable[[TokenBatch], Tensor],
    *,
    like: Tensor,
    tokens_per_microbatch: int,
) -> Tensor:
    """Compute a number for each counted token by batches, and scatter them into ``[B,R]``."""
    out = torch.zeros_like(like)
    for batch in pack(groups, tokens_per_microbatch=tokens_per_microbatch):
        batch = batch.to(out.device)
        out[counted_coordinates(batch)] = compute(batch).float()
    return out


def shaped_rewards(
    rollout: Rollout,
    terminal_rewards: Tensor,
    ref_logprobs: Tensor,
    *,
    kl_coef: float,
    kl_kind: str,
    whiten: bool,
) -> Tensor:
    """Charge KL on every sampled token and pay the terminal reward on the last one, ``[B,R]``.

    Args:
        terminal_rewards: What each response earns on its last token, reward units ``[B]``.
        kl_coef: Reward units per nat charged in the reward; 0 where KL is a loss term.
        whiten: Scale the rewards of the whole rollout to variance 1 and keep their mean.
    """
    mask = rollout.response_mask
    rewards = shape_rewards(
        terminal_rewards, rollout.logprobs, ref_logprobs, mask, kl_coef=kl_coef, kl_kind=kl_kind
    )
    return masked_whiten(rewards, mask, keep_mean=True) if whiten else rewards


def estimate_advantages(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    estimator: str = "gae",
    gamma: float,
    gae_lambda: float,
    group_size: int = 1,
    whiten: bool,
) -> tuple[Tensor, Tensor]:
    """Estimate advantages and returns of one whole rollout, both ``[B,R]``.

    Args:
        estimator: A key of ``align.losses.advantages.ESTIMATORS``.
        group_size: Responses to each prompt, which are neighbours.
        whiten: Scale the advantages to mean 0 and variance 1; the returns stay as they are.
    """
    rewarded = Rewarded(rewards, values, mask, gamma, gae_lambda, group_size)
    advantages, returns = ESTIMATORS[estimator].function(rewarded)
    return (masked_whiten(advantages, mask) if whiten else advantages), returns
