"""KL estimates, reward shaping, and generalised advantage estimation.

Whitening is left to the caller (``masked.masked_whiten``): returns need unwhitened advantages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from align.losses.masked import Number, upcast, where_counted

# name -> estimate of KL(p || ref) from log p - log ref of a token sampled from p
_KL_ESTIMATES: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda log_ratio: log_ratio,
    "k2": lambda log_ratio: 0.5 * log_ratio**2,
    "k3": lambda log_ratio: torch.expm1(-log_ratio) + log_ratio,
}


def kl_estimate(
    logprobs: Float[Tensor, "*shape"],
    ref_logprobs: Float[Tensor, "*shape"],
    kind: str = "k1",
) -> Float[Tensor, "*shape"]:
    """Estimate KL(policy || reference) from tokens sampled from the policy.

        k1 = logp - ref        k2 = (logp - ref)^2 / 2        k3 = e^(ref - logp) - 1 - (ref - logp)

    k1 and k3 are unbiased, k2 is not; k2 and k3 are never negative. As *losses* they behave
    differently: on fresh samples the gradient of k1 averages to 0 (it moves nothing), that of k2 is
    the gradient of KL(policy || reference), and that of k3 of KL(reference || policy).

    Args:
        logprobs: Sampled tokens under the policy that sampled them, nats.
        ref_logprobs: The same tokens under the frozen reference, nats.
        kind: ``k1``, ``k2`` or ``k3``.

    Returns:
        The estimate of each token, nats, float32.

    Source: Schulman, "Approximating KL divergence", 2020.
    """
    if kind not in _KL_ESTIMATES:
        raise ValueError(f"kind={kind!r}: allowed are {', '.join(_KL_ESTIMATES)}")
    return _KL_ESTIMATES[kind](upcast(logprobs) - upcast(ref_logprobs))


def shape_rewards(
    scores: Float[Tensor, " batch"],
    logprobs: Float[Tensor, "batch response"],
    ref_logprobs: Float[Tensor, "batch response"],
    response_mask: Bool[Tensor, "batch response"],
    *,
    kl_coef: Number,
    kl_kind: str = "k1",
) -> Float[Tensor, "batch response"]:
    """Charge KL on every sampled token and pay the score on the last one.

        r[b,t] = -kl_coef * kl[b,t] + scores[b] * [t is last],   kl = logprobs - ref_logprobs (k1)

    Args:
        scores: Reward-source output, unbounded reward units.
        logprobs: Sampled tokens under the policy that sampled them, nats.
        ref_logprobs: The same tokens under the frozen reference, nats.
        response_mask: True on sampled tokens up to and including EOS.
        kl_coef: Reward units per nat; 0 removes the penalty.
        kl_kind: Estimator of the per-token KL, see ``kl_estimate``.

    Returns:
        Per-token rewards, exactly 0 outside the mask, detached.

    Raises:
        ValueError: A row has no response token; the message names the row.

    Source: Ziegler et al. 2019, eq. 2 (arXiv:1909.08593). Differs: the score
        lands at EOS, not in the last column, because responses vary in length.
    """
    if kl_coef < 0:
        raise ValueError(f"kl_coef={kl_coef}: must be 0 or positive, reward units per nat")
    empty_rows = (~response_mask.any(dim=1)).nonzero().flatten().tolist()
    if empty_rows:
        raise ValueError(
            f"response_mask: row {empty_rows[0]} has no response token "
            f"({len(empty_rows)} such rows of {len(response_mask)}), so its score has no place"
        )
    with torch.no_grad():
        kl = where_counted(kl_estimate(logprobs, ref_logprobs, kl_kind), response_mask)
        # counted tokens from here to the end: 1 on the last counted one
        remaining = response_mask.flip(1).cumsum(1).flip(1)
        is_last = response_mask & (remaining == 1)
        return -kl_coef * kl + where_counted(scores[:, None].expand_as(kl), is_last)


@torch.no_grad()
def gae(
    rewards: Float[Tensor, "batch response"],
    values: Float[Tensor, "batch response"],
    response_mask: Bool[Tensor, "batch response"],
    *,
    gamma: Number,
    gae_lambda: Number,
) -> tuple[Float[Tensor, "batch response"], Float[Tensor, "batch response"]]:
    """Estimate advantages over each row's counted tokens.

        delta[t] = r[t] + gamma V[t+1] - V[t]
        A[t] = delta[t] + gamma gae_lambda A[t+1],    returns = A + V

    V after the last token is 0, also for a response cut at the length limit. OpenAI and TRL choose
    the same: its score was paid in full on its last token, so a bootstrap from the critic would pay
    for the unseen rest as well, and would reward never ending.

    Args:
        rewards: Per token, from ``shape_rewards``, reward units.
        values: The critic's value *before* each token, reward units.
        response_mask: True on sampled tokens. Masked columns take no time: the token before a gap
            is followed by the token after it.
        gamma: Discount per token, in [0, 1].
        gae_lambda: 0 = one-step TD residual, 1 = Monte-Carlo return minus value.

    Returns:
        Advantages (not whitened) and returns, both detached and exactly 0 outside the mask.

    Source: Schulman et al. 2016, eq. 16 (arXiv:1506.02438). Differs: gaps in the mask take no time.
    """
    for name, number in (("gamma", gamma), ("gae_lambda", gae_lambda)):
        if not 0 <= number <= 1:
            raise ValueError(f"{name}={number}: must lie in [0, 1]")
    rewards = where_counted(rewards, response_mask)
    values = where_counted(values, response_mask)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = values.new_zeros(len(values))
    for t in reversed(range(values.shape[1])):
        counts = response_mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * gae_lambda * next_advantage
        advantages[:, t] = torch.where(counts, advantage, 0.0)
        next_value = torch.where(counts, values[:, t], next_value)
        next_advantage = torch.where(counts, advantage, next_advantage)
    return advantages, advantages + values


# ---------------------------------------------------------------- by name


@dataclass(frozen=True)
class Rewarded:
    """Inputs of the estimators: a rollout's per-token rewards, and what else some of them read.

    The ``group_size`` responses of one prompt are neighbours.
    """

    rewards: Tensor
    values: Tensor
    response_mask: Tensor
    gamma: Number
    gae_lambda: Number
    group_size: int


@dataclass(frozen=True)
class Estimator:
    """One estimator of advantages and returns, both ``[B,R]``, 0 outside the mask.

    Attributes:
        function: The formula.
        values: It reads the critic's values.
        groups: It compares the responses of one prompt, so it needs several.
        options: Options of its own: fields of `Rewarded` and keys of a recipe's section ``ppo``.
    """

    function: Callable[[Rewarded], tuple[Tensor, Tensor]]
    values: bool = True
    groups: bool = False
    options: tuple[str, ...] = ()


def _gae(x: Rewarded) -> tuple[Tensor, Tensor]:
    options = {"gamma": x.gamma, "gae_lambda": x.gae_lambda}
    return gae(x.rewards, x.values, x.response_mask, **options)


ESTIMATORS: dict[str, Estimator] = {
    "gae": Estimator(_gae, options=("gae_lambda",)),
}
OPTIONS = tuple(dict.fromkeys(name for e in ESTIMATORS.values() for name in e.options))
"""Options of single estimators."""
