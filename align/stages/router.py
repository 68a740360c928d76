"""Add the load-balancing loss of a mixture of experts to a stage's loss."""

from __future__ import annotations

from torch import Tensor

from align.base.progress import say
from align.models.policy import Packed
from align.models.router import collect_router_logits, has_router
from align.stages.common import Session
from align.training.objective import StepOutput


def use_router_loss(model: Packed, coef: float, session: Session) -> None:
    """Switch a mixture's load-balancing loss on, or report that it is off.

    Raises:
        AlignError: It is requested, and the model is dense.
    """
    if coef:
        collect_router_logits(model)
    elif has_router(model.inner.config) and session.run.is_main:
        usual = model.inner.config.get_text_config().router_aux_loss_coef
        say(
            "  a mixture of experts, trained without its load-balancing loss; its config's weight "
            f"of it: train.router_aux_coef={usual:g}"
        )


def add_router_loss(
    output: StepOutput, loss: Tensor | None, *, coef: float, units: float
) -> StepOutput:
    """Add the load-balancing loss of a microbatch, weighted by its ``units``.

    ``loss`` is logged without it.
    """
    if loss is None:
        return output
    sums = {**output.sums, "router_loss": (loss.item() * units, units)}
    return StepOutput(output.loss + coef * units * loss, sums)
