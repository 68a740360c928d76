"""The load-balancing loss of a mixture of experts, over packed rows.

    loss = E * sum_e f_e P_e

``f_e`` is the share of (token, choice) pairs that expert e gets, times the choices of a token;
``P_e`` the mean probability that the router gives it; both over the tokens of all layers of one
microbatch. Padding counts nowhere, and a prompt that several responses share counts once.

Source: Fedus et al. 2021, eqs. 4-6 (arXiv:2101.03961), as transformers computes it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from align.types import AlignError, TokenBatch

if TYPE_CHECKING:
    from align.models.policy import Packed


def has_router(config: Any) -> bool:
    """Tell whether the config has a load-balancing loss."""
    text = config.get_text_config()
    return hasattr(text, "router_aux_loss_coef") and hasattr(text, "num_experts_per_tok")


def require_router(model: str, config: Any) -> None:
    """Refuse the loss for a dense model, or for one whose router is balanced otherwise."""
    if not has_router(config):
        raise AlignError(
            f"train.router_aux_coef: has no effect on {model}: {config.model_type} has no router "
            "with a load-balancing loss; remove it"
        )


def collect_router_logits(model: Packed) -> None:
    """Keep the router's logits of each forward pass, for `router_loss`.

    Raises:
        AlignError: The model is dense, or transformers does not give its router's logits.
    """
    require_router(model.name, model.inner.config)
    if "router_logits" not in getattr(model.backbone, "_can_record_outputs", {}):
        raise AlignError(
            f"train.router_aux_coef: transformers does not give the router's logits of "
            f"{type(model.inner).__name__}; remove it"
        )
    model.collects_router_logits = True


def router_loss(model: Packed, batch: TokenBatch) -> Tensor | None:
    """Compute the loss of the last forward pass, which was over ``batch``; None if it is off."""
    logits, model.router_logits = model.router_logits, None
    if logits is None:
        return None
    config = model.inner.config.get_text_config()
    return load_balancing_loss_func(
        tuple(layer.float() for layer in logits),
        logits[0].shape[-1],
        config.num_experts_per_tok,
        attention_mask=batch.segment_ids > 0,
    )
