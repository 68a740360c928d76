"""PPO's clipped objectives, their diagnostics, and the adaptive KL coefficient.

Every function averages over all counted tokens that it gets. With ``denominator`` (the counted
tokens of the minibatch) the results of microbatches add up to the minibatch's mean.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from align.losses.advantages import kl_estimate
from align.losses.masked import Number, masked_mean, masked_var, upcast, where_counted


def _policy_losses(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    clip_range: Number,
) -> tuple[Tensor, Tensor]:
    """Compute -A rho and -A clip(rho) per token."""
    if clip_range <= 0:
        raise ValueError(f"clip_range={clip_range}: must be positive")
    # masked before exp, whose overflow would become 0 * inf in the gradient
    log_ratio = where_counted(upcast(logprobs) - upcast(old_logprobs).detach(), response_mask)
    advantages = where_counted(advantages, response_mask).detach()
    ratio = log_ratio.exp()
    return -advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)


def ppo_policy_loss(
    logprobs: Float[Tensor, "batch response"],
    old_logprobs: Float[Tensor, "batch response"],
    advantages: Float[Tensor, "batch response"],
    response_mask: Bool[Tensor, "batch response"],
    *,
    clip_range: Number,
    denominator: Number | None = None,
) -> Float[Tensor, ""]:
    """Clipped surrogate objective, to be minimised.

        mean of max(-A rho, -A clip(rho, 1 - clip_range, 1 + clip_range)),   rho = p / p_old

    Args:
        logprobs: Sampled tokens under the current policy, nats; the gradient flows here only.
        old_logprobs: The same under the policy that sampled them, at the same temperature.
        advantages: From ``gae``, whitened or not.
        response_mask: True on sampled tokens.
        clip_range: Distance of the ratio from 1 beyond which it gains nothing.
        denominator: Counted tokens of the minibatch, if this is one microbatch of it.

    Source: Schulman et al. 2017, eq. 7 (arXiv:1707.06347). Differs: the sign, and a mean over all
        counted tokens of the minibatch rather than over sequences.
    """
    unclipped, clipped = _policy_losses(
        logprobs, old_logprobs, advantages, response_mask, clip_range
    )
    return masked_mean(torch.maximum(unclipped, clipped), response_mask, denominator=denominator)


def value_loss(
    values: Float[Tensor, "batch response"],
    old_values: Float[Tensor, "batch response"],
    returns: Float[Tensor, "batch response"],
    response_mask: Bool[Tensor, "batch response"],
    *,
    clip_range: Number | None,
    denominator: Number | None = None,
) -> Float[Tensor, ""]:
    """Squared error of the critic, the larger of plain and clipped.

        0.5 * mean of max((V - R)^2, (clip(V, V_old - clip_range, V_old + clip_range) - R)^2)

    Args:
        values: The critic's values now, reward units; the gradient flows here only.
        old_values: Its values at the time of the rollout.
        returns: From ``gae``.
        response_mask: True on sampled tokens.
        clip_range: Reward units by which a value may move per rollout; None = no clipping.
        denominator: Counted tokens of the minibatch, if this is one microbatch of it.

    Source: OpenAI baselines' ppo2; Huang et al. 2024, "N+ details" (arXiv:2403.17031).
    """
    if clip_range is not None and clip_range <= 0:
        raise ValueError(f"clip_range={clip_range}: must be positive, or None for no clipping")
    values = where_counted(values, response_mask)
    returns = where_counted(returns, response_mask).detach()
    error = (values - returns) ** 2
    if clip_range is not None:
        old_values = where_counted(old_values, response_mask).detach()
        clipped = values.clamp(old_values - clip_range, old_values + clip_range)
        error = torch.maximum(error, (clipped - returns) ** 2)
    return 0.5 * masked_mean(error, response_mask, denominator=denominator)


@torch.no_grad()
def clip_fraction(
    logprobs: Float[Tensor, "batch response"],
    old_logprobs: Float[Tensor, "batch response"],
    advantages: Float[Tensor, "batch response"],
    response_mask: Bool[Tensor, "batch response"],
    *,
    clip_range: Number,
    denominator: Number | None = None,
) -> Float[Tensor, ""]:
    """Share of tokens without gradient, because the clipped branch is the larger one."""
    unclipped, clipped = _policy_losses(
        logprobs, old_logprobs, advantages, response_mask, clip_range
    )
    return masked_mean((clipped > unclipped).float(), response_mask, denominator=denominator)


@torch.no_grad()
def approx_kl(
    logprobs: Float[Tensor, "batch response"],
    old_logprobs: Float[Tensor, "batch response"],
    response_mask: Bool[Tensor, "batch response"],
    *,
    denominator: Number | None = None,
) -> Float[Tensor, ""]:
    """KL(old || now) in nats per token by k3: the size of the update so far, never negative."""
    # the samples come from the old policy, so it takes the policy's place here
    kl = kl_estimate(old_logprobs, logprobs, "k3")
    return masked_mean(kl, response_mask, denominator=denominator)


@torch.no_grad()
def explained_variance(
    values: Float[Tensor, "batch response"],
    returns: Float[Tensor, "batch response"],
    response_mask: Bool[Tensor, "batch response"],
) -> Float[Tensor, ""]:
    """Share of the returns' variance that the values explain.

        1 - var(returns - values) / var(returns)

    1 = perfect, 0 = no better than a constant. Constant returns give 0: there is nothing to
    explain.
    """
    variance = masked_var(returns, response_mask)
    residual = masked_var(upcast(returns) - upcast(values), response_mask)
    return torch.where(variance > 0, 1 - residual / variance, 0.0)


def adapt_kl_coef(
    coef: Number, *, observed_kl: Number, target: Number, batch: int, horizon: int
) -> float:
    """Move the KL coefficient so that KL drifts to its target.

        coef * (1 + clip(observed_kl / target - 1, -0.2, 0.2) * batch / horizon)

    Args:
        coef: Reward units per nat.
        observed_kl: Mean KL of this rollout's responses to the reference, nats per response.
        target: Target of ``observed_kl``, nats per response.
        batch: Sequences in this rollout.
        horizon: Sequences over which the coefficient changes by at most about a fifth.

    Source: Ziegler et al. 2019, section 2.2 (arXiv:1909.08593).
    """
    for name, number in (("target", target), ("horizon", horizon)):
        if number <= 0:
            raise ValueError(f"{name}={number}: must be positive")
    error = min(max(observed_kl / target - 1, -0.2), 0.2)
    return coef * (1 + error * batch / horizon)
