"""PPO: sample, score, compare with the reference, estimate advantages, step, adapt, again.

    maximise  E[score(x, y)] - kl_coef * KL(pi || pi_ref)

with the clipped surrogate of Schulman et al. 2017 (arXiv:1707.06347) on a token-level MDP whose
reward is the KL charge on every token and the score on the last one (Ziegler et al. 2019,
arXiv:1909.08593). Logits are divided by the sampling temperature everywhere: when sampling, and
for old, new and reference log-probabilities.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from align.config import PPORecipe
from align.data.order import prompt_batch
from align.losses import adapt_kl_coef
from align.models.policy import check_length
from align.progress import Progress, change
from align.rollout.experience import (
    decode_rollout,
    make_experience,
    over_rollout,
    rollout_groups,
)
from align.rollout.sampler import sample
from align.stages.common import (
    Session,
    open_session,
    policy_end_ids,
    save_policy,
    trained_parameters,
)
from align.stages.data import Split, load_data
from align.stages.ppo_hand import Hand
from align.stages.ppo_report import describe, sample_rows
from align.stages.ppo_roles import Roles, load_roles
from align.stages.ppo_update import Update
from align.training.checkpoint import InHand, load_in_hand
from align.training.distributed import gather_rollout, my_share, raise_together
from align.training.finite import FiniteGuard
from align.training.loop import seed_step
from align.training.saver import Saver
from align.types import Experience, NonFiniteError, PromptExample, Rollout


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
    for split in (prompts, held_out):  # not when the longest is sampled, hours later
        longest = int(split.groups.num_tokens().max(initial=0))
        needed = longest + recipe.generation.max_new_tokens
        check_length(roles.actor, needed, "a prompt and its response may have")
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
        self.saver = Saver(
            session.run,
            session.accelerator,
            self.update.trained,
            keep=recipe.keep_checkpoints,
            best_by=recipe.keep_best,
        )
        self.kl_coef = recipe.kl.coef
        # held-out numbers before the first step
        self.before: dict[str, float] = {}
        self.end_ids = policy_end_ids(roles.actor, session)

    def train(self) -> tuple[dict[str, float], dict[str, float]]:
        """All iterations; returns the held-out numbers before and after."""
        recipe, run, total = self.recipe, self.session.run, self.recipe.ppo.iterations
        state = self.saver.resume(recipe.resume == "auto")
        self.guard = FiniteGuard(run, on_nonfinite=recipe.on_nonfinite)
        start, in_hand = 0, None
        with self.saver, Progress(total, "ppo", shown=run.is_main) as bar:
            if state is None:
                self.before = self._evaluate_and_log(0)
            else:
                start, self.kl_coef, self.before = state["step"], state["kl_coef"], state["before"]
                self.update.microbatches.tokens = state["tokens_per_microbatch"]
                self.guard.in_a_row = state["left_out_in_a_row"]
                in_hand = load_in_hand(state["place"])
            self.saver.require_best("keep_best", self.before)
            bar.advance(steps=start)
            for iteration in range(start, total):
                if in_hand is None:  # else the weights are further on than this step's checkpoint
                    self.saver.stay_or_leave(iteration, self._state())
                metrics = self.iterate(iteration, in_hand)
                done, in_hand = iteration + 1, None
                run.log(done, metrics)
                bar.advance(
                    tokens=int(metrics.get("tokens", 0)),
                    score=metrics.get("score_mean", math.nan),
                    kl=metrics.get("kl", math.nan),
                )
                save = bool(recipe.save_every) and done % recipe.save_every == 0
                look = bool(recipe.eval_every) and done % recipe.eval_every == 0
                looked = done < total and (look or (save and recipe.keep_best))
                held_out = self._evaluate_and_log(done) if looked else None
                if save:
                    self.saver.save(done, self._state(), held_out)
            after = self._evaluate_and_log(total)
            if self.saver.take_best(after):
                after = self.evaluate(total)
        return self.before, after

    def iterate(self, iteration: int, in_hand: InHand | None = None) -> dict[str, float]:
        """Sample -> score -> reference and values -> rewards and advantages -> update -> adapt.

        ``in_hand`` is what an earlier process made of this iteration before it left.
        """
        recipe = self.recipe
        seed_step(recipe.seed, iteration)
        started = time.monotonic()
        k = recipe.generation.samples_per_prompt
        num_prompts = recipe.ppo.rollout_batch // k
        members = prompt_batch(len(self.prompts.groups), num_prompts, self.prompts.order, iteration)
        examples = [self.prompts.examples[i] for i in members]
        prompt_ids = [self.prompts.groups[i].prefix_ids for i in members for _ in range(k)]
        hand = Hand.unpacked(in_hand, prompt_ids, self.session.accelerator.device)

        try:
            if hand.rollout is None:
                hand.rollout = self.sample(
                    self.prompts, members, seed=recipe.seed * 7919 + iteration
                )
                self._stay_or_leave(iteration, hand)
            rollout, sampled = hand.rollout, time.monotonic()
            responses = self.decode(rollout)
            if hand.scores is None:
                hand.scores = self.score(examples, rollout, responses)
                if recipe.save_every:
                    self.saver.add_in_hand(iteration, hand.packed())
                self._stay_or_leave(iteration, hand)
        except NonFiniteError as error:
            self._leave_out(iteration + 1, error, examples)
            return self.guard.metrics()
        scores = hand.scores
        if hand.experience is None:
            hand.experience = self.experience(rollout, scores)
        experience, scored = hand.experience, time.monotonic()
        computed = {
            "reference log-probability": float(experience.ref_logprobs.sum()),
            "critic's value": float(experience.values.sum()),
        }
        if not self.guard.accepts(iteration + 1, computed, [e.id for e in examples], learns=False):
            return self.guard.metrics()
        metrics = describe(experience, scores, kl_coef=self.kl_coef, samples_per_prompt=k)
        metrics |= self.update(
            experience,
            iteration,
            self.kl_coef,
            hand,
            accept=lambda numbers, prompts: self.guard.accepts(
                iteration + 1, numbers, [examples[i].id for i in prompts]
            ),
            between=lambda: self._stay_or_leave(iteration, hand),
        )
        metrics |= self.guard.metrics()
        updated = time.monotonic()

        self.session.run.append(
            "samples.jsonl", sample_rows(iteration + 1, examples, responses, experience, scores)
        )
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
        accelerator, k = self.session.accelerator, self.recipe.generation.samples_per_prompt
        numbers = my_share(list(range(len(members))), accelerator)
        rollout: Rollout | None = None
        failed: NonFiniteError | None = None
        try:
            rollout = sample(
                self.roles.actor,
                [split.groups[members[i]].prefix_ids for i in numbers],
                self.recipe.generation,
                end_ids=self.end_ids,
                seed=seed,
                numbers=numbers,
                prefill_tokens=self.recipe.tokens_per_microbatch,
            )
        except NonFiniteError as error:
            failed = error.having(rows=[numbers[row // k] * k + row % k for row in error.rows])
        raise_together(failed, accelerator)
        assert rollout is not None
        return gather_rollout(rollout, k, accelerator)

    def decode(self, rollout: Rollout) -> list[str]:
        """The responses as text."""
        return decode_rollout(self.session.tokenizer, rollout, end_ids=self.end_ids)

    def score(
        self, examples: Sequence[PromptExample], rollout: Rollout, responses: Sequence[str]
    ) -> Tensor:
        """The raw scores ``[B]``, one per row of the rollout."""
        k = self.recipe.generation.samples_per_prompt
        repeated = [example for example in examples for _ in range(k)]
        try:
            scores = self.roles.reward(
                [e.prompt for e in repeated], responses, [e.references for e in repeated]
            )
        except NonFiniteError as error:
            raise error.having(responses=[responses[row] for row in error.rows]) from error
        return torch.tensor(scores, dtype=torch.float32, device=rollout.logprobs.device)

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

    def evaluate(self, done: int) -> dict[str, float]:
        """Score, KL and length of samples on held-out prompts, at the training temperature.

        Nothing where no prompt is held out, or where a number is not finite and is to be skipped.
        """
        if not self.held_out.groups:
            return {}
        try:
            return self._measure_held_out()
        except NonFiniteError as error:
            self._leave_out(done, error, self.held_out.examples)
            return {}

    def _leave_out(
        self, step: int, error: NonFiniteError, examples: Sequence[PromptExample]
    ) -> None:
        k = self.recipe.generation.samples_per_prompt
        ids = [examples[row // k].id for row in error.rows]
        found = {error.what: error.value}
        self.guard.accepts(step, found, ids, cure=error.cure, responses=error.responses)

    def _measure_held_out(self) -> dict[str, float]:
        # a reward that draws random numbers draws the same ones, whatever came before
        seed_step(self.recipe.seed, 104_729)
        members = list(range(len(self.held_out.groups)))
        rollout = self.sample(self.held_out, members, seed=self.recipe.seed + 104_729)
        scores = self.score(self.held_out.examples, rollout, self.decode(rollout))
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

    def _evaluate_and_log(self, done: int) -> dict[str, float]:
        found = self.evaluate(done)
        self.session.run.log(done, {f"eval_{k}": v for k, v in found.items()})
        return found

    def _state(self) -> dict[str, Any]:
        return {
            "kl_coef": self.kl_coef,
            "before": self.before,
            "tokens_per_microbatch": self.update.microbatches.tokens,
            "left_out_in_a_row": self.guard.in_a_row,
        }

    def _stay_or_leave(self, iteration: int, hand: Hand) -> None:
        self.saver.stay_or_leave(
            iteration, self._state(), part=hand.minibatches, in_hand=hand.packed()
        )
