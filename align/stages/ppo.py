"""PPO: sample, score, compare with the reference, estimate advantages, step, adapt, again.

    maximise  E[score(x, y)] - kl_coef * KL(pi || pi_ref)

with the clipped surrogate of Schulman et al. 2017 (arXiv:1707.06347) on a token-level MDP whose
reward is the KL charge on every token and the score on the last one (Ziegler et al. 2019,
arXiv:1909.08593). Logits are divided by the sampling temperature everywhere: when sampling, and
for old, new and reference log-probabilities.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.config import PPORecipe
from align.losses import adapt_kl_coef, explained_variance, masked_mean
from align.progress import Progress, say
from align.rollout.experience import (
    decode_rollout,
    make_experience,
    over_rollout,
    repetition,
    rollout_groups,
)
from align.rollout.sampler import sample
from align.run_folder import change
from align.stages.common import (
    Session,
    open_session,
    policy_end_ids,
    save_policy,
    trained_parameters,
)
from align.stages.data import Split, load_data
from align.stages.ppo_roles import Roles, load_roles
from align.stages.ppo_update import Update
from align.training.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from align.training.distributed import gather_rollout, my_share
from align.types import Experience, PromptExample, Rollout


def run(recipe: PPORecipe) -> None:
    """Optimise ``recipe.model`` against ``recipe.reward``; saves actor and critic."""
    session = open_session(recipe, "ppo")
    prompts, held_out = load_data(session, recipe.data, "prompt", seed=recipe.seed)
    roles = load_roles(recipe, session)
    session.run.describe(
        start_weights=roles.weights,
        reward=roles.reward.name,
        actor=trained_parameters(roles.actor),
        critic=trained_parameters(roles.critic),
    )
    stage = _PPO(recipe, session, roles, prompts, held_out)
    before, after = stage.train()
    if session.accelerator.is_main_process:
        save_policy(roles.actor, session)
        roles.critic.save(session.run.folder / "critic", session.tokenizer)
    session.run.finish(change(before, after), held_out=after)


class _PPO:
    """The state that goes from iteration to iteration: the roles, the update, the coefficient."""

    def __init__(
        self, recipe: PPORecipe, session: Session, roles: Roles, prompts: Split, held_out: Split
    ) -> None:
        self.recipe, self.session, self.roles = recipe, session, roles
        self.prompts, self.held_out = prompts, held_out
        self.update = Update(recipe, session, roles)
        self.kl_coef = recipe.kl.coef
        self.end_ids = policy_end_ids(roles.actor, session)

    def train(self) -> tuple[dict[str, float], dict[str, float]]:
        """All iterations; returns the held-out numbers before and after."""
        recipe, run = self.recipe, self.session.run
        before, start = self._resume()
        if before is None:
            before = self.evaluate()
            run.log(0, {f"eval_{k}": v for k, v in before.items()})
        with Progress(recipe.ppo.iterations, "ppo", shown=run.is_main) as bar:
            bar.advance(steps=start)
            for iteration in range(start, recipe.ppo.iterations):
                metrics = self.iterate(iteration)
                done = iteration + 1
                run.log(done, metrics)
                bar.advance(
                    tokens=int(metrics["tokens"]), score=metrics["score_mean"], kl=metrics["kl"]
                )
                due = recipe.eval_every and done % recipe.eval_every == 0
                if due and done < recipe.ppo.iterations:
                    run.log(done, {f"eval_{k}": v for k, v in self.evaluate().items()})
                if recipe.save_every and done % recipe.save_every == 0:
                    self._save(done, before)
        after = self.evaluate()
        run.log(recipe.ppo.iterations, {f"eval_{k}": v for k, v in after.items()})
        return before, after

    def iterate(self, iteration: int) -> dict[str, float]:
        """Sample -> score -> reference and values -> rewards and advantages -> update -> adapt."""
        recipe = self.recipe
        torch.manual_seed((recipe.seed * 1_000_003 + iteration) % 2**31)
        started = time.monotonic()
        per_iteration = recipe.ppo.rollout_batch // recipe.generation.samples_per_prompt
        members = prompt_batch(len(self.prompts.groups), per_iteration, recipe.seed, iteration)
        examples = [self.prompts.examples[i] for i in members]

        rollout = self.sample(self.prompts, members, seed=recipe.seed * 7919 + iteration)
        sampled = time.monotonic()
        responses, scores = self.score(examples, rollout)
        experience = self.experience(rollout, scores)
        scored = time.monotonic()
        metrics = self._describe(experience, scores)
        metrics |= self.update(experience, iteration, self.kl_coef)
        updated = time.monotonic()

        self._write_samples(iteration + 1, examples, responses, experience, scores)
        if recipe.kl.adaptive:
            self.kl_coef = adapt_kl_coef(
                self.kl_coef,
                observed_kl=metrics["kl"],
                target=recipe.kl.target,
                batch=recipe.ppo.rollout_batch,
                horizon=recipe.kl.horizon,
            )
        return metrics | {
            "seconds_sampling": sampled - started,
            "seconds_scoring": scored - sampled,
            "seconds_updating": updated - scored,
            "tokens_per_second": metrics["tokens"] / (updated - started),
        }

    def sample(self, split: Split, members: Sequence[int], *, seed: int) -> Rollout:
        """This iteration's responses, those of every process in the prompts' order."""
        accelerator = self.session.accelerator
        mine = my_share(members, accelerator)
        rollout = sample(
            self.roles.actor,
            [split.groups[i].prefix_ids for i in mine],
            self.recipe.generation,
            end_ids=self.end_ids,
            seed=seed,
            numbers=my_share(list(range(len(members))), accelerator),
            prefill_tokens=self.recipe.tokens_per_microbatch,
        )
        return gather_rollout(rollout, self.recipe.generation.samples_per_prompt, accelerator)

    def score(
        self, examples: Sequence[PromptExample], rollout: Rollout
    ) -> tuple[list[str], Tensor]:
        """The responses as text and their raw scores ``[B]``, one per row of the rollout."""
        k = self.recipe.generation.samples_per_prompt
        responses = decode_rollout(self.session.tokenizer, rollout, end_ids=self.end_ids)
        repeated = [example for example in examples for _ in range(k)]
        scores = self.roles.reward(
            [e.prompt for e in repeated], responses, [e.references for e in repeated]
        )
        return responses, torch.tensor(scores, dtype=torch.float32, device=rollout.logprobs.device)

    def experience(self, rollout: Rollout, scores: Tensor) -> Experience:
        """What an update needs; the EOS trick and the reward's own mean come in here."""
        recipe, roles = self.recipe, self.roles
        groups = rollout_groups(rollout, recipe.generation.samples_per_prompt)
        budget = recipe.tokens_per_microbatch
        roles.critic.eval()
        roles.actor.eval()
        ref_logprobs = over_rollout(
            rollout, groups, roles.ref_logprobs, tokens_per_microbatch=budget
        )
        values = over_rollout(
            rollout,
            groups,
            lambda batch: roles.critic(batch, at="counted"),
            tokens_per_microbatch=budget,
        )
        paid = scores - getattr(roles.reward, "mean", 0.0)
        if recipe.ppo.missing_eos_score is not None:
            paid = torch.where(rollout.finished, paid, recipe.ppo.missing_eos_score)
        return make_experience(
            rollout,
            scores=paid,
            ref_logprobs=ref_logprobs,
            values=values,
            kl_coef=self.kl_coef if recipe.kl.charge == "reward" else 0.0,
            kl_kind=recipe.kl.estimator,
            gamma=recipe.ppo.gamma,
            gae_lambda=recipe.ppo.gae_lambda,
            whiten_rewards=recipe.ppo.whiten_rewards,
            whiten_advantages=recipe.ppo.whiten_advantages,
        )

    def evaluate(self) -> dict[str, float]:
        """Score, KL and length of samples on held-out prompts, at the training temperature."""
        if not self.held_out.groups:
            return {}
        members = list(range(len(self.held_out.groups)))
        rollout = self.sample(self.held_out, members, seed=self.recipe.seed + 104_729)
        _, scores = self.score([self.held_out.examples[i] for i in members], rollout)
        groups = rollout_groups(rollout, self.recipe.generation.samples_per_prompt)
        ref_logprobs = over_rollout(
            rollout,
            groups,
            self.roles.ref_logprobs,
            tokens_per_microbatch=self.recipe.tokens_per_microbatch,
        )
        return {
            "score": scores.mean().item(),
            "kl": (rollout.logprobs - ref_logprobs).sum(1).mean().item(),
            "length": rollout.response_mask.sum(1).float().mean().item(),
            "eos_rate": rollout.finished.float().mean().item(),
        }

    def _describe(self, experience: Experience, scores: Tensor) -> dict[str, float]:
        """What docs/metrics.md explains, of the rollout before the update."""
        rollout, k = experience.rollout, self.recipe.generation.samples_per_prompt
        mask = rollout.response_mask
        log_ratio = rollout.logprobs - experience.ref_logprobs
        kl = log_ratio.sum(1)
        # the same for every response to a prompt at the optimum: the live distance to it
        soft_value = (experience.scores - self.kl_coef * kl).view(-1, k)
        gap = {"optimality_gap": soft_value.std(1).mean().item()} if k > 1 else {}
        return gap | {
            "score_mean": scores.mean().item(),
            "score_std": scores.std().item() if len(scores) > 1 else 0.0,
            "reward_mean": experience.rewards.sum(1).mean().item(),
            "kl": kl.mean().item(),
            "kl_per_token": masked_mean(log_ratio, mask).item(),
            "kl_coef": self.kl_coef,
            "entropy": -masked_mean(rollout.logprobs, mask).item(),
            "length_mean": mask.sum(1).float().mean().item(),
            "eos_rate": rollout.finished.float().mean().item(),
            "repetition": repetition(rollout),
            "explained_variance": explained_variance(
                experience.values, experience.returns, mask
            ).item(),
            "tokens": float(mask.sum()),
        }

    def _write_samples(
        self,
        iteration: int,
        examples: Sequence[PromptExample],
        responses: Sequence[str],
        experience: Experience,
        scores: Tensor,
    ) -> None:
        k = self.recipe.generation.samples_per_prompt
        rollout = experience.rollout
        kl = (rollout.logprobs - experience.ref_logprobs).sum(1).tolist()
        rows: list[dict[str, Any]] = [
            {
                "iteration": iteration,
                "id": examples[i // k].id,
                "prompt": examples[i // k].prompt,
                "response": responses[i],
                "score": scores[i].item(),
                "kl": kl[i],
                "finished": bool(rollout.finished[i]),
            }
            for i in range(len(responses))
        ]
        self.session.run.append("samples.jsonl", rows)

    def _save(self, iteration: int, before: dict[str, float]) -> None:
        if self.session.accelerator.is_main_process:
            save_checkpoint(
                self.session.run.folder / "checkpoints",
                iteration,
                self.update.trained,
                {"kl_coef": self.kl_coef, "before": before},
                keep=self.recipe.keep_checkpoints,
            )
        self.session.accelerator.wait_for_everyone()

    def _resume(self) -> tuple[dict[str, float] | None, int]:
        run = self.session.run
        found = checkpoints(run.folder / "checkpoints") if self.recipe.resume == "auto" else []
        if not found:
            run.begin()
            run.forget_after(-1)
            return None, 0
        run.resume()
        state = load_checkpoint(found[-1], self.update.trained)
        self.kl_coef = state["kl_coef"]
        run.forget_after(state["step"])
        if run.is_main:
            say(f"ppo: resumed from {found[-1]} ({state['step']} iterations done)")
        return state["before"], state["step"]


def prompt_batch(num_prompts: int, size: int, seed: int, iteration: int) -> list[int]:
    """The prompts of one iteration: passes over all of them, each in an order of its own."""
    start = iteration * size
    orders: dict[int, np.ndarray] = {}
    members = []
    for position in range(start, start + size):
        epoch = position // num_prompts
        if epoch not in orders:
            orders[epoch] = np.random.default_rng([seed, epoch]).permutation(num_prompts)
        members.append(int(orders[epoch][position % num_prompts]))
    return members
