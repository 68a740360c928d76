"""Losses as pure functions of tensors: no models, no configuration, hyperparameters by keyword."""

from align.losses.advantages import gae, kl_estimate, shape_rewards
from align.losses.dpo import DPOLosses, dpo_loss
from align.losses.logprobs import token_logprobs
from align.losses.masked import masked_mean, masked_sum, masked_var, masked_whiten
from align.losses.ppo import (
    adapt_kl_coef,
    approx_kl,
    clip_fraction,
    explained_variance,
    ppo_policy_loss,
    value_loss,
)
from align.losses.reward import bradley_terry_loss
from align.losses.sft import nll_loss

__all__ = [
    "DPOLosses",
    "adapt_kl_coef",
    "approx_kl",
    "bradley_terry_loss",
    "clip_fraction",
    "dpo_loss",
    "explained_variance",
    "gae",
    "kl_estimate",
    "masked_mean",
    "masked_sum",
    "masked_var",
    "masked_whiten",
    "nll_loss",
    "ppo_policy_loss",
    "shape_rewards",
    "token_logprobs",
    "value_loss",
]
