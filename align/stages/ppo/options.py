"""Refuse PPO options that do not fit together, in `align check` and in the run."""

from __future__ import annotations

from align.config.keys import PPOConfig, PPORecipe
from align.losses.advantages import ESTIMATORS, OPTIONS
from align.types import AlignError


def check_options(recipe: PPORecipe) -> None:
    """Refuse an estimator that there is not, or options that it cannot use."""
    name = recipe.ppo.estimator
    if name not in ESTIMATORS:
        raise AlignError(f"ppo.estimator: is {name!r}; allowed are {', '.join(ESTIMATORS)}")
    if ESTIMATORS[name].groups and recipe.generation.samples_per_prompt < 2:
        raise AlignError(
            f"generation.samples_per_prompt: is 1, and ppo.estimator={name} compares the responses "
            "of one prompt; set at least 2"
        )
    for option in OPTIONS:
        given = getattr(recipe.ppo, option)
        if option not in ESTIMATORS[name].options and given != getattr(PPOConfig(), option):
            raise AlignError(f"ppo.{option}: has no effect with ppo.estimator={name}; remove it")
