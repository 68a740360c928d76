"""Sums, means and whitening over the entries that count.

A masked entry may be anything, NaN and inf included: it affects neither the value nor the gradient.
If no entry counts, the result is 0 with gradient 0, so that an empty microbatch adds nothing.
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
    """Convert to float32 or wider: bf16 has three digits, too few for a sum of
    log-probabilities.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


def where_counted(
    x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Set entries that do not count to exactly 0 (a product with the mask would keep NaN)."""
    return torch.where(mask, upcast(x), 0.0)


def masked_sum(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Sum the counted entries."""
    return where_counted(x, mask).sum()


def masked_mean(
    x: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    *,
    denominator: Number | None = None,
) -> Float[Tensor, ""]:
    """Average the counted entries.

        sum(x[mask]) / denominator,   denominator = number of counted entries unless given

    Args:
        x: Any shape.
        mask: True = counts.
        denominator: The minibatch's count, for a microbatch: the results of the microbatches then
            add up to one mean over all tokens, which a mean of microbatch means is not.
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
    """Variance of the counted entries: divided by n, or by n - 1 if ``unbiased``.

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
        unbiased: Divide by the variance with n - 1 (TRL) rather than with n (ours, OpenAI's and
            that of the N+ details).
        keep_mean: Add the mean back: for rewards, whose level matters; never for advantages.

    Returns:
        Whitened entries, exactly 0 outside the mask (also with ``keep_mean``).
    """
    mean = masked_mean(x, mask)
    scale = torch.rsqrt(masked_var(x, mask, unbiased=unbiased) + VARIANCE_EPS)
    whitened = (where_counted(x, mask) - mean) * scale
    return where_counted(whitened + mean if keep_mean else whitened, mask)
