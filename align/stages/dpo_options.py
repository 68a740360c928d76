"""Refuse DPO options that do not fit together, in `align check` and in the run."""

from __future__ import annotations

from collections.abc import Callable

import torch

from align.config.keys import DPOConfig, DPORecipe
from align.losses.dpo import LOSSES, OPTIONS, dpo_loss, losses_that
from align.types import AlignError


def _own(name: str) -> Callable[[DPOConfig], str]:
    """For an option of single losses."""
    why = f"has an effect with loss_type={losses_that(lambda loss: name in loss.options)} only"
    return lambda options: "" if name in LOSSES[options.loss_type].options else why


# key -> why it has no effect under these options; "" if it has one
IDLE_UNLESS: dict[str, Callable[[DPOConfig], str]] = {
    **{name: _own(name) for name in OPTIONS},
    "beta": lambda o: (
        "" if LOSSES[o.loss_type].temperature else f"{o.loss_type} has no temperature"
    ),
    "reference": lambda o: (
        "" if LOSSES[o.loss_type].reference else f"{o.loss_type} has no reference"
    ),
}


def check_options(recipe: DPORecipe) -> None:
    """Refuse a combination before anything is loaded."""
    options = recipe.dpo
    if options.loss_type not in LOSSES:
        raise AlignError(
            f"dpo.loss_type: got {options.loss_type!r}; allowed are {', '.join(LOSSES)}"
        )
    if not LOSSES[options.loss_type].reference and options.reference_model is not None:
        raise AlignError(f"dpo.reference_model: {options.loss_type} has no reference; remove it")
    for key, needed in IDLE_UNLESS.items():
        given = getattr(options, key)
        if given != getattr(DPOConfig(), key) and needed(options):
            raise AlignError(f"dpo.{key}: {needed(options)}; remove it")
    if options.reference == "adapter_off" and recipe.lora is None:
        raise AlignError("dpo.reference: adapter_off needs `lora`; use cached or online")
    if options.reference == "adapter_off" and options.reference_model is not None:
        raise AlignError("dpo.reference: adapter_off has no other reference_model; use cached")
    has_reference = LOSSES[options.loss_type].reference
    if recipe.data.streaming and has_reference and options.reference == "cached":
        raise AlignError(
            "dpo.reference: is cached, which needs all rows on the disk, and data.streaming=true "
            "keeps none; set online (or adapter_off with `lora`)"
        )
    ones = torch.ones(1)
    try:
        dpo_loss(
            ones,
            ones,
            ones,
            ones,
            beta=options.beta,
            loss_type=options.loss_type,
            label_smoothing=options.label_smoothing,
            f_divergence=options.f_divergence,
            f_alpha=options.f_alpha,
            chosen_lengths=ones,
            rejected_lengths=ones,
        )
    except ValueError as error:
        raise AlignError(f"dpo: {error}") from error
