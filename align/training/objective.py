"""Objective of a stage: a loss function over microbatches, and the sums that it reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from align.types import TokenBatch, TokenGroup


@dataclass(frozen=True)
class StepOutput:
    """Loss and metrics of one microbatch.

    Attributes:
        loss: Scalar with a gradient, *summed* over the microbatch's units.
        sums: Name -> (sum, weight): logged as the weighted mean over the whole step; ``loss``
            with the stage's units as its weight.
    """

    loss: Tensor
    sums: Mapping[str, tuple[float, float]]


LossFn = Callable[[TokenBatch, Sequence[TokenGroup]], StepOutput]
"""``loss_fn(batch, groups)``: sequences of ``batch`` are numbered over the groups in order."""


def one_unit(group: TokenGroup) -> int:
    """Count a pair as one unit, however many tokens it has."""
    return 1


@dataclass(frozen=True)
class Objective:
    """Loss of a stage and the numbers that it measures.

    Attributes:
        loss_fn: Loss of training groups; it runs the model.
        held_out_loss_fn: Loss of held-out groups; None where ``loss_fn`` serves both.
        num_units: What a group adds to the loss's denominator, such as its counted tokens.
        derive: Further held-out numbers, made of the measured ones.
    """

    loss_fn: LossFn
    held_out_loss_fn: LossFn | None = None
    num_units: Callable[[TokenGroup], int] = one_unit
    derive: Callable[[Mapping[str, float]], dict[str, float]] = lambda found: {}


def add_sums(
    sums: dict[str, float], more: Mapping[str, tuple[float, float]], times: float = 1.0
) -> None:
    """Add ``times`` the (sum, weight) of each name to ``sums``, in place."""
    for name, (value, weight) in more.items():
        sums[name] = sums.get(name, 0.0) + times * value
        if weight:
            sums[f"{name}/weight"] = sums.get(f"{name}/weight", 0.0) + times * weight


def means(sums: Mapping[str, float]) -> dict[str, float]:
    """Divide sums by their weights; a sum without a weight stays a sum."""
    return {
        name: value / sums.get(f"{name}/weight", 1.0)
        for name, value in sums.items()
        if not name.endswith("/weight")
    }
