"""Log-probabilities of given tokens without ever holding ``[N, V]`` logits.

The linear layer and the log-sum-exp run over chunks of rows; the backward pass computes a chunk
again instead of keeping it, unless there is only one. Everything that is returned is float32,
whatever the weights are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

CHUNK_ELEMENTS = 2**26
"""Logits held at a time (256 MB in float32): rows per chunk = this / vocabulary.

A minibatch of one chunk computes them once; of more, again in the backward pass.
"""


def token_logprobs(
    hidden: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "vocab hidden"],
    targets: Int[Tensor, " tokens"],
    *,
    temperature: float = 1.0,
    bias: Float[Tensor, " vocab"] | None = None,
    softcap: float | None = None,
) -> Float[Tensor, " tokens"]:
    """``log softmax(head(hidden) / temperature)[targets]`` in nats, float32.

    Args:
        hidden: Hidden states that predict ``targets``, after the final norm.
        weight: Output embedding. Under autocast the products run in its dtype.
        targets: Token ids, int64.
        temperature: Sampling temperature, > 0; divides the (soft-capped) logits.
        bias: Output bias, if the head has one.
        softcap: ``logits = softcap * tanh(logits / softcap)``, as Gemma 2 does.

    Raises:
        ValueError: temperature is not positive.
    """
    return _chunked(hidden, weight, targets, temperature, bias, softcap, False)[0]


class TokenStatistics(NamedTuple):
    """Per counted token, float32 ``[N]``.

    Attributes:
        logprobs: Of the given token, nats.
        entropy: Of the token's distribution, nats; differentiable. 0 if not asked for.
        log_collision: ``log sum_v p(v)^2``, detached: what WPO compares a log-prob with.
    """

    logprobs: Float[Tensor, " tokens"]
    entropy: Float[Tensor, " tokens"]
    log_collision: Float[Tensor, " tokens"]


def token_statistics(
    hidden: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "vocab hidden"],
    targets: Int[Tensor, " tokens"],
    *,
    temperature: float = 1.0,
    bias: Float[Tensor, " vocab"] | None = None,
    softcap: float | None = None,
) -> TokenStatistics:
    """As `token_logprobs`, with what each token's whole distribution looks like beside it."""
    return _chunked(hidden, weight, targets, temperature, bias, softcap, True)


def _chunked(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    bias: Tensor | None,
    softcap: float | None,
    with_entropy: bool,
) -> TokenStatistics:
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0 to give log-probabilities, got {temperature}")
    device = hidden.device.type
    # The products run in one dtype, fixed here: autograd calls backward outside autocast.
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    with torch.autocast(device, enabled=False):
        out = _TokenLogprobs.apply(
            hidden.to(dtype), weight.to(dtype), targets, temperature, bias, softcap, with_entropy
        )
    return TokenStatistics(*out)


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, temperature: float
) -> Tensor:
    logits = F.linear(hidden, weight).float()
    if bias is not None:
        logits += bias
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    return logits.div_(temperature) if temperature != 1.0 else logits


class _TokenLogprobs(torch.autograd.Function):
    """Forward keeps ``lse`` and entropy, ``[N]`` each, and one chunk's logits at most."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        bias: Tensor | None,
        softcap: float | None,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
        logprobs = hidden.new_empty(len(hidden), dtype=torch.float32)
        lse = torch.empty_like(logprobs)
        entropy, collision = torch.zeros_like(logprobs), torch.zeros_like(logprobs)
        logits = None
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = _logits(hidden[part], weight, bias, softcap, temperature)
            lse[part] = logits.logsumexp(-1)
            logprobs[part] = logits.gather(-1, targets[part, None]).squeeze(-1) - lse[part]
            if with_entropy:
                probs = (logits - lse[part, None]).exp_()
                collision[part] = probs.square().sum(-1).log()
                entropy[part] = lse[part] - probs.mul_(logits).sum(-1)
        ctx.mark_non_differentiable(collision)
        kept = logits if len(hidden) <= rows and any(ctx.needs_input_grad) else None
        ctx.save_for_backward(hidden, weight, targets, bias, lse, entropy, kept)
        ctx.options = (temperature, softcap, rows, with_entropy)
        return logprobs, entropy, collision

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor, _: Any) -> Any:
        hidden, weight, targets, bias, lse, entropy, kept = ctx.saved_tensors
        temperature, softcap, rows, with_entropy = ctx.options
        needs_hidden, needs_weight, _, _, needs_bias, *_ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = None
        grad_bias = torch.zeros_like(bias) if needs_bias else None
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = kept
            if logits is None:
                logits = _logits(hidden[part], weight, bias, softcap, temperature)
            centred = logits - lse[part, None]
            # d logprob / d logits = onehot - probs;  d entropy / d logits = -probs (log p + H)
            factor = grad_logprobs[part, None].neg()
            if with_entropy:
                probs = centred.exp()
                grad = probs.mul(factor)
                grad -= centred.add_(entropy[part, None]).mul_(probs) * grad_entropy[part, None]
            else:  # in place: new memory of this size costs more than the arithmetic
                grad = centred.exp_().mul_(factor)
            grad.scatter_add_(-1, targets[part, None], grad_logprobs[part, None])
            if temperature != 1.0:
                grad /= temperature
            if softcap is not None:
                # logits hold the capped values divided by the temperature
                grad *= 1 - (logits * (temperature / softcap)).square_()
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad @ weight
            if needs_weight:
                update = (grad.T @ hidden[part]).float()
                grad_weight = update if grad_weight is None else grad_weight.add_(update)
        if needs_weight:
            nothing = torch.zeros_like(weight) if grad_weight is None else grad_weight
            grad_weight = nothing.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, grad_bias, None, None
