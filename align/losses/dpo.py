"""Preference losses on sequence log-probabilities: DPO and its relatives, each a small function.

Notation of the formulas: c and r are the log-ratios policy / reference of the chosen and the
rejected response, D = s(c) - s(r) with the f-divergence's map s (s(x) = x for reverse KL),
b = beta, e = label_smoothing, len = counted tokens. Every loss is per pair, ``[batch]``, nats; the
caller averages. A loss that does not use smoothing or a divergence refuses them; which losses read
the other options of `dpo_loss` is said there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from align.losses.masked import Number, upcast

# a mean log-prob that float32 rounded to 0 would have infinite log-odds
MAX_MEAN_LOGPROB = -1e-7


class DPOLosses(NamedTuple):
    """Per pair: the loss, and the implicit rewards beta * log-ratio (detached)."""

    per_example: Float[Tensor, " batch"]
    chosen_rewards: Float[Tensor, " batch"]
    rejected_rewards: Float[Tensor, " batch"]


@dataclass(frozen=True)
class _Pair:
    """Inputs of the losses, named as in their formulas.

    Without a reference (simpo, orpo) c and r are the policy's log-probs. ``mean_c`` is c / len_c;
    NaN without lengths, which ``_check_options`` requires for every loss that reads it.
    """

    c: Tensor
    r: Tensor
    D: Tensor
    mean_c: Tensor
    mean_r: Tensor
    b: Number
    e: Number
    simpo_gamma: Number
    orpo_coef: Number


def _sigmoid(p: _Pair) -> Tensor:
    """-(1-e) logsig(bD) - e logsig(-bD): DPO, Rafailov et al. 2023, eq. 7; cDPO for e > 0."""
    return -(1 - p.e) * logsigmoid(p.b * p.D) - p.e * logsigmoid(-p.b * p.D)


def _hinge(p: _Pair) -> Tensor:
    """relu(1 - bD): SLiC, Zhao et al. 2023 (arXiv:2305.10425)."""
    return torch.relu(1 - p.b * p.D)


def _ipo(p: _Pair) -> Tensor:
    """(c/len_c - r/len_r - 1/(2b))^2: IPO by token means, as in TRL."""
    return (p.mean_c - p.mean_r - 1 / (2 * p.b)) ** 2


def _ipo_sum(p: _Pair) -> Tensor:
    """(c - r - 1/(2b))^2: IPO as in the paper, Azar et al. 2023 (arXiv:2310.12036)."""
    return (p.c - p.r - 1 / (2 * p.b)) ** 2


def _robust(p: _Pair) -> Tensor:
    """[-(1-e) logsig(bD) + e logsig(-bD)] / (1-2e): Chowdhury et al. 2024 (arXiv:2403.00409)."""
    flipped = -(1 - p.e) * logsigmoid(p.b * p.D) + p.e * logsigmoid(-p.b * p.D)
    return flipped / (1 - 2 * p.e)


def _sigmoid_norm(p: _Pair) -> Tensor:
    """-logsig(b(c/len_c - r/len_r)): DPO by token means, Lambert et al. 2024 (arXiv:2411.15124)."""
    return -logsigmoid(p.b * (p.mean_c - p.mean_r))


def _exo_pair(p: _Pair) -> Tensor:
    """KL((sig(bD), sig(-bD)) || (1-e, e)): EXO, Ji et al. 2024 (arXiv:2402.00856)."""
    log_win, log_lose = logsigmoid(p.b * p.D), logsigmoid(-p.b * p.D)
    return log_win.exp() * (log_win - math.log(1 - p.e)) + log_lose.exp() * (
        log_lose - math.log(p.e)
    )


def _nca_pair(p: _Pair) -> Tensor:
    """-logsig(bc) - logsig(-bc)/2 - logsig(-br)/2: NCA, Chen et al. 2024 (arXiv:2402.05369)."""
    return -logsigmoid(p.b * p.c) - 0.5 * (logsigmoid(-p.b * p.c) + logsigmoid(-p.b * p.r))


def _bco_pair(p: _Pair) -> Tensor:
    """-logsig(bc) - logsig(-br): BCO without its running shift (arXiv:2404.04656)."""
    return -logsigmoid(p.b * p.c) - logsigmoid(-p.b * p.r)


def _sppo_hard(p: _Pair) -> Tensor:
    """(c - 1/(2b))^2 + (r + 1/(2b))^2: SPPO with hard labels, Wu et al. 2024 (arXiv:2405.00675)."""
    return (p.c - 0.5 / p.b) ** 2 + (p.r + 0.5 / p.b) ** 2


def _apo_zero(p: _Pair) -> Tensor:
    """1 - sig(bc) + sig(br): chosen up, rejected down, D'Oosterlinck et al. (arXiv:2408.06266)."""
    return 1 - torch.sigmoid(p.b * p.c) + torch.sigmoid(p.b * p.r)


def _apo_down(p: _Pair) -> Tensor:
    """sig(bc) + 1 - sig(b(c-r)): both down, rejected further, for a policy above its data."""
    return torch.sigmoid(p.b * p.c) + 1 - torch.sigmoid(p.b * (p.c - p.r))


def _simpo(p: _Pair) -> Tensor:
    """-logsig(b(logp_c/len_c - logp_r/len_r) - gamma): Meng et al. 2024 (arXiv:2405.14734)."""
    return -logsigmoid(p.b * (p.mean_c - p.mean_r) - p.simpo_gamma)


def _orpo(p: _Pair) -> Tensor:
    """NLL(chosen) - coef logsig(log-odds difference), token means (arXiv:2403.07691)."""
    log_odds = _log_odds(p.mean_c) - _log_odds(p.mean_r)
    return -p.mean_c - p.orpo_coef * logsigmoid(log_odds)


def _log_odds(mean_logprobs: Tensor) -> Tensor:
    """log(p / (1 - p)), exact if p is close to 0 or 1."""
    mean_logprobs = mean_logprobs.clamp(max=MAX_MEAN_LOGPROB)
    return mean_logprobs - torch.log(-torch.expm1(mean_logprobs))


@dataclass(frozen=True)
class Loss:
    """One loss and what it needs.

    Attributes:
        function: The formula.
        lengths: It reads ``chosen_lengths`` and ``rejected_lengths``.
        reference: It compares with a reference; if not, c and r are the policy's log-probs.
        smoothing: It reads ``label_smoothing``.
        divergence: It is written in D, so that ``f_divergence`` changes it.
        temperature: It reads ``beta``.
        options: Options of its own: arguments of `dpo_loss` and keys of a recipe's `dpo` section.
    """

    function: Callable[[_Pair], Tensor]
    lengths: bool = False
    reference: bool = True
    smoothing: bool = False
    divergence: bool = False
    temperature: bool = True
    options: tuple[str, ...] = ()


LOSSES: dict[str, Loss] = {
    "sigmoid": Loss(_sigmoid, smoothing=True, divergence=True),
    "hinge": Loss(_hinge, divergence=True),
    "ipo": Loss(_ipo, lengths=True),
    "ipo_sum": Loss(_ipo_sum),
    "robust": Loss(_robust, smoothing=True, divergence=True),
    "sigmoid_norm": Loss(_sigmoid_norm, lengths=True),
    "exo_pair": Loss(_exo_pair, smoothing=True, divergence=True),
    "nca_pair": Loss(_nca_pair),
    "bco_pair": Loss(_bco_pair),
    "sppo_hard": Loss(_sppo_hard),
    "apo_zero": Loss(_apo_zero),
    "apo_down": Loss(_apo_down),
    "simpo": Loss(_simpo, lengths=True, reference=False, options=("simpo_gamma",)),
    "orpo": Loss(_orpo, lengths=True, reference=False, temperature=False, options=("orpo_coef",)),
}
OPTIONS = tuple(dict.fromkeys(name for loss in LOSSES.values() for name in loss.options))
"""Options of single losses."""


def losses_that(test: Callable[[Loss], object]) -> str:
    """Names of the losses of which something holds, for a message."""
    return ", ".join(sorted(name for name, loss in LOSSES.items() if test(loss)))


MAX_EXPONENT = 30.0  # e^30 is above any ratio that matters, and its square is a float32


def _expm1(x: Tensor) -> Tensor:
    return torch.expm1(x.clamp(max=MAX_EXPONENT))


# f'(ratio) up to a constant, as a function of the log-ratio x: Wang et al. 2023 (arXiv:2309.16240)
DIVERGENCES: dict[str, Callable[[Tensor, Number], Tensor]] = {
    "reverse_kl": lambda x, alpha: x,
    "forward_kl": lambda x, alpha: -_expm1(-x),
    "js_divergence": lambda x, alpha: math.log(2) + logsigmoid(x),
    "alpha_divergence": lambda x, alpha: _expm1((alpha - 1) * x) / (alpha - 1),
}


def dpo_loss(
    policy_chosen_logprobs: Float[Tensor, " batch"],
    policy_rejected_logprobs: Float[Tensor, " batch"],
    ref_chosen_logprobs: Float[Tensor, " batch"] | None,
    ref_rejected_logprobs: Float[Tensor, " batch"] | None,
    *,
    beta: Number,
    loss_type: str = "sigmoid",
    label_smoothing: Number = 0.0,
    chosen_lengths: Int[Tensor, " batch"] | Float[Tensor, " batch"] | None = None,
    rejected_lengths: Int[Tensor, " batch"] | Float[Tensor, " batch"] | None = None,
    f_divergence: str = "reverse_kl",
    f_alpha: Number = 0.5,
    simpo_gamma: Number = 0.5,
    orpo_coef: Number = 0.1,
) -> DPOLosses:
    """Compute a preference loss per pair, and the implicit rewards.

        sigmoid: -log sigmoid(beta * (c - r)),   c, r = log(policy / reference), chosen, rejected

    Args:
        policy_chosen_logprobs, policy_rejected_logprobs: Sum over the response's tokens, nats; the
            gradient flows here only.
        ref_chosen_logprobs, ref_rejected_logprobs: The same under the frozen reference; None (or
            ignored) for simpo and orpo.
        beta: Temperature of the implicit reward, reward units per nat.
        loss_type: A key of ``LOSSES``; each has its function in this module, with its source.
        label_smoothing: Probability that a label is wrong, in [0, 0.5): sigmoid (cDPO), robust, and
            exo_pair, which needs it above 0.
        chosen_lengths, rejected_lengths: Counted tokens, at least 1: needed by ipo, sigmoid_norm,
            simpo and orpo.
        f_divergence: A key of ``DIVERGENCES``: sigmoid, hinge, robust and exo_pair.
        f_alpha: alpha of the alpha divergence, not 1 (that limit is reverse_kl).
        simpo_gamma: Target margin of simpo, reward units.
        orpo_coef: Weight of orpo's odds-ratio term.

    Returns:
        Losses and rewards: beta * log-ratio of the sums, or beta * mean token log-prob for simpo
        and orpo.

    Raises:
        ValueError: An unknown name, a number out of range, or an option that the loss cannot use.

    Source: Rafailov et al. 2023, eq. 7 (arXiv:2305.18290); of the others, see each function.
    """
    has_lengths = chosen_lengths is not None and rejected_lengths is not None
    _check_options(loss_type, beta, label_smoothing, f_divergence, f_alpha, has_lengths)
    c = _log_ratio(loss_type, policy_chosen_logprobs, ref_chosen_logprobs)
    r = _log_ratio(loss_type, policy_rejected_logprobs, ref_rejected_logprobs)
    s = DIVERGENCES[f_divergence]
    difference = s(c, f_alpha) - s(r, f_alpha)
    mean_c = c / (math.nan if chosen_lengths is None else chosen_lengths)
    mean_r = r / (math.nan if rejected_lengths is None else rejected_lengths)
    options = (beta, label_smoothing, simpo_gamma, orpo_coef)
    per_example = LOSSES[loss_type].function(_Pair(c, r, difference, mean_c, mean_r, *options))
    if not LOSSES[loss_type].reference:
        c, r = mean_c, mean_r
    return DPOLosses(per_example, beta * c.detach(), beta * r.detach())


def _log_ratio(loss_type: str, logprobs: Tensor, ref_logprobs: Tensor | None) -> Tensor:
    """Subtract the reference's log-probs, for a loss with a reference."""
    if not LOSSES[loss_type].reference:
        return upcast(logprobs)
    if ref_logprobs is None:
        raise ValueError(f"loss_type={loss_type!r} needs the reference's log-probs of both")
    return upcast(logprobs) - upcast(ref_logprobs).detach()


def _check_options(
    loss_type: str,
    beta: Number,
    label_smoothing: Number,
    f_divergence: str,
    f_alpha: Number,
    has_lengths: bool,
) -> None:
    """Refuse an option that would be silently ignored, or make the loss undefined."""
    if loss_type not in LOSSES:
        raise ValueError(f"loss_type={loss_type!r}: allowed are {', '.join(LOSSES)}")
    if f_divergence not in DIVERGENCES:
        raise ValueError(f"f_divergence={f_divergence!r}: allowed are {', '.join(DIVERGENCES)}")
    if not beta > 0:
        raise ValueError(f"beta={beta}: must be positive")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing}: must lie in [0, 0.5)")
    if label_smoothing and not LOSSES[loss_type].smoothing:
        allowed = losses_that(lambda loss: loss.smoothing)
        raise ValueError(
            f"label_smoothing={label_smoothing} means nothing to loss_type={loss_type!r}: "
            f"set it to 0 or use one of {allowed}"
        )
    if loss_type == "exo_pair" and label_smoothing == 0:
        raise ValueError("loss_type='exo_pair' is infinite at label_smoothing=0: try 0.001")
    if f_divergence != "reverse_kl" and not LOSSES[loss_type].divergence:
        allowed = losses_that(lambda loss: loss.divergence)
        raise ValueError(
            f"f_divergence={f_divergence!r} means nothing to loss_type={loss_type!r}: "
            f"set it to 'reverse_kl' or use one of {allowed}"
        )
    if f_divergence == "alpha_divergence" and f_alpha == 1:
        raise ValueError("f_alpha=1 divides by 0: its limit is f_divergence='reverse_kl'")
    if LOSSES[loss_type].lengths and not has_lengths:
        raise ValueError(f"loss_type={loss_type!r} needs chosen_lengths and rejected_lengths")


def sft_term(
    policy_chosen_logprobs: Float[Tensor, " batch"],
    chosen_lengths: Int[Tensor, " batch"] | Float[Tensor, " batch"],
) -> Float[Tensor, " batch"]:
    """Token-mean NLL of the chosen response, per pair (RPO).

        -logp(chosen) / len(chosen)

    Args:
        policy_chosen_logprobs: Sum over the response's tokens, nats ``[batch]``.
        chosen_lengths: Counted tokens, at least 1.

    Returns:
        Nats per token; add ``sft_coef`` times this to the preference loss.

    Source: Pang et al. 2024 (arXiv:2404.19733).
    """
    return -upcast(policy_chosen_logprobs) / chosen_lengths


def wpo_weights(
    chosen: Float[Tensor, " batch"], rejected: Float[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """Weight each pair by how likely the policy is to sample it (WPO).

        exp(chosen + rejected)

    Args:
        chosen: Mean over the chosen response's tokens of logp - log sum_v p(v)^2, nats per token;
            the second term is the average for a token drawn from the policy.
        rejected: The same for the rejected response.

    Returns:
        Factors of the loss ``[batch]``, detached.

    Source: Zhou et al. 2024 (arXiv:2406.11827).
    """
    return (upcast(chosen) + upcast(rejected)).exp().detach()
