"""Refuse keys of a recipe that contradict each other.

Keys that change nothing beside others are in effects.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from align.config.build import KeyProblem
from align.config.effects import check_effects
from align.config.keys import (
    CommonRecipe,
    EvalRecipe,
    GenerateRecipe,
    IterateRecipe,
    PPORecipe,
    SFTRecipe,
)
from align.config.sections import GenerationOptions, TrainOptions

VLLM_LEAST_TEMPERATURE = 0.01
"""vLLM raises a smaller temperature to this one."""


def check_whole(recipe: Any, *, but: Collection[str] = ()) -> None:
    """Raise a ``KeyProblem`` about the first contradiction; ``but``: see `check_effects`."""
    for kinds, check in CHECKS:
        if isinstance(recipe, kinds):
            check(recipe)
    check_effects(recipe, but=but)


def _check_resume(recipe: CommonRecipe | IterateRecipe) -> None:
    if recipe.resume == "auto" and recipe.overwrite:
        raise KeyProblem("resume", "is auto, but overwrite=true starts anew; say one of them")


def _check_sft(recipe: SFTRecipe) -> None:
    if recipe.train.keep_best == "accuracy":
        raise KeyProblem(
            "train.keep_best", "accuracy is not measured on held-out rows here; there is loss"
        )


def _check_streaming(recipe: CommonRecipe) -> None:
    data, train = recipe.data, getattr(recipe, "train", None)
    if not data.streaming:
        return
    if not isinstance(train, TrainOptions):
        raise KeyProblem("data.streaming", "is for sft, rm and dpo; here all rows are read first")
    if train.max_steps is None:
        raise KeyProblem(
            "train.max_steps",
            "is missing: how many rows are streamed is not known before; say how many steps to do",
        )
    if data.order == "shortest_first":
        raise KeyProblem("data.order", "is shortest_first, but the rows of a stream are not known")
    if data.max_train_rows is not None:
        raise KeyProblem(
            "data.max_train_rows", "cannot be picked from a stream; train.max_steps says how many"
        )


def _check_vllm(recipe: PPORecipe | GenerateRecipe | EvalRecipe) -> None:
    for key in ("generation", "sampling"):
        options: GenerationOptions | None = getattr(recipe, key, None)
        if options is None or options.engine != "vllm":
            continue
        if 0 < options.temperature < VLLM_LEAST_TEMPERATURE:
            raise KeyProblem(
                f"{key}.temperature",
                f"is {options.temperature:g}; vLLM samples at {VLLM_LEAST_TEMPERATURE:g} at least, "
                f"or greedily at 0; raise it, or set {key}.engine=align",
            )


def _check_eval(recipe: EvalRecipe) -> None:
    if recipe.model is not None and recipe.models:
        raise KeyProblem("models", "set `models` (name: folder) or `model`, not both")
    judged = recipe.reward and (recipe.preferences.train or recipe.preferences.test)
    if not (recipe.model or recipe.models or judged):
        raise KeyProblem("models", "set `models` (name: folder), `model`, or reward + preferences")
    metric = next((term.metric for term in recipe.reward if term.metric), None)
    if metric and judged:
        raise KeyProblem(
            "preferences",
            f"have no references, which reward.metric={metric} compares with; set preferences=null",
        )
    if recipe.data.train and recipe.data.test:
        raise KeyProblem("data.train", "would not be read beside data.test; remove one of them")
    engines = {
        (s.slots, s.vllm) for s in (recipe.generation, recipe.sampling) if s and s.engine == "vllm"
    }
    if len(engines) > 1:
        raise KeyProblem(
            "sampling", "a process holds one vLLM; give it the slots and vllm of generation"
        )
    if recipe.generation.samples_per_prompt != 1:
        raise KeyProblem(
            "generation.samples_per_prompt",
            "must be 1: BLEU needs one answer to each prompt; see sampling.samples_per_prompt",
        )


def _check_generate(recipe: GenerateRecipe) -> None:
    if recipe.resume == "auto":
        raise KeyProblem("resume", "is auto, but generate has no checkpoints; use overwrite=true")
    if recipe.pairs and not recipe.reward:
        raise KeyProblem("reward", "is empty; pairs are made by a reward, such as a metric")
    if recipe.best_of_n and not recipe.reward:
        raise KeyProblem("reward", "is empty; the best of n is chosen by a reward")
    if recipe.pairs and recipe.generation.samples_per_prompt < 2 and not recipe.also:
        raise KeyProblem("generation.samples_per_prompt", "is 1; pairs need at least 2")


def _check_ppo(recipe: PPORecipe) -> None:
    if not recipe.reward:
        raise KeyProblem("reward", "is empty; name a reward model, a function or a metric")
    if recipe.generation.top_p != 1:
        raise KeyProblem("generation.top_p", "must be 1 for PPO: the ratio needs all tokens")
    if recipe.generation.temperature == 0:
        raise KeyProblem("generation.temperature", "is 0; PPO has to sample, such as at 0.7")
    if recipe.ppo.critic_warmup >= recipe.ppo.iterations:
        raise KeyProblem(
            "ppo.critic_warmup",
            f"is {recipe.ppo.critic_warmup}, as long as the run (ppo.iterations="
            f"{recipe.ppo.iterations}): the actor would learn nothing",
        )
    _check_ppo_batches(recipe)
    _check_kl(recipe)


def _check_iterate(recipe: IterateRecipe) -> None:
    if (recipe.ppo is None) == (recipe.dpo is None):
        raise KeyProblem("ppo", "set `ppo` or `dpo`, not both or none")
    if recipe.ppo and recipe.rm is None:
        raise KeyProblem("rm", "is missing; ppo needs the reward model of each round")


def _check_ppo_batches(recipe: PPORecipe) -> None:
    k, batch = recipe.generation.samples_per_prompt, recipe.ppo.rollout_batch
    if batch % k:
        raise KeyProblem(
            "ppo.rollout_batch", f"is {batch}, no multiple of generation.samples_per_prompt={k}"
        )
    if batch // k < recipe.ppo.num_minibatches:
        raise KeyProblem(
            "ppo.num_minibatches",
            f"is {recipe.ppo.num_minibatches}, more than the {batch // k} prompts of an iteration "
            "(ppo.rollout_batch / generation.samples_per_prompt)",
        )
    if recipe.lora is not None and recipe.lora.dropout:
        raise KeyProblem("lora.dropout", "must be 0 in PPO, or old and new log-probs differ")


def _check_kl(recipe: PPORecipe) -> None:
    kl = recipe.kl
    if kl.charge == "loss" and kl.estimator == "k1":
        raise KeyProblem(
            "kl.estimator",
            "is k1, whose expected gradient as a loss is 0, so that it would charge nothing; "
            "use k2 or k3, or kl.charge=reward",
        )
    if kl.adaptive and kl.coef == 0:
        raise KeyProblem("kl.coef", "is 0 and would stay 0 with kl.adaptive; start above 0")
    if kl.adaptive and recipe.ppo.rollout_batch >= 5 * kl.horizon:
        raise KeyProblem(
            "kl.horizon",
            f"is {kl.horizon}; one rollout of {recipe.ppo.rollout_batch} could turn kl.coef "
            f"negative; use more than {recipe.ppo.rollout_batch // 5}",
        )


CHECKS: tuple[tuple[tuple[type, ...], Callable[[Any], None]], ...] = (
    ((PPORecipe, GenerateRecipe, EvalRecipe), _check_vllm),
    ((CommonRecipe, IterateRecipe), _check_resume),
    ((CommonRecipe,), _check_streaming),
    ((SFTRecipe,), _check_sft),
    ((EvalRecipe,), _check_eval),
    ((GenerateRecipe,), _check_generate),
    ((PPORecipe,), _check_ppo),
    ((IterateRecipe,), _check_iterate),
)
"""Recipes -> what is checked of them, in this order."""
