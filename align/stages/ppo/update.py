"""The PPO update: epochs of minibatches over one rollout, each minibatch one optimizer step.

A loss is a mean over *all tokens of the minibatch*, however it is cut into microbatches and spread
over ranks. Actor and critic have an optimizer each, and their gradients are clipped apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from align.config.keys import PPORecipe
from align.data.tokens.packing import counted_coordinates
from align.losses import approx_kl, clip_fraction, kl_estimate, masked_mean, ppo_policy_loss
from align.losses import value_loss as clipped_value_loss
from align.models.policy import Packed
from align.rollout.experience import rollout_groups
from align.stages.common import Session
from align.stages.ppo.metrics import require_first_ratio
from align.stages.ppo.roles import Roles
from align.training.checkpoint import Trained
from align.training.distributed import (
    clip_gradients,
    max_over_processes,
    my_share,
    prepare,
    sum_over_processes,
    without_sync,
)
from align.training.microbatches import Microbatches
from align.training.optim import make_optimizer, set_lr
from align.types import AlignError, Experience, PromptExample, TokenBatch, TokenGroup

MUST_BE_FINITE = ("policy_loss", "value_loss", "grad_norm", "critic_grad_norm")

Accept = Callable[[Mapping[str, float], Sequence[str]], bool]
"""Called with numbers that must be finite and the ids of their prompts; False skips the optimizer
step."""


class Learner:
    """A role that is trained: its model, its optimizer and its peak learning rate."""

    def __init__(self, role: Packed, recipe: PPORecipe, session: Session, *, lr: float) -> None:
        self.lr = lr
        self.optim, self.accelerator = recipe.optim, session.accelerator
        self.model = prepare(role, session.accelerator)
        self.optimizer = make_optimizer(role, recipe.optim, lr=lr)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss whose denominator is that of all ranks together."""
        # an average over ranks follows
        self.accelerator.backward(loss * self.accelerator.num_processes)

    def clip_gradients(self) -> float:
        """Clip the gradients' norm; returns the norm before that."""
        return clip_gradients(self.model, self.optim.max_grad_norm, self.accelerator)

    def drop_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class Minibatch:
    """Some prompts of a rollout, with all their responses.

    Attributes:
        groups: Every prompt of the rollout with its responses.
        members: The minibatch's prompts, as indices into ``groups``.
        ids: The ids of these prompts.
        kl_coef: Weight of the KL loss where KL is one, reward units per nat.
        trains_actor: False while the critic alone learns.
    """

    experience: Experience
    groups: Sequence[TokenGroup]
    members: Sequence[int]
    ids: Sequence[str]
    kl_coef: float
    trains_actor: bool


class Update:
    """Train actor and critic on one rollout.

    Attributes:
        trained: What a checkpoint holds: name of a role -> its model and optimizer.
        microbatches: The token budget, which falls when memory runs out.
        ratio_checked: True once this process has required a probability ratio of 1.
    """

    def __init__(self, recipe: PPORecipe, session: Session, roles: Roles) -> None:
        self.recipe, self.roles, self.accelerator = recipe, roles, session.accelerator
        world = session.accelerator.num_processes
        num_prompts = recipe.ppo.rollout_batch // recipe.generation.samples_per_prompt
        if num_prompts // recipe.ppo.num_minibatches < world:
            raise AlignError(
                f"ppo.rollout_batch: a minibatch has {num_prompts // recipe.ppo.num_minibatches} "
                f"prompts, too few for {world} processes"
            )
        self.microbatches = Microbatches(recipe.train.tokens_per_microbatch, num_processes=world)
        self.ratio_checked = False
        lr, critic_lr = recipe.optim.lr, recipe.critic.lr
        critic_lr = lr if critic_lr is None else critic_lr
        self.actor = Learner(roles.actor, recipe, session, lr=lr)
        self.critic = Learner(roles.critic, recipe, session, lr=critic_lr)
        self.trained: Trained = {
            "actor": (roles.actor, self.actor.optimizer),
            "critic": (roles.critic, self.critic.optimizer),
        }

    def __call__(
        self,
        experience: Experience,
        examples: Sequence[PromptExample],
        iteration: int,
        kl_coef: float,
        accept: Accept,
    ) -> dict[str, float]:
        """Run all epochs of minibatches; returns means over the optimizer steps that were taken.

        Args:
            examples: The rollout's prompts.
            iteration: The iteration that the rollout belongs to, from 0.
        """
        ppo = self.recipe.ppo
        groups = rollout_groups(experience.rollout, self.recipe.generation.samples_per_prompt)
        first_step = iteration * ppo.epochs * ppo.num_minibatches
        trains_actor, lr = iteration >= ppo.critic_warmup, 0.0
        taken: dict[int, dict[str, float]] = {}
        for number, members in enumerate(self._minibatches(iteration, len(groups))):
            step = first_step + number
            lr = self._set_lr(step)
            ids = [examples[i].id for i in members]
            minibatch = Minibatch(experience, groups, members, ids, kl_coef, trains_actor)
            metrics = self._step(minibatch, accept, is_first=not taken)
            if metrics:
                taken[number] = metrics
        names = [name for name in next(iter(taken.values()), {}) if name != "ratio_error"]
        means = {n: sum(m[n] for m in taken.values()) / len(taken) for n in names}
        if taken:
            means["first_ratio_error"] = next(iter(taken.values()))["ratio_error"]
        return means | {"lr": lr, "tokens_per_microbatch": float(self.microbatches.tokens)}

    def _minibatches(self, iteration: int, num_prompts: int) -> Iterator[list[int]]:
        """Yield the prompts of each minibatch; every epoch cuts the rollout in another way."""
        for epoch in range(self.recipe.ppo.epochs):
            rng = np.random.default_rng([self.recipe.seed, iteration, epoch])
            parts = np.array_split(rng.permutation(num_prompts), self.recipe.ppo.num_minibatches)
            yield from (part.tolist() for part in parts)

    def _set_lr(self, step: int) -> float:
        """Set both learning rates for an optimizer step of the run; returns the actor's."""
        ppo, optim = self.recipe.ppo, self.recipe.optim
        total = ppo.iterations * ppo.epochs * ppo.num_minibatches
        set_lr(self.critic.optimizer, self.critic.lr, step, total, optim)
        return set_lr(self.actor.optimizer, self.actor.lr, step, total, optim)

    def _step(self, minibatch: Minibatch, accept: Accept, *, is_first: bool) -> dict[str, float]:
        """Take one optimizer step of each learner; returns {} if ``accept`` skips it.

        Args:
            is_first: No step was taken on this rollout yet: the weights are those that sampled it,
                and the probability ratios have to be 1.
        """
        metrics, ratio_error = self._accumulate(minibatch)
        learners = [self.actor, self.critic] if minibatch.trains_actor else [self.critic]
        if minibatch.trains_actor:
            metrics["grad_norm"] = self.actor.clip_gradients()
        metrics["critic_grad_norm"] = self.critic.clip_gradients()
        finite = {name: metrics[name] for name in MUST_BE_FINITE if name in metrics}
        accepted = accept(finite, minibatch.ids)
        if is_first and accepted and not self.ratio_checked:
            require_first_ratio(self.roles.actor, ratio_error, self.recipe)
            self.ratio_checked = True
        for learner in learners:
            if accepted:
                learner.optimizer.step()
            learner.drop_gradients()
        return metrics | {"ratio_error": ratio_error} if accepted else {}

    def _accumulate(self, minibatch: Minibatch) -> tuple[dict[str, float], float]:
        """Add up the gradients of a minibatch, one microbatch after the other.

        Returns:
            Means over the minibatch's tokens on all ranks, and how far the probability ratio of any
            token is from 1.
        """
        self.actor.model.train()
        self.critic.model.train()
        mine = my_share(minibatch.members, self.accelerator)
        denominator = sum(minibatch.groups[i].num_counted for i in minibatch.members)
        sums: dict[str, float] = {}
        errors: list[float] = []

        def visit(batch: TokenBatch, last: bool) -> None:
            batch = batch.to(self.accelerator.device)
            k = self.recipe.generation.samples_per_prompt
            take = _AtTokens(minibatch.experience, batch, mine, k)
            with without_sync(self.accelerator, self.actor.model, last=last):
                loss, found, error = self._policy_loss(take, batch, minibatch.kl_coef, denominator)
                if minibatch.trains_actor:
                    self.actor.backward(loss)
            with without_sync(self.accelerator, self.critic.model, last=last):
                loss = self._value_loss(take, batch, denominator)
                self.critic.backward(loss)
            errors.append(error)
            for name, value in (found | {"value_loss": loss.item()}).items():
                sums[name] = sums.get(name, 0.0) + value

        def restart() -> None:
            sums.clear()
            errors.clear()
            self.actor.drop_gradients()
            self.critic.drop_gradients()

        self.microbatches.accumulate([minibatch.groups[i] for i in mine], visit, restart)
        metrics = sum_over_processes(sums, self.accelerator)
        return metrics, max_over_processes(max(errors), self.accelerator)

    def _policy_loss(
        self, take: Callable[[str], Tensor], batch: TokenBatch, kl_coef: float, denominator: int
    ) -> tuple[Tensor, dict[str, float], float]:
        """Clipped surrogate, KL and entropy of a microbatch: loss, metrics, largest ratio error."""
        recipe, ppo = self.recipe, self.recipe.ppo
        statistics = self.actor.model(
            batch,
            temperature=recipe.generation.temperature,
            statistics=ppo.entropy_coef != 0,
        )
        logprobs, old = statistics.logprobs[None], take("logprobs")
        advantages, mask = take("advantages"), torch.ones_like(old, dtype=torch.bool)
        clip = {"clip_range": ppo.clip_range, "denominator": denominator}
        policy_loss = ppo_policy_loss(logprobs, old, advantages, mask, **clip)
        loss = policy_loss
        if recipe.kl.charge == "loss":
            kl = kl_estimate(logprobs, take("ref_logprobs"), recipe.kl.estimator)
            loss = loss + kl_coef * masked_mean(kl, mask, denominator=denominator)
        if ppo.entropy_coef:
            entropy = masked_mean(statistics.entropy[None], mask, denominator=denominator)
            loss = loss - ppo.entropy_coef * entropy
        detached = logprobs.detach()
        found = {
            "policy_loss": policy_loss.item(),
            "clip_fraction": clip_fraction(detached, old, advantages, mask, **clip).item(),
            "approx_kl": approx_kl(detached, old, mask, denominator=denominator).item(),
        }
        return loss, found, (detached - old).exp().sub(1).abs().max().item()

    def _value_loss(
        self, take: Callable[[str], Tensor], batch: TokenBatch, denominator: int
    ) -> Tensor:
        values = self.critic.model(batch, at="counted")[None]
        return clipped_value_loss(
            values,
            take("values"),
            take("returns"),
            torch.ones_like(values, dtype=torch.bool),
            clip_range=self.recipe.ppo.value_clip_range or None,
            denominator=denominator,
        )


class _AtTokens:
    """Look up an experience's numbers at a batch's counted tokens, as ``[1,N]``.

    Args:
        members: The prompts that the batch's groups were made of.
        k: Responses to each prompt.
    """

    def __init__(
        self, experience: Experience, batch: TokenBatch, members: Sequence[int], k: int
    ) -> None:
        sequence, self.offset = counted_coordinates(batch)
        # sequence s of the batch is response s % k to this rank's (s // k)-th prompt
        prompts = torch.tensor(list(members), device=sequence.device)
        self.row = prompts[sequence // k] * k + sequence % k
        self.experience = experience

    def __call__(self, field: str) -> Tensor:
        source = self.experience.rollout if field == "logprobs" else self.experience
        return getattr(source, field)[self.row, self.offset][None]
