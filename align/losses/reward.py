"""Loss of the reward model on preference pairs."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from align.losses.masked import Number, upcast


def bradley_terry_loss(
    chosen_scores: Float[Tensor, " batch"],
    rejected_scores: Float[Tensor, " batch"],
    *,
    margin: Float[Tensor, " batch"] | None = None,
    center_coef: Number = 0.0,
) -> Float[Tensor, " batch"]:
    """Negative log-probability that chosen beats rejected, per pair.

        -log sigmoid(chosen - rejected - margin) + center_coef * (chosen + rejected)^2

    Args:
        chosen_scores: Scores of the preferred responses, reward units.
        rejected_scores: Scores of the other responses.
        margin: Margin by which chosen should win, reward units; 0 for a pair without one.
        center_coef: Weight of the term that keeps scores near 0; pairs do not fix their level.

    Returns:
        ``[batch]`` nats, float32.

    Source: Ouyang et al. 2022, eq. 1 (arXiv:2203.02155); margin: Touvron et al. 2023
        (arXiv:2307.09288); centring: Eisenstein et al. 2023 (arXiv:2312.09244).
    """
    if center_coef < 0:
        raise ValueError(f"center_coef={center_coef}: must be 0 or positive")
    chosen, rejected = upcast(chosen_scores), upcast(rejected_scores)
    difference = chosen - rejected
    if margin is not None:
        difference = difference - upcast(margin)
    return -logsigmoid(difference) + center_coef * (chosen + rejected) ** 2
