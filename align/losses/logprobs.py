"""Log-probabilities of given tokens without ``[N, V]`` logits in memory.

The linear layer and the log-sum-exp run over chunks of rows; the backward pass recomputes a chunk
instead of storing it, unless there is only one. Results are float32 for weights of any dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

CHUNK_ELEMENTS = 2**26
"""Logits per chunk: rows = this / vocabulary. Their gradient overwrites them.

A chunk takes 128 MB in bf16; on a GPU, logits and gradient each need a float32 copy of 256 MB. With
one chunk logits are computed once, with several again in the backward pass.
"""
PIECE_ELEMENTS = 2**21
"""Logits that a CPU processes at a time in float32: the size of its cache (8 MB)."""


def token_logprobs(
    hidden: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "vocab hidden"],
    targets: Int[Tensor, " tokens"],
    *,
    temperature: float = 1.0,
    bias: Float[Tensor, " vocab"] | None = None,
    softcap: float | None = None,
) -> Float[Tensor, " tokens"]:
    """Compute ``log softmax(head(hidden) / temperature)[targets]`` in nats, float32.

    Args:
        hidden: Hidden states that predict ``targets``, after the final norm.
        weight: Output embedding. Under autocast the products run in its dtype.
        targets: Token ids, int64.
        temperature: Sampling temperature, > 0; divides the (soft-capped) logits.
        bias: Output bias, if the head has one.
        softcap: ``logits = softcap * tanh(logits / softcap)``, as in Gemma 2.

    Returns:
        ``[tokens]`` nats, float32; differentiable once, in ``hidden``, ``weight`` and ``bias``.

    Raises:
        ValueError: temperature is not positive.
    """
    return _chunked(hidden, weight, targets, temperature, bias, softcap, False)[0]


class TokenStatistics(NamedTuple):
    """Statistics of each counted token, float32 ``[N]``.

    Attributes:
        logprobs: Log-probability of the given token, nats.
        entropy: Entropy of the token's distribution, nats; differentiable. 0 if not requested.
        log_collision: ``log sum_v p(v)^2``, detached: WPO compares a log-prob with it.
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
    """Compute `token_logprobs` with entropy and collision of each token's distribution."""
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
    # one dtype for all products, fixed here: autograd calls backward outside autocast
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    options = (temperature, softcap, with_entropy, dtype)
    with torch.autocast(device, enabled=False):
        out = _TokenLogprobs.apply(hidden.to(dtype), weight, targets, bias, options)
    return TokenStatistics(*out)


def _parts(start: int, stop: int, size: int) -> Iterator[slice]:
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))


def _pieces(raw: Tensor) -> Iterator[slice]:
    """Split a chunk of logits into the rows that are processed together."""
    size = PIECE_ELEMENTS // raw.shape[1] if raw.device.type == "cpu" else len(raw)
    return _parts(0, len(raw), max(1, size))


def _finished(raw: Tensor, bias: Tensor | None, softcap: float | None, temp: float) -> Tensor:
    """Turn the head's products into float32 logits, in new memory."""
    logits = raw.to(torch.float32, copy=True)
    if bias is not None:
        logits += bias
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits.div_(temp) if temp != 1.0 else logits


class _TokenLogprobs(torch.autograd.Function):
    """Autograd function that saves ``lse`` and entropy, ``[N]`` each, and at most one chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        options: tuple[float, float | None, bool, torch.dtype],
    ) -> tuple[Tensor, Tensor, Tensor]:
        temperature, softcap, with_entropy, dtype = options
        weight = weight.to(dtype)
        rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
        logprobs = hidden.new_empty(len(hidden), dtype=torch.float32)
        lse = torch.empty_like(logprobs)
        entropy, collision = torch.zeros_like(logprobs), torch.zeros_like(logprobs)
        raw = None
        for part in _parts(0, len(hidden), rows):
            raw = F.linear(hidden[part], weight)
            for piece in _pieces(raw):
                at = slice(part.start + piece.start, part.start + piece.stop)
                logits = _finished(raw[piece], bias, softcap, temperature)
                lse[at] = logits.logsumexp(-1)
                logprobs[at] = logits.gather(-1, targets[at, None]).squeeze(-1) - lse[at]
                if with_entropy:
                    probs = (logits - lse[at, None]).exp_()
                    collision[at] = probs.square().sum(-1).log()
                    entropy[at] = lse[at] - probs.mul_(logits).sum(-1)
        ctx.mark_non_differentiable(collision)
        ctx.save_for_backward(hidden, weight, targets, bias, lse, entropy)
        # not a saved tensor, because the first backward overwrites it
        ctx.kept = raw if len(hidden) <= rows and any(ctx.needs_input_grad) else None
        ctx.options = (temperature, softcap, with_entropy, rows)
        return logprobs, entropy, collision

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor, _: Any) -> Any:
        hidden, weight, targets, bias, lse, entropy = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, None
        temperature, softcap, with_entropy, rows = ctx.options
        needs_hidden, needs_weight, _, needs_bias, _ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = None  # summed in float32 over products of the weights' dtype
        grad_bias = torch.zeros_like(bias) if needs_bias else None
        for part in _parts(0, len(hidden), rows):
            raw = F.linear(hidden[part], weight) if kept is None else kept
            for piece in _pieces(raw):
                at = slice(part.start + piece.start, part.start + piece.stop)
                logits = _finished(raw[piece], bias, softcap, temperature)
                slope = None
                if softcap is not None:
                    # logits hold the capped values divided by the temperature
                    slope = 1 - (logits * (temperature / softcap)).square_()
                centred = logits.sub_(lse[at, None])
                # d logprob / d logits = onehot - probs;  d entropy / d logits = -probs (log p + H)
                factor = grad_logprobs[at, None].neg()
                if with_entropy:
                    probs = centred.exp()
                    grad = probs.mul(factor)
                    grad -= centred.add_(entropy[at, None]).mul_(probs) * grad_entropy[at, None]
                else:
                    grad = centred.exp_().mul_(factor)
                grad.scatter_add_(-1, targets[at, None], grad_logprobs[at, None])
                if temperature != 1.0:
                    grad /= temperature
                if slope is not None:
                    grad *= slope
                if grad_bias is not None:
                    grad_bias += grad.sum(0)
                raw[piece] = grad
            if grad_hidden is not None:
                grad_hidden[part] = raw @ weight
            if needs_weight:
                update = (raw.T @ hidden[part]).float()
                grad_weight = update if grad_weight is None else grad_weight.add_(update)
        if needs_weight and grad_weight is None:
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        return grad_hidden, grad_weight, None, grad_bias, None
