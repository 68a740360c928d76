"""The phases of a PPO iteration, one by one.

Nothing here trains, and nothing is kept from one call to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from align.config.keys import PPORecipe
from align.rewards import score_responses
from align.rollout.engine import sample
from align.rollout.experience import (
    decode_rollout,
    make_experience,
    over_rollout,
    rollout_groups,
)
from align.stages.common import Session, policy_end_ids
from align.stages.data import Split
from align.stages.ppo.roles import Roles
from align.training.distributed import (
    add_over_processes,
    gather_in_order,
    gather_rollout,
    my_share,
    raise_together,
)
from align.training.loop import seed_step
from align.types import Experience, NonFiniteError, PromptExample, Rollout, TokenBatch


class Phases:
    """The roles at work on a rollout.

    Attributes:
        columns: Extra columns of all the run's prompts, which a reward is given in every call.
    """

    def __init__(
        self, recipe: PPORecipe, session: Session, roles: Roles, columns: Sequence[str] = ()
    ) -> None:
        self.recipe, self.session, self.roles = recipe, session, roles
        self.columns = columns
        self.end_ids = policy_end_ids(roles.actor, session)

    def sample(self, split: Split, members: Sequence[int], *, seed: int) -> Rollout:
        """This iteration's responses, those of every process in the prompts' order."""
        accelerator, k = self.session.accelerator, self.recipe.generation.samples_per_prompt
        numbers = my_share(range(len(members)), accelerator)
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

    def decode(self, rollout: Rollout, examples: Sequence[PromptExample]) -> list[str]:
        """The responses to the examples as text."""
        prompts = [example.prompt for example in examples]
        return decode_rollout(self.session.tokenizer, rollout, prompts, end_ids=self.end_ids)

    def score(
        self, examples: Sequence[PromptExample], rollout: Rollout, responses: Sequence[str]
    ) -> Tensor:
        """The raw scores ``[B]``, one per row; each process asks for its share of the prompts."""
        accelerator, k = self.session.accelerator, self.recipe.generation.samples_per_prompt
        rows = self._my_rows(len(examples))
        mine = [examples[row // k] for row in rows]
        scores: Sequence[float] = ()
        failed: NonFiniteError | None = None
        try:
            if rows:
                texts = [responses[r] for r in rows]
                scores = score_responses(self.roles.reward, mine, texts, self.columns)
        except NonFiniteError as error:
            named = [rows[row] for row in error.rows]
            failed = error.having(rows=named, responses=[responses[row] for row in named])
        raise_together(failed, accelerator)
        by_prompt = [scores[start : start + k] for start in range(0, len(scores), k)]
        every = [score for part in gather_in_order(by_prompt, accelerator) for score in part]
        return torch.tensor(every, dtype=torch.float32, device=rollout.logprobs.device)

    def experience(self, rollout: Rollout, scores: Tensor, kl_coef: float) -> Experience:
        """Reference log-probs and values, then shaped rewards and advantages."""
        recipe, roles = self.recipe, self.roles
        roles.critic.eval()
        roles.actor.eval()
        ref_logprobs = self._at_tokens(rollout, roles.ref_logprobs)
        values = self._at_tokens(rollout, lambda batch: roles.critic(batch, at="counted"))
        return make_experience(
            rollout,
            scores=self._paid(rollout, scores),
            ref_logprobs=ref_logprobs,
            values=values,
            kl_coef=kl_coef if recipe.kl.charge == "reward" else 0.0,
            kl_kind=recipe.kl.estimator,
            gamma=recipe.ppo.gamma,
            gae_lambda=recipe.ppo.gae_lambda,
            whiten_rewards=recipe.ppo.whiten_rewards,
            whiten_advantages=recipe.ppo.whiten_advantages,
        )

    def _paid(self, rollout: Rollout, scores: Tensor) -> Tensor:
        """Raw scores ``[B]`` without the reward's own mean, and with the EOS trick."""
        paid = scores - getattr(self.roles.reward, "mean", 0.0)
        missing_eos_score = self.recipe.ppo.missing_eos_score
        if missing_eos_score is None:
            return paid
        return torch.where(rollout.finished, paid, missing_eos_score)

    def _at_tokens(self, rollout: Rollout, compute: Callable[[TokenBatch], Tensor]) -> Tensor:
        """``compute`` of every sampled token, ``[B,R]``; each process does its share of prompts."""
        accelerator, k = self.session.accelerator, self.recipe.generation.samples_per_prompt
        groups = rollout_groups(rollout, k)
        rows = self._my_rows(len(groups))
        found = torch.zeros_like(rollout.logprobs)
        found[rows] = over_rollout(
            [groups[row // k] for row in rows[::k]],
            compute,
            like=rollout.logprobs[rows],
            tokens_per_microbatch=self.recipe.tokens_per_microbatch,
        )
        return add_over_processes(found, accelerator)

    def _my_rows(self, num_prompts: int) -> list[int]:
        """This process's rows of a rollout: all samples of its share of the prompts."""
        k = self.recipe.generation.samples_per_prompt
        numbers = my_share(range(num_prompts), self.session.accelerator)
        return [number * k + sample for number in numbers for sample in range(k)]

    def evaluate(self, held_out: Split) -> dict[str, float]:
        """Score, KL, length and share that ends, of samples on held-out prompts."""
        # a reward that draws random numbers draws the same ones, whatever came before
        seed_step(self.recipe.seed, 104_729)
        members = list(range(len(held_out.groups)))
        rollout = self.sample(held_out, members, seed=self.recipe.seed + 104_729)
        scores = self.score(held_out.examples, rollout, self.decode(rollout, held_out.examples))
        ref_logprobs = self._at_tokens(rollout, self.roles.ref_logprobs)
        return {
            "score": scores.mean().item(),
            "kl": (rollout.logprobs - ref_logprobs).sum(1).mean().item(),
            "length": rollout.response_mask.sum(1).float().mean().item(),
            "eos_rate": rollout.finished.float().mean().item(),
        }
