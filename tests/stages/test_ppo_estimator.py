"""The estimator of advantages that a recipe names, and what is refused beside it."""

from __future__ import annotations

import pytest

from align.config.keys import PPOConfig, PPORecipe
from align.config.sections import GenerationOptions
from align.losses import advantages
from align.losses.advantages import Estimator
from align.stages.ppo.options import check_options
from align.types import AlignError


def recipe(samples_per_prompt: int = 1, **options: object) -> PPORecipe:
    generation = GenerationOptions(samples_per_prompt=samples_per_prompt)
    ppo = PPOConfig(**options)  # type: ignore[arg-type]
    return PPORecipe(model="m", output_dir="o", ppo=ppo, generation=generation)


def test_unknown_ones_and_idle_options_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_options(recipe(gae_lambda=0.5))
    with pytest.raises(AlignError, match=r"ppo.estimator: is 'gea'; allowed are gae"):
        check_options(recipe(estimator="gea"))
    group = Estimator(lambda x: (x.rewards, x.rewards), values=False, groups=True)
    monkeypatch.setitem(advantages.ESTIMATORS, "group", group)
    check_options(recipe(2, estimator="group"))
    with pytest.raises(AlignError, match=r"samples_per_prompt: is 1, and ppo.estimator=group"):
        check_options(recipe(estimator="group"))
    with pytest.raises(AlignError, match=r"ppo.gae_lambda: has no effect with ppo.estimator=group"):
        check_options(recipe(2, estimator="group", gae_lambda=0.5))
