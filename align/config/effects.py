"""Refuse a key that has no effect beside others, with the reason, unless it has its default.

A key that is accepted and does nothing is a run that differs from its recipe. A condition on one
other key of the same section is the annotation `When` of the field; longer ones are here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeAlias, get_type_hints

from align.config.annotations import When, notes, section_class
from align.config.build import KeyProblem
from align.config.keys import (
    CommonRecipe,
    DPORecipe,
    EvalRecipe,
    GenerateRecipe,
    IterateRecipe,
    PPORecipe,
    RewardRecipe,
    SFTRecipe,
)
from align.config.sections import DataConfig

Reason: TypeAlias = Callable[[Any], str]
"""Say why a key has no effect in a recipe; "" if it has one."""


def check_effects(recipe: Any, *, but: Collection[str] = ()) -> None:
    """Raise a ``KeyProblem`` about the first key that is set and has no effect.

    Args:
        but: Keys and sections that the caller sets itself, whatever the recipe says.
    """
    for key, why in _without_effect(recipe):
        if any(f"{key}.".startswith(f"{name}.") for name in but):
            continue
        if _value(recipe, key) != _default(type(recipe), key):
            raise KeyProblem(key, why if ";" in why else f"{why}; remove it")


def _without_effect(recipe: Any) -> Iterator[tuple[str, str]]:
    """(key, reason) of every key that has no effect in this recipe, set or not."""
    for kinds, rules in RULES:
        if isinstance(recipe, kinds):
            for key, reason in rules.items():
                if why := reason(recipe):
                    yield key, why
    yield from _unmet(recipe)


def _unmet(section: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(key, reason) of every key whose annotation `When` is not met."""
    for name, when in notes(type(section), When).items():
        if getattr(section, when.key) not in when.values:
            yield f"{prefix}{name}", f"has an effect with {prefix}{when} only"
    for f in fields(section):
        inner = getattr(section, f.name)
        if is_dataclass(inner):
            yield from _unmet(inner, f"{prefix}{f.name}.")


def _value(recipe: Any, key: str) -> Any:
    for name in key.split("."):
        recipe = getattr(recipe, name, None)
    return recipe


def _default(cls: type, key: str) -> Any:
    """Value of a key that a recipe leaves out, in a section that it has."""
    name, _, rest = key.partition(".")
    (field,) = (f for f in fields(cls) if f.name == name)
    default = field.default if field.default_factory is MISSING else field.default_factory()
    if not rest:
        return default
    if is_dataclass(default):
        return _value(default, rest)
    section = section_class(get_type_hints(cls)[name])
    return _default(section, rest) if section else None


def _if(test: Callable[[Any], Any], why: str) -> Reason:
    return lambda recipe: why if test(recipe) else ""


# ---------------------------------------------------------------- held-out rows, checkpoints


def _holds_out(recipe: Any) -> bool:
    return bool(recipe.data.test) or recipe.data.test_fraction > 0


def _beside_test(data: Callable[[Any], DataConfig]) -> Reason:
    # test_fraction=0 agrees with `test`: nothing of the training data is held out
    return _if(
        lambda r: data(r).test and data(r).test_fraction,
        "has no effect beside `test`, which is what is held out",
    )


NOTHING_HELD_OUT = "has nothing to measure (no data.test, and data.test_fraction is 0)"
_no_held_out = _if(lambda r: not _holds_out(r), NOTHING_HELD_OUT)

COMMON: dict[str, Reason] = {
    "data.test_fraction": _beside_test(lambda r: r.data),
    "data.max_test_rows": _if(
        lambda r: not isinstance(r, GenerateRecipe) and not _holds_out(r), NOTHING_HELD_OUT
    ),
    "data.loss_on": _if(
        lambda r: not isinstance(r, SFTRecipe),
        "is for sft only: here every response token counts",
    ),
}


TRAINED: dict[str, Reason] = {
    "train.eval_every": _no_held_out,
    "train.keep_best": lambda r: (
        "has nothing to choose from; set train.save_every above 0 beside it"
        if not r.train.save_every
        else "has no held-out rows to measure; hold some out (data.test_fraction, data.test)"
        if not _holds_out(r)
        else ""
    ),
    "train.keep_checkpoints": _if(
        lambda r: not r.train.save_every, "has no effect with train.save_every=0"
    ),
}
STEPPED: dict[str, Reason] = {
    "train.epochs": _if(
        lambda r: r.train.max_steps is not None,
        "has no effect beside train.max_steps, which says how long the run is",
    ),
}


def _sampled(name: str) -> dict[str, Reason]:
    """Rules for the sampling options in the section ``name``."""

    def greedy(recipe: Any) -> bool:
        section = getattr(recipe, name, None)
        return section is not None and section.temperature == 0

    return {
        f"{name}.top_p": _if(greedy, f"has no effect with {name}.temperature=0, which is greedy"),
        f"{name}.samples_per_prompt": _if(
            greedy,
            f"gives one response again and again with {name}.temperature=0, which is greedy",
        ),
    }


# ---------------------------------------------------------------- single stages


def _one_update(recipe: PPORecipe) -> bool:
    return recipe.ppo.epochs * recipe.ppo.num_minibatches == 1


ONE_UPDATE = (
    "has no effect with one step for each rollout (ppo.epochs x ppo.num_minibatches = 1): "
    "the policy is still the one that sampled"
)
PPO: dict[str, Reason] = {
    "ppo.clip_range": _if(_one_update, ONE_UPDATE),
    # 0 switches it off, so it is not refused
    "ppo.value_clip_range": _if(lambda r: _one_update(r) and r.ppo.value_clip_range, ONE_UPDATE),
    "kl.charge": _if(lambda r: r.kl.coef == 0, "has no effect with kl.coef=0: nothing is charged"),
}
REWARD_MODEL: dict[str, Reason] = {
    "reward_model.pooling_layer": _if(
        lambda r: r.lora is not None,
        "cannot be trained with lora, which trains adapters and the head alone",
    ),
}
GENERATE: dict[str, Reason] = {
    "data.test": lambda _: (
        "has no effect in generate, which samples from every prompt of data.train"
    ),
    "data.test_fraction": lambda _: "has no effect in generate, which holds out nothing",
    "data.max_test_rows": lambda _: "has no effect in generate, which holds out nothing",
    "data.order": lambda _: "has no effect in generate, which goes through all prompts",
    "gradient_checkpointing": lambda _: "has no effect without training",
    "activation_offload": lambda _: "has no effect without training",
    "trackers": lambda _: "has no effect in generate, which has no steps",
    "best_of_n": _if(
        lambda r: r.generation.samples_per_prompt == 1 and not r.also,
        "has one response to choose from; set generation.samples_per_prompt, or `also`",
    ),
}


def _num_models(recipe: EvalRecipe) -> int:
    return len(recipe.models) + bool(recipe.model)


def _num_systems(recipe: EvalRecipe) -> int:
    return _num_models(recipe) + bool(recipe.best_of_n)


_no_judged = _if(
    lambda r: not (r.preferences.train or r.preferences.test),
    "has no effect without preferences.train or preferences.test",
)
_whole_prompts = (
    "has no effect in eval, which takes every prompt whole (data.max_test_rows takes a part of the "
    "prompts)"
)
NOT_IN_EVAL = ("max_tokens", "max_train_rows", "loss_on", "order", "streaming", "streaming_window")
# preferences without a reward, and best_of_n without what it needs, are no error: the run skips
# them with a warning, so that a shipped evaluation stays usable with reward=null
EVAL: dict[str, Reason] = {
    **{f"data.{key}": lambda _: _whole_prompts for key in (*NOT_IN_EVAL, "test_fraction")},
    **{f"preferences.{key}": lambda _: "has no effect in eval" for key in NOT_IN_EVAL},
    "preferences.train": _if(lambda r: r.preferences.test, "has no effect beside preferences.test"),
    "preferences.test_fraction": lambda r: (
        _beside_test(lambda r: r.preferences)(r) or _no_judged(r)
    ),
    **{f"preferences.{key}": _no_judged for key in ("columns", "on_bad_row", "max_test_rows")},
    "judge": _if(lambda r: _num_systems(r) < 2, "compares two models, and there is one"),
    "tie_margin": _if(
        lambda r: _num_systems(r) < 2 or not (r.reward or r.gold_reward),
        "has an effect where a reward compares two models",
    ),
}
ITERATE: dict[str, Reason] = {
    "reference": _if(lambda r: r.rounds == 1, "has no effect in the first round, and rounds is 1"),
    "stop.patience": _if(
        lambda r: r.stop.patience is not None and r.stop.patience >= r.rounds,
        "has no effect: there are no more rounds than that",
    ),
}

RULES: tuple[tuple[tuple[type, ...], dict[str, Reason]], ...] = (
    ((CommonRecipe,), COMMON),
    ((SFTRecipe, RewardRecipe, DPORecipe, PPORecipe), TRAINED),
    ((SFTRecipe, RewardRecipe, DPORecipe), STEPPED),
    ((RewardRecipe,), REWARD_MODEL),
    ((PPORecipe,), PPO),
    ((GenerateRecipe,), GENERATE),
    ((GenerateRecipe, EvalRecipe), _sampled("generation")),
    ((EvalRecipe,), EVAL | _sampled("sampling")),
    ((IterateRecipe,), ITERATE),
)
