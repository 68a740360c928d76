"""PPO: sample, score, compare with the reference, estimate advantages, step, adapt, again.

    maximise  E[score(x, y)] - kl_coef * KL(pi || pi_ref)

with the clipped surrogate of Schulman et al. 2017 (arXiv:1707.06347) on a token-level MDP whose
reward is the KL charge on every token and the score on the last one (Ziegler et al. 2019,
arXiv:1909.08593). Logits are divided by the sampling temperature everywhere: when sampling, and
for old, new and reference log-probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from torch import Tensor

from align.base.progress import Progress, change
from align.config.keys import PPORecipe
from align.data.order import prompt_batch
from align.data.tokens.packing import longest_of
from align.losses import adapt_kl_coef
from align.models.policy import check_length
from align.rewards import check_functions, columns_of, warn_of_constant
from align.rollout.engine import require_engine
from align.stages.common import (
    Session,
    introduce,
    open_session,
    save_policy,
)
from align.stages.data import Split, load_data
from align.stages.ppo.hand import Hand, Iteration
from align.stages.ppo.metrics import describe, sample_rows
from align.stages.ppo.roles import Roles, load_roles
from align.stages.ppo.rollouts import Phases
from align.stages.ppo.update import Update
from align.training.checkpoint import InHand, load_in_hand
from align.training.finite import FiniteGuard
from align.training.loop import seed_step
from align.training.saver import Saver
from align.types import Experience, NonFiniteError, PromptExample, Rollout


def run(recipe: PPORecipe) -> None:
    """Optimise ``recipe.model`` against ``recipe.reward``; saves actor and critic."""
    require_engine(recipe.generation)
    check_functions("reward", recipe.reward)
    session = open_session(recipe, "ppo")
    prompts, held_out = load_data(session, recipe.data, "prompt", seed=recipe.seed)
    columns = columns_of(chain(prompts.examples, held_out.examples))
    check_functions("reward", recipe.reward, columns, quiet=not session.run.is_main)
    roles = load_roles(recipe, session)
    session.run.describe(
        start_weights=roles.weights,
        reward=roles.reward.name,
        actor=introduce(roles.actor, session),
        critic=introduce(roles.critic, session),
    )
    for split in (prompts, held_out):  # not when the longest is sampled, hours later
        needed = longest_of(split.groups) + recipe.generation.max_new_tokens
        check_length(roles.actor, needed, "a prompt and its response may have")
    stage = _PPO(recipe, session, roles, prompts, held_out, tuple(columns))
    before, after = stage.train()
    save_policy(roles.actor, session)
    if session.accelerator.is_main_process:
        roles.critic.save(session.run.folder / "critic", session.tokenizer)
    session.run.finish(change(before, after), held_out=after)


class _PPO:
    """The state that goes from iteration to iteration: the roles, the update, the coefficient."""

    def __init__(
        self,
        recipe: PPORecipe,
        session: Session,
        roles: Roles,
        prompts: Split,
        held_out: Split,
        columns: Sequence[str],
    ) -> None:
        self.recipe, self.session, self.roles = recipe, session, roles
        self.prompts, self.held_out = prompts, held_out
        self.phases = Phases(recipe, session, roles, columns)
        self.update = Update(recipe, session, roles)
        self.saver = Saver(
            session.run,
            session.accelerator,
            self.update.trained,
            keep=recipe.keep_checkpoints,
            best_by=recipe.keep_best,
        )
        self.kl_coef = recipe.kl.coef
        self.scored_before = False
        # held-out numbers before the first step
        self.before: dict[str, float] = {}

    def train(self) -> tuple[dict[str, float], dict[str, float]]:
        """All iterations; returns the held-out numbers before and after."""
        run, total = self.session.run, self.recipe.ppo.iterations
        state = self.saver.resume(self.recipe.resume == "auto")
        # behind it: what the resumed run had left out counts too
        self.guard = FiniteGuard(run, on_nonfinite=self.recipe.on_nonfinite)
        with self.saver, Progress(total, "ppo", shown=run.is_main) as bar:
            start, in_hand = self._begin() if state is None else self._go_on(state)
            self.saver.require_best("keep_best", self.before)
            bar.advance(steps=start)
            for iteration in range(start, total):
                if in_hand is None:  # else the weights are further on than this step's checkpoint
                    self.saver.stay_or_leave(iteration, self._state())
                metrics = self.iterate(iteration, in_hand)
                in_hand = None
                run.log(iteration + 1, metrics)
                bar.advance(
                    tokens=int(metrics.get("tokens", 0)),
                    score=metrics.get("score_mean", math.nan),
                    kl=metrics.get("kl", math.nan),
                )
                self._look_and_save(iteration + 1)
            after = self._evaluate_and_log(total)
            if self.saver.take_best(after):
                after = self.evaluate(total)
        return self.before, after

    def _begin(self) -> tuple[int, InHand | None]:
        self.before = self._evaluate_and_log(0)
        return 0, None

    def _go_on(self, state: dict[str, Any]) -> tuple[int, InHand | None]:
        """From a checkpoint: the iteration, and what had been made of it."""
        self.kl_coef, self.before = state["kl_coef"], state["before"]
        self.update.microbatches.tokens = state["tokens_per_microbatch"]
        self.guard.in_a_row = state["left_out_in_a_row"]
        return state["step"], load_in_hand(state["place"])

    def _look_and_save(self, done: int) -> None:
        """A held-out evaluation and a checkpoint, where they are due."""
        recipe = self.recipe
        save = bool(recipe.save_every) and done % recipe.save_every == 0
        look = bool(recipe.eval_every) and done % recipe.eval_every == 0
        looked = done < recipe.ppo.iterations and (look or (save and recipe.keep_best))
        held_out = self._evaluate_and_log(done) if looked else None
        if save:
            self.saver.save(done, self._state(), held_out)

    def iterate(self, number: int, in_hand: InHand | None = None) -> dict[str, float]:
        """One iteration; ``in_hand`` is what an earlier process made of it before it left.

        The experience is reference log-probs and values, shaped rewards and advantages.
        """
        now = self._open(number, in_hand)
        try:
            rollout = self._sample_once(now)
            responses = self.phases.decode(rollout, now.examples)
            scores = self._score_once(now, rollout, responses)
        except NonFiniteError as error:
            self._leave_out(now.step, error, now.examples)
            return self.guard.metrics()
        experience = self._experience_once(now, rollout, scores)
        if not self._is_finite(now, experience):
            return self.guard.metrics()
        metrics = describe(
            experience,
            scores,
            kl_coef=self.kl_coef,
            samples_per_prompt=self.recipe.generation.samples_per_prompt,
        )
        metrics |= self._update_once(now, experience)
        metrics |= self.guard.metrics()
        self.session.run.append(
            "samples.jsonl", sample_rows(now.step, now.examples, responses, experience, scores)
        )
        self._adapt_kl_coef(metrics["kl"])
        return metrics | now.clock.seconds(tokens=metrics["tokens"])

    def _open(self, number: int, in_hand: InHand | None) -> Iteration:
        """Its random numbers, its prompts, and what there is of it already."""
        recipe, prompts = self.recipe, self.prompts
        seed_step(recipe.seed, number)
        k = recipe.generation.samples_per_prompt
        num_prompts = recipe.ppo.rollout_batch // k
        members = prompt_batch(len(prompts.groups), num_prompts, prompts.order, number)
        prompt_ids = [prompts.groups[i].prefix_ids for i in members for _ in range(k)]
        return Iteration(
            number=number,
            members=members,
            examples=[prompts.examples[i] for i in members],
            hand=Hand.unpacked(in_hand, prompt_ids, self.session.accelerator.device),
        )

    def _sample_once(self, now: Iteration) -> Rollout:
        if now.hand.rollout is None:
            seed = self.recipe.seed * 7919 + now.number
            now.hand.rollout = self.phases.sample(self.prompts, now.members, seed=seed)
            self._stay_or_leave(now)
        now.clock.mark()
        return now.hand.rollout

    def _score_once(self, now: Iteration, rollout: Rollout, responses: Sequence[str]) -> Tensor:
        if now.hand.scores is None:
            now.hand.scores = self.phases.score(now.examples, rollout, responses)
            if not self.scored_before and self.session.run.is_main:
                warn_of_constant(self.roles.reward, now.hand.scores.tolist())
            self.scored_before = True
            if self.recipe.save_every:
                self.saver.add_in_hand(now.number, now.hand.packed())
            self._stay_or_leave(now)
        return now.hand.scores

    def _experience_once(self, now: Iteration, rollout: Rollout, scores: Tensor) -> Experience:
        if now.hand.experience is None:
            now.hand.experience = self.phases.experience(rollout, scores, self.kl_coef)
        now.clock.mark()
        return now.hand.experience

    def _is_finite(self, now: Iteration, experience: Experience) -> bool:
        computed = {
            "reference log-probability": float(experience.ref_logprobs.sum()),
            "critic's value": float(experience.values.sum()),
        }
        return self.guard.accepts(now.step, computed, [e.id for e in now.examples], learns=False)

    def _update_once(self, now: Iteration, experience: Experience) -> dict[str, float]:
        """Epochs of minibatches, those left out that ``now.hand`` has done."""

        def accept(numbers: Mapping[str, float], prompts: Sequence[int]) -> bool:
            return self.guard.accepts(now.step, numbers, [now.examples[i].id for i in prompts])

        metrics = self.update(
            experience,
            now.number,
            self.kl_coef,
            now.hand,
            accept=accept,
            between=lambda: self._stay_or_leave(now),
        )
        now.clock.mark()
        return metrics

    def _adapt_kl_coef(self, observed_kl: float) -> None:
        kl = self.recipe.kl
        if kl.adaptive:
            self.kl_coef = adapt_kl_coef(
                self.kl_coef,
                observed_kl=observed_kl,
                target=kl.target,
                batch=self.recipe.ppo.rollout_batch,
                horizon=kl.horizon,
            )

    def evaluate(self, done: int) -> dict[str, float]:
        """Score, KL and length of samples on held-out prompts, at the training temperature.

        Nothing where no prompt is held out, or where a number is not finite and is to be skipped.
        """
        if not self.held_out.groups:
            return {}
        try:
            return self.phases.evaluate(self.held_out)
        except NonFiniteError as error:
            self._leave_out(done, error, self.held_out.examples)
            return {}

    def _leave_out(
        self, step: int, error: NonFiniteError, examples: Sequence[PromptExample]
    ) -> None:
        k = self.recipe.generation.samples_per_prompt
        ids = [examples[row // k].id for row in error.rows]
        self.guard.leave_out(step, error, ids)

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

    def _stay_or_leave(self, now: Iteration) -> None:
        self.saver.stay_or_leave(
            now.number, self._state(), part=now.hand.minibatches, in_hand=now.hand.packed()
        )
