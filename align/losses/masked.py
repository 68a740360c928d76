"""Sums, means and whitening over the entries that count.

A masked entry may hold anything, NaN and inf included: it reaches neither the value nor the
gradient. Nothing counted at all gives 0 with gradient 0, so that an empty microbatch adds nothing.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Number: TypeAlias = float | int

# keeps a constant input at 0 instead of 0/0; far below the variance of any advantage
VARIANCE_EPS = 1e-8


def upcast(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """float32 at least: bf16 holds three digits, too few for a sum of log-probabilities."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def where_counted(
    x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """x where it counts, exactly 0 elsewhere (a product with the mask would keep NaN)."""
    return torch.where(mask, upcast(x), 0.0)


def masked_sum(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Sum over the counted entries."""
    return where_counted(x, mask).sum()


def masked_mean(
    x: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    *,
    denominator: Number | None = None,
) -> Float[Tensor, ""]:
    """Mean over the counted entries.

    Args:
        x: Any shape.
        mask: True = counts.
        denominator: Divide by this instead of by the number of counted entries: with the count of
            the whole minibatch, the results of its microbatches add up to one mean over all tokens,
            which a mean of microbatch means is not.
    """
    total = masked_sum(x, mask)
    if denominator is None:
        return total / mask.sum().clamp(min=1)
    if denominator <= 0:
        raise ValueError(f"denominator={denominator}: must be positive, the counted tokens in all")
    return total / denominator


def masked_var(
    x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], *, unbiased: bool = False
) -> Float[Tensor, ""]:
    """Variance over the counted entries: divided by n, or by n - 1 if ``unbiased``.

    One counted entry has variance 0 either way.
    """
    # masked before the square, whose gradient would carry a masked NaN back
    centred = where_counted(x, mask) - masked_mean(x, mask)
    return masked_sum(centred**2, mask) / (mask.sum() - int(unbiased)).clamp(min=1)


def masked_whiten(
    x: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    *,
    unbiased: bool = False,
    keep_mean: bool = False,
) -> Float[Tensor, "*shape"]:
    """Shift and scale the counted entries to mean 0 and variance 1.

        (x - mean) / sqrt(var + 1e-8)

    Args:
        x: Any shape; whiten over everything that one update sees, not over a microbatch.
        mask: True = counts.
        unbiased: Divide by the variance with n - 1 (TRL) rather than with n (ours, as OpenAI's and
            the N+ details').
        keep_mean: Put the mean back: for rewards, whose level means something; never for
            advantages.

    Returns:
        Whitened entries, exactly 0 outside the mask (also with ``keep_mean``).
    """
    mean = masked_mean(x, mask)
    scale = torch.rsqrt(masked_var(x, mask, unbiased=unbiased) + VARIANCE_EPS)
    whitened = (where_counted(x, mask) - mean) * scale
    return where_counted(whitened + mean if keep_mean else whitened, mask)
