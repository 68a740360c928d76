"""Negative log-likelihood of counted tokens."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from align.losses.masked import Number, upcast


def nll_loss(logprobs: Float[Tensor, " tokens"], *, denominator: Number) -> Float[Tensor, ""]:
    """Negative log-likelihood of these tokens over the counted tokens of the global batch.

        -sum(logprobs) / denominator

    Args:
        logprobs: Counted tokens only, flat, nats; may be empty.
        denominator: Counted tokens over all microbatches and ranks of the optimizer step, so that
            microbatches of unequal length add up to the mean of one large batch.
    """
    if denominator <= 0:
        raise ValueError(f"denominator={denominator}: the global batch has no counted token")
    return -upcast(logprobs).sum() / denominator
