"""On which side a row is padded, by how much and with what changes no number of PPO's losses."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from align.losses import (
    approx_kl,
    clip_fraction,
    gae,
    masked_whiten,
    ppo_policy_loss,
    shape_rewards,
    value_loss,
)

NAMES = ("logprobs", "old_logprobs", "ref_logprobs", "values", "old_values")


def laid_out(
    rows: list[list[list[float]]], offsets: list[int], width: int, poison: float
) -> tuple[dict[str, Tensor], Tensor]:
    """Each row's numbers from its offset on; what is padding holds ``poison``."""
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    tensors = {name: torch.full((len(rows), width), poison) for name in NAMES}
    for b, (row, offset) in enumerate(zip(rows, offsets, strict=True)):
        mask[b, offset : offset + len(row)] = True
        for t, numbers in enumerate(row):
            for name, number in zip(NAMES, numbers, strict=True):
                tensors[name][b, offset + t] = number
    return tensors, mask


def everything(tensors: dict[str, Tensor], mask: Tensor, scores: Tensor) -> list[Tensor]:
    """All that PPO computes of a rollout: per-token numbers of the counted tokens, then scalars."""
    logprobs = tensors["logprobs"].requires_grad_()
    old, ref = tensors["old_logprobs"], tensors["ref_logprobs"]
    has_tokens = mask.any(1)
    rewards = torch.zeros_like(old)
    rewards[has_tokens] = shape_rewards(
        scores[has_tokens], old[has_tokens], ref[has_tokens], mask[has_tokens], kl_coef=0.1
    )
    advantages, returns = gae(rewards, tensors["values"], mask, gamma=0.9, gae_lambda=0.8)
    whitened = masked_whiten(advantages, mask)
    loss = ppo_policy_loss(logprobs, old, whitened, mask, clip_range=0.2)
    (gradient,) = torch.autograd.grad(loss, [logprobs])
    per_token = [t[mask] for t in (rewards, advantages, returns, whitened, gradient)]
    outside = [t[~mask] for t in (rewards, advantages, returns, whitened, gradient)]
    assert all((t == 0).all() for t in outside)
    return [
        *per_token,
        loss.detach(),
        value_loss(tensors["values"], tensors["old_values"], returns, mask, clip_range=0.2),
        clip_fraction(logprobs.detach(), old, whitened, mask, clip_range=0.2),
        approx_kl(logprobs.detach(), old, mask),
    ]


number = st.floats(-3, 3, width=32)


@settings(max_examples=60)
@given(
    rows=st.lists(
        st.lists(st.lists(number, min_size=5, max_size=5), max_size=4), min_size=1, max_size=4
    ),
    offsets=st.lists(st.integers(0, 3), min_size=4, max_size=4),
    poison=st.sampled_from([0.0, 1.0, 1e30, math.nan, math.inf, -math.inf]),
)
def test_padding_changes_nothing(
    rows: list[list[list[float]]], offsets: list[int], poison: float
) -> None:
    """Rows without a token, of one token, ragged ones; padded left, right, on both sides."""
    scores = torch.arange(1.0, len(rows) + 1)
    right = everything(*laid_out(rows, [0] * len(rows), 4, 0.0), scores)
    other = everything(*laid_out(rows, offsets[: len(rows)], 7, poison), scores)
    for a, b in zip(right, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
