"""Negative log-likelihood of counted tokens."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from align.losses.masked import Number, upcast


def nll_loss(logprobs: Float[Tensor, " tokens"], *, denominator: Number) -> Float[Tensor, ""]:
    """Sum of NLL over these tokens, divided by the counted tokens of the whole global batch.

    Args:
        logprobs: Counted tokens only, flat, nats; may be empty.
        denominator: Counted tokens over all microbatches of the optimizer step and all processes,
            so that microbatches of unequal length add up to the mean of one large batch.
    """
    if denominator <= 0:
        raise ValueError(f"denominator={denominator}: the global batch has no counted token")
    return -upcast(logprobs).sum() / denominator
