"""The four roles of PPO, loaded: actor, critic, reward, reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from align.base.progress import say
from align.config.keys import PPORecipe
from align.models import (
    Policy,
    ScalarModel,
    load_policy,
    load_scalar_model,
    load_tokenizer,
)
from align.models.load import weights_hash
from align.models.lora import adapter_off
from align.rewards import build_reward
from align.rewards.model import ModelReward, reward_model_loader
from align.stages.common import Session, require_same_vocabulary, same_vocabulary
from align.stages.shared_base import SharedBase
from align.types import RewardSource, TokenBatch


@dataclass(frozen=True)
class Roles:
    """``ref_logprobs`` gives the frozen reference's log-probs of a batch's counted tokens.

    ``weights`` has the hash of every model that the run starts from.
    """

    actor: Policy
    critic: ScalarModel
    reward: RewardSource
    ref_logprobs: Callable[[TokenBatch], Tensor]
    weights: dict[str, str]


def load_roles(recipe: PPORecipe, session: Session) -> Roles:
    """Load each role once; with LoRA, roles that start from the same weights share them."""
    device = session.accelerator.device
    actor = load_policy(
        recipe.model,
        device=device,
        lora=recipe.lora,
        gradient_checkpointing=recipe.gradient_checkpointing,
        **recipe.loading,
    )
    weights = {"actor": weights_hash(actor.inner)}
    base = None if recipe.lora is None else SharedBase(actor)
    load_apart = reward_model_loader(
        device,
        tokens_per_microbatch=recipe.train.tokens_per_microbatch,
        **recipe.loading,
    )

    def load_reward(model: str) -> ModelReward:
        scalar = base.reward_model(model) if base else None
        if scalar is None:
            source = load_apart(model)
            if base:
                base.apart[model] = source.model
        else:
            tokenizer = load_tokenizer(
                model, trust_remote_code=recipe.trust_remote_code, base_model=recipe.base_model
            )
            source = ModelReward(
                scalar, tokenizer, tokens_per_microbatch=recipe.train.tokens_per_microbatch
            )
        weights[f"reward {model}"] = weights_hash(source.model.inner, adapters=True)
        return source

    reward = build_reward(recipe.reward, load_model=load_reward)
    critic = _critic(recipe, session, base)
    actor.activation_offload = critic.activation_offload = recipe.activation_offload
    weights["critic"] = weights_hash(critic.inner)
    ref_logprobs = _reference(recipe, session, actor, weights)
    if base:
        if "reference" not in weights:
            base.roles.append("reference")
        session.run.describe(one_trunk=base.roles)
        for line in base.lines() if session.run.is_main else ():
            say(f"  {line}")
    return Roles(actor, critic, reward, ref_logprobs, weights)


def _critic(recipe: PPORecipe, session: Session, base: SharedBase | None) -> ScalarModel:
    """Load the critic from `critic.model`, else the reward model, else the actor's backbone.

    A critic reads the actor's tokens, so a reward model with another vocabulary cannot start one.
    A critic without a trained head starts at 0 everywhere.
    """
    start, weight = recipe.critic.model, 1.0
    if start is not None:
        require_same_vocabulary("critic.model", start, recipe, session)
    else:
        start = recipe.model
        for term in recipe.reward:
            if term.model is not None and same_vocabulary(term.model, recipe, session):
                # in the unit of what is paid, but for the reward's own mean, which it has to learn
                start, weight = term.model, term.weight
                break
    critic = None
    if base and recipe.lora:
        critic = base.critic(
            start, lora=recipe.lora, gradient_checkpointing=recipe.gradient_checkpointing
        )
    if critic is None:
        critic = load_scalar_model(
            start,
            device=session.accelerator.device,
            lora=recipe.lora,
            gradient_checkpointing=recipe.gradient_checkpointing,
            **recipe.loading,
        )
    critic.scale_head(0.0 if critic.fresh_head else weight)
    if session.run.is_main:
        say(f"  critic starts from {start}" + (", with a new head" if critic.fresh_head else ""))
    return critic


def _reference(
    recipe: PPORecipe, session: Session, actor: Policy, weights: dict[str, str]
) -> Callable[[TokenBatch], Tensor]:
    temperature = recipe.generation.temperature
    if recipe.lora is not None and recipe.reference_model in (None, recipe.model):

        @torch.no_grad()
        def adapter_switched_off(batch: TokenBatch) -> Tensor:
            with adapter_off(actor.model):
                return cast(Tensor, actor(batch, temperature=temperature).logprobs)

        return adapter_switched_off
    if recipe.reference_model is not None:
        require_same_vocabulary("reference_model", recipe.reference_model, recipe, session)
    reference = load_policy(
        recipe.reference_model or recipe.model,
        device=session.accelerator.device,
        frozen=True,
        **recipe.loading,
    )
    weights["reference"] = weights_hash(reference.inner)

    @torch.no_grad()
    def frozen(batch: TokenBatch) -> Tensor:
        return cast(Tensor, reference(batch, temperature=temperature).logprobs)

    return frozen
