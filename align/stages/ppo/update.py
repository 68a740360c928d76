"""The PPO update: epochs of minibatches over one rollout, each minibatch one optimizer step.

A loss is a mean over *all tokens of the minibatch*, whatever microbatches and processes it is cut
into. Actor and critic have an optimizer each, and their gradients are clipped apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from align.config.keys import PPORecipe
from align.data.tokens.packing import counted_coordinates
from align.losses import approx_kl, clip_fraction, kl_estimate, masked_mean, ppo_policy_loss
from align.losses import value_loss as clipped_value_loss
from align.models import Policy
from align.rollout.experience import rollout_groups
from align.stages.common import Session
from align.stages.ppo.hand import Hand
from align.stages.ppo.roles import Roles
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
from align.types import AlignError, Experience, TokenBatch, TokenGroup


class Update:
    """Calling it trains actor and critic on one rollout and returns what happened."""

    def __init__(self, recipe: PPORecipe, session: Session, roles: Roles) -> None:
        self.recipe, self.session, self.roles = recipe, session, roles
        self.accelerator = session.accelerator
        prompts = recipe.ppo.rollout_batch // recipe.generation.samples_per_prompt
        if prompts // recipe.ppo.num_minibatches < self.accelerator.num_processes:
            raise AlignError(
                f"ppo.rollout_batch: a minibatch has {prompts // recipe.ppo.num_minibatches} "
                f"prompts, too few for {self.accelerator.num_processes} processes"
            )
        self.microbatches = Microbatches(
            recipe.tokens_per_microbatch, num_processes=self.accelerator.num_processes
        )
        self.actor = prepare(roles.actor, self.accelerator)
        self.critic = prepare(roles.critic, self.accelerator)
        self.actor_lr = recipe.optim.lr
        self.critic_lr = recipe.optim.lr if recipe.critic.lr is None else recipe.critic.lr
        self.actor_optimizer = make_optimizer(roles.actor, recipe.optim, lr=self.actor_lr)
        self.critic_optimizer = make_optimizer(roles.critic, recipe.optim, lr=self.critic_lr)
        self.trained = {
            "actor": (roles.actor, self.actor_optimizer),
            "critic": (roles.critic, self.critic_optimizer),
        }

    def __call__(
        self,
        experience: Experience,
        iteration: int,
        kl_coef: float,
        hand: Hand,
        *,
        accept: Callable[[Mapping[str, float], Sequence[int]], bool],
        between: Callable[[], None],
    ) -> dict[str, float]:
        """All minibatches that ``hand`` has not done yet; it is kept up to date.

        Args:
            accept: Told what must be finite and of which prompts; False leaves the step out.
            between: Called between two minibatches, where the state is whole.
        """
        ppo = self.recipe.ppo
        k = self.recipe.generation.samples_per_prompt
        groups = rollout_groups(experience.rollout, k)
        per_iteration = ppo.epochs * ppo.num_minibatches
        total = ppo.iterations * per_iteration
        sums = hand.sums
        lr = 0.0
        while hand.minibatches < per_iteration:
            epoch, number = divmod(hand.minibatches, ppo.num_minibatches)
            rng = np.random.default_rng([self.recipe.seed, iteration, epoch])
            order = rng.permutation(len(groups))
            members = np.array_split(order, ppo.num_minibatches)[number].tolist()
            step = iteration * per_iteration + hand.minibatches
            lr = set_lr(self.actor_optimizer, self.actor_lr, step, total, self.recipe.optim)
            set_lr(self.critic_optimizer, self.critic_lr, step, total, self.recipe.optim)
            train_actor = iteration >= ppo.critic_warmup
            found = self._minibatch(
                experience, groups, members, kl_coef, train_actor, accept, is_first=step == 0
            )
            if hand.minibatches == 0 and found:
                # of the same weights still: sampling and training agree on the log-probs
                sums["first_ratio_error"] = found["ratio_error"]
            found.pop("ratio_error", None)
            for name, value in (found | {"taken": 1.0} if found else {}).items():
                sums[name] = sums.get(name, 0.0) + value
            hand.minibatches += 1
            if hand.minibatches < per_iteration:
                between()
        taken = sums.get("taken", 1.0)
        once = {name: sums[name] for name in ("first_ratio_error",) if name in sums}
        means = {n: value / taken for n, value in sums.items() if n not in (*once, "taken")}
        return means | once | {"lr": lr, "tokens_per_microbatch": float(self.microbatches.tokens)}

    def _minibatch(
        self,
        experience: Experience,
        groups: Sequence[TokenGroup],
        members: Sequence[int],
        kl_coef: float,
        train_actor: bool,
        accept: Callable[[Mapping[str, float], Sequence[int]], bool],
        *,
        is_first: bool,
    ) -> dict[str, float]:
        """One optimizer step of each, if all is finite; means over the minibatch's tokens.

        Args:
            is_first: It is the run's first, whose ratios have to be 1 before anything is changed.
        """
        self.actor.train()
        self.critic.train()
        mine = my_share(members, self.accelerator)
        denominator = sum(groups[i].num_counted for i in members)
        world = self.accelerator.num_processes
        sums: dict[str, float] = {}
        errors: list[float] = []

        def visit(batch: TokenBatch, last: bool) -> None:
            batch = batch.to(self.accelerator.device)
            take = _Taken(experience, batch, mine, self.recipe.generation.samples_per_prompt)
            with without_sync(self.accelerator, self.actor, last=last):
                loss, found, error = self._policy_loss(take, batch, kl_coef, denominator)
                if train_actor:
                    self.accelerator.backward(loss * world)
            with without_sync(self.accelerator, self.critic, last=last):
                loss = self._value_loss(take, batch, denominator)
                self.accelerator.backward(loss * world)
            found["value_loss"] = loss.item()
            errors.append(error)
            for name, value in found.items():
                sums[name] = sums.get(name, 0.0) + value

        def restart() -> None:
            sums.clear()
            errors.clear()
            for _, optimizer in self.trained.values():
                optimizer.zero_grad(set_to_none=True)

        self.microbatches.accumulate([groups[i] for i in mine], visit, restart)
        metrics = sum_over_processes(sums, self.accelerator)
        must_be_finite = {name: metrics[name] for name in ("policy_loss", "value_loss")}
        stepping = {"critic_grad_norm": (self.critic, self.critic_optimizer)}
        if train_actor:
            stepping = {"grad_norm": (self.actor, self.actor_optimizer)} | stepping
        for name, (model, _) in stepping.items():
            limit = self.recipe.optim.max_grad_norm
            metrics[name] = clip_gradients(model, limit, self.accelerator)
            must_be_finite[name] = metrics[name]
        worst = max_over_processes(max(errors), self.accelerator)
        accepted = accept(must_be_finite, members)
        if is_first and accepted:
            require_first_ratio(self.roles.actor, worst, self.recipe)
        for _, optimizer in stepping.values():
            if accepted:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return metrics | {"ratio_error": worst} if accepted else {}

    def _policy_loss(
        self, take: Callable[[str], Tensor], batch: TokenBatch, kl_coef: float, denominator: int
    ) -> tuple[Tensor, dict[str, float], float]:
        recipe, ppo = self.recipe, self.recipe.ppo
        statistics = self.actor(
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
        values = self.critic(batch, at="counted")[None]
        return clipped_value_loss(
            values,
            take("values"),
            take("returns"),
            torch.ones_like(values, dtype=torch.bool),
            clip_range=self.recipe.ppo.value_clip_range or None,
            denominator=denominator,
        )


LARGEST_RATIO_ERROR = 1e-4
"""In float32 at temperature 1 and up to `DEPTH` layers; what is measured is mostly below 1e-5."""
DEPTH = 8
"""Deeper models round more, and have larger logits: the limit grows with their layers. Random
models of 12 to 48 layers with logits of about 30 are off by .6e-4 to .8e-4."""

SAFEST = ("generation.engine=align", "attention=segments")


def largest_ratio_error(actor: Policy, temperature: float) -> float:
    """Bound of what rounding explains: logits are off, and are divided by the temperature."""
    layers = getattr(actor.inner.config.get_text_config(), "num_hidden_layers", None) or 1
    return LARGEST_RATIO_ERROR * max(1, layers / DEPTH) / min(1, temperature or 1)


def require_first_ratio(actor: Policy, error: float, recipe: PPORecipe) -> None:
    """Stop where the policy that is trained is not the one that was sampled from.

    A mixture of experts may take another expert in a tie; bf16 rounds: both are left to the doctor.

    Raises:
        AlignError: In float32 a probability ratio of the first minibatch is not 1.
    """
    config = actor.inner.config.get_text_config()
    experts = any(getattr(config, n, None) for n in EXPERTS)
    limit = largest_ratio_error(actor, recipe.generation.temperature)
    if actor.precision == "fp32" and not experts and not error <= limit:
        engine = recipe.generation.engine
        in_force = (f"generation.engine={engine}", f"attention={recipe.attention}")
        untried = [key for key in SAFEST if key not in in_force]
        advice = f"try {' and '.join(untried)}, and " if untried else ""
        raise AlignError(
            f"ppo: {actor.name} gives tokens other probabilities in training than when it sampled "
            f"them, with the same weights: their ratio is off from 1 by {error:.2g} "
            f"(first_ratio_error; here, in fp32, at most {limit:.2g}), so that clipping would be "
            f"wrong from the first step on; {advice}report it with the model's name"
        )


EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class _Taken:
    """Picks an experience's numbers at a batch's counted tokens, as ``[1,N]``."""

    def __init__(
        self, experience: Experience, batch: TokenBatch, members: Sequence[int], k: int
    ) -> None:
        sequence, self.offset = counted_coordinates(batch)
        # sequence s of the batch is response s % k of this process's s // k-th prompt
        prompts = torch.tensor(list(members), device=sequence.device)
        self.row = prompts[sequence // k] * k + sequence % k
        self.experience = experience

    def __call__(self, field: str) -> Tensor:
        source = self.experience.rollout if field == "logprobs" else self.experience
        return getattr(source, field)[self.row, self.offset][None]
