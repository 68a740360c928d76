"""PPO: sample, score, compare with the reference, estimate advantages, step, adapt, again.

    maximise  E[score(x, y)] - kl_coef * KL(pi || pi_ref)

with the clipped surrogate of Schulman et al. 2017 (arXiv:1707.06347) on a token-level MDP whose
reward is the KL charge on every token and the score on the last one (Ziegler et al. 2019,
arXiv:1909.08593). Logits are divided by the sampling temperature everywhere: when sampling, and
for old, new and reference log-probabilities.

Checkpoints lie between iterations only. An iteration is a function of its number, the seed and the
weights that it starts from, so a resumed run that does one again repeats it exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

from torch import Tensor

from align.base.progress import Progress, change, warn
from align.config.keys import PPORecipe
from align.data.order import prompt_batch
from align.data.tokens.packing import longest_of
from align.losses import adapt_kl_coef
from align.models.policy import check_length
from align.rewards import check_functions, columns_of, warn_of_constant
from align.rollout.engine import require_engine
from align.rollout.experience import estimate_advantages, shaped_rewards
from align.stages.common import Session, describe_model, open_session, save_policy
from align.stages.data import Split, load_data
from align.stages.ppo.metrics import Clock, describe, sample_rows
from align.stages.ppo.options import check_options
from align.stages.ppo.roles import Roles, load_roles
from align.stages.ppo.rollouts import RolloutWorker
from align.stages.ppo.update import Update
from align.training.finite import FiniteGuard
from align.training.loop import seed_step
from align.training.saver import Saver
from align.types import Experience, NonFiniteError, PromptExample


def run(recipe: PPORecipe) -> None:
    """Optimise ``recipe.model`` against ``recipe.reward``; saves actor and critic."""
    check_options(recipe)
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
        actor=describe_model(roles.actor, session),
        critic=describe_model(roles.critic, session),
    )
    for split in (prompts, held_out):  # not when the longest is sampled, hours later
        needed = longest_of(split.groups) + recipe.generation.max_new_tokens
        check_length(roles.actor, needed, "a prompt and its response may have")
    before, after = PPO(recipe, session, roles, prompts, held_out, tuple(columns)).train()
    save_policy(roles.actor, session)
    if session.accelerator.is_main_process:
        roles.critic.save(session.run.folder / "critic", session.tokenizer)
    session.run.finish(change(before, after), held_out=after)


class PPO:
    """The loop over iterations, and the state that goes from one iteration to the next."""

    def __init__(
        self,
        recipe: PPORecipe,
        session: Session,
        roles: Roles,
        prompts: Split,
        held_out: Split,
        columns: Sequence[str],
    ) -> None:
        self.recipe, self.run, self.roles = recipe, session.run, roles
        self.prompts, self.held_out = prompts, held_out
        self.worker = RolloutWorker(recipe, session, roles, columns)
        self.update = Update(recipe, session, roles)
        self.saver = Saver(
            session.run,
            session.accelerator,
            self.update.trained,
            keep=recipe.train.keep_checkpoints,
            best_by=recipe.train.keep_best,
        )
        self.kl_coef = recipe.kl.coef
        self.before: dict[str, float] = {}  # held-out numbers before the first step
        self.scored = False

    def train(self) -> tuple[dict[str, float], dict[str, float]]:
        """Run all iterations; returns the held-out numbers before and after."""
        total = self.recipe.ppo.iterations
        state = self.saver.resume(self.recipe.resume == "auto")
        # made after `resume`, so that it counts what the resumed run skipped
        self.guard = FiniteGuard(self.run, on_nonfinite=self.recipe.train.on_nonfinite)
        start = 0 if state is None else state["step"]
        with self.saver, Progress(total, "ppo", shown=self.run.is_main) as bar:
            if state is None:
                self.before = self.evaluate_and_log(0, None)
            else:
                self.load_state_dict(state)
            self.saver.require_best("train.keep_best", self.before)
            self.saver.checkpoint_if_signalled(start, self.state_dict())
            bar.advance(steps=start)
            if state is not None and state.get("evaluation_due"):
                self.checkpoint(start)
            for iteration in range(start, total):
                metrics = self.iterate(iteration)
                bar.advance(
                    tokens=int(metrics.get("tokens", 0)),
                    score=metrics.get("score_mean", math.nan),
                    kl=metrics.get("kl", math.nan),
                )
            after = self.evaluate_and_log(total, self.state_dict())
            after = self.saver.take_best(after)
        return self.before, after

    def iterate(self, iteration: int) -> dict[str, float]:
        """Run one iteration, counted from 0, up to its checkpoint; returns its metrics."""
        recipe, worker, step, clock = self.recipe, self.worker, iteration + 1, Clock()
        seed_step(recipe.seed, iteration)  # a reward may draw random numbers
        members = self.prompt_batch(iteration)
        examples = [self.prompts.examples[i] for i in members]
        try:
            with self.saver.interruptible(iteration, self.state_dict()):
                rollout = worker.sample(self.prompts, members, seed=recipe.seed * 7919 + iteration)
                clock.mark()
                responses = worker.decode(rollout, examples)
                scores = worker.score(examples, rollout, responses)
                ref_logprobs = worker.ref_logprobs(rollout)
                values = worker.values(rollout)
        except NonFiniteError as error:
            self.skip(step, error, examples)
            metrics = self.guard.metrics()
        else:
            self.warn_of_constant(scores, rollout.finished)
            terminal = worker.terminal_rewards(rollout, scores)
            rewards = shaped_rewards(
                rollout,
                terminal,
                ref_logprobs,
                kl_coef=self.kl_coef if recipe.kl.charge == "reward" else 0.0,
                kl_kind=recipe.kl.estimator,
                whiten=recipe.ppo.whiten_rewards,
            )
            advantages, returns = estimate_advantages(
                rewards,
                values,
                rollout.response_mask,
                gamma=recipe.ppo.gamma,
                gae_lambda=recipe.ppo.gae_lambda,
                estimator=recipe.ppo.estimator,
                group_size=recipe.generation.samples_per_prompt,
                whiten=recipe.ppo.whiten_advantages,
            )
            experience = Experience(
                rollout, ref_logprobs, values, rewards, advantages, returns, terminal
            )
            clock.mark()
            metrics = describe(experience, scores, len(examples), kl_coef=self.kl_coef)
            accept = partial(self.guard.accepts, step)
            metrics |= self.update(experience, examples, iteration, self.kl_coef, accept)
            clock.mark()
            metrics |= self.guard.metrics() | clock.seconds(tokens=metrics["tokens"])
            samples = sample_rows(step, examples, responses, experience, scores)
            self.run.append("samples.jsonl", samples)
        self.run.log(step, metrics)
        self.adapt_kl_coef(metrics)
        self.checkpoint(step)
        return metrics

    def prompt_batch(self, iteration: int) -> list[int]:
        """Return the prompts of an iteration, as indices into the training split."""
        size = self.recipe.ppo.rollout_batch // self.recipe.generation.samples_per_prompt
        return prompt_batch(len(self.prompts.groups), size, self.prompts.order, iteration)

    def adapt_kl_coef(self, metrics: Mapping[str, float]) -> None:
        """Move the KL coefficient by the KL that an iteration measured."""
        kl = self.recipe.kl
        if kl.adaptive and "kl" in metrics:  # a skipped iteration measures none
            self.kl_coef = adapt_kl_coef(
                self.kl_coef,
                observed_kl=metrics["kl"],
                target=kl.target,
                batch=self.recipe.ppo.rollout_batch,
                horizon=kl.horizon,
            )

    def checkpoint(self, step: int) -> None:
        """Evaluate held-out prompts and save, where each is due after ``step`` iterations.

        Raises:
            Interrupted: A signal has come; a checkpoint is saved.
        """
        recipe, due = self.recipe, {"evaluation_due": True}
        save = bool(recipe.train.save_every) and step % recipe.train.save_every == 0
        evaluate = bool(recipe.train.eval_every) and step % recipe.train.eval_every == 0
        evaluate = evaluate or (save and recipe.train.keep_best is not None)
        # after the last iteration `train` evaluates in any case
        evaluate = evaluate and step < recipe.ppo.iterations
        found = self.evaluate_and_log(step, self.state_dict() | due) if evaluate else None
        if save:
            self.saver.save(step, self.state_dict(), found)
        self.saver.checkpoint_if_signalled(step, self.state_dict())

    def evaluate_and_log(self, step: int, state: Mapping[str, Any] | None) -> dict[str, float]:
        """Log what `evaluate` returns; its arguments are the same."""
        found = self.evaluate(step, state)
        self.run.log(step, {f"eval_{name}": value for name, value in found.items()})
        return found

    def evaluate(self, step: int, state: Mapping[str, Any] | None) -> dict[str, float]:
        """Measure score, KL and length of samples on held-out prompts, at the training temperature.

        Returns {} where no prompt is held out, or where a non-finite number is to be skipped.

        Args:
            step: Iterations done.
            state: What to save if a signal comes meanwhile; the evaluation is then done again.
        """
        if not self.held_out.groups:
            return {}
        try:
            with self.saver.interruptible(step, state):
                return self.worker.evaluate(self.held_out)
        except NonFiniteError as error:
            self.skip(step, error, self.held_out.examples)
            return {}

    def skip(self, step: int, error: NonFiniteError, examples: Sequence[PromptExample]) -> None:
        """Record the prompts of a rollout that is not learned from, or stop the run."""
        k = self.recipe.generation.samples_per_prompt
        ids = [examples[row // k].id for row in error.rows]
        # one for each of the responses that are listed beside them, else each prompt once
        ids = ids if error.responses else list(dict.fromkeys(ids))
        self.guard.leave_out(step, error, ids)

    def warn_of_constant(self, scores: Tensor, finished: Tensor) -> None:
        """Warn if the first rollout is all paid the same: there is nothing to learn from."""
        if not self.scored and self.run.is_main:
            warn_of_constant(self.roles.reward, scores.tolist())
            missing = self.recipe.ppo.missing_eos_score
            if missing is not None and not finished.any():
                warn(
                    f"ppo: none of the first {len(finished)} responses ended, so each was paid "
                    f"ppo.missing_eos_score={missing:g} and the reward had no effect; raise "
                    "generation.max_new_tokens, or set ppo.missing_eos_score=null"
                )
        self.scored = True

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds beside weights and moments, as JSON values."""
        return {
            "kl_coef": self.kl_coef,
            "before": self.before,
            "tokens_per_microbatch": self.update.microbatches.tokens,
            "left_out_in_a_row": self.guard.in_a_row,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`."""
        self.kl_coef, self.before = state["kl_coef"], state["before"]
        self.update.microbatches.tokens = state["tokens_per_microbatch"]
        self.guard.in_a_row = state["left_out_in_a_row"]
