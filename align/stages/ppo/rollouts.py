"""The roles of PPO at work on a rollout: sample, score, reference log-probabilities, values.

Nothing here trains and nothing is kept between two calls. Every rank works on its share of the
prompts and gets the results of all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from align.config.keys import PPORecipe
from align.rewards import score_responses
from align.rollout.engine import sample
from align.rollout.experience import decode_rollout, over_rollout, rollout_groups
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
from align.types import NonFiniteError, PromptExample, Rollout, TokenBatch

EVALUATION = 104_729
"""Added to the seed, and taken as the step, where held-out prompts are sampled."""


class RolloutWorker:
    """Sample responses to prompts and evaluate them under every role.

    Attributes:
        columns: Names of the data's extra columns, which every call of the reward gets.
    """

    def __init__(
        self, recipe: PPORecipe, session: Session, roles: Roles, columns: Sequence[str] = ()
    ) -> None:
        self.recipe, self.session, self.roles = recipe, session, roles
        self.columns = columns
        self.end_ids = policy_end_ids(roles.actor, session)

    def sample(self, split: Split, members: Sequence[int], *, seed: int) -> Rollout:
        """Sample responses to these prompts of a split, in their order.

        Raises:
            NonFiniteError: A logit is NaN or infinite; its rows are those of the whole rollout.
        """
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
                prefill_tokens=self.recipe.train.tokens_per_microbatch,
            )
        except NonFiniteError as error:
            failed = error.having(rows=[numbers[row // k] * k + row % k for row in error.rows])
        raise_together(failed, accelerator)
        assert rollout is not None
        return gather_rollout(rollout, k, accelerator)

    def decode(self, rollout: Rollout, examples: Sequence[PromptExample]) -> list[str]:
        """Return the text of each response to the examples."""
        prompts = [example.prompt for example in examples]
        return decode_rollout(self.session.tokenizer, rollout, prompts, end_ids=self.end_ids)

    def score(
        self, examples: Sequence[PromptExample], rollout: Rollout, responses: Sequence[str]
    ) -> Tensor:
        """Return the reward's raw score of each response, ``[B]``.

        Raises:
            NonFiniteError: A score is NaN, infinite or beyond float32.
        """
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

    def terminal_rewards(self, rollout: Rollout, scores: Tensor) -> Tensor:
        """Return the reward of each response's last token, ``[B]``.

        It is the score less the reward model's own mean, or `ppo.missing_eos_score` where the
        response did not end.
        """
        centred = scores - getattr(self.roles.reward, "mean", 0.0)
        missing_eos_score = self.recipe.ppo.missing_eos_score
        if missing_eos_score is None:
            return centred
        return torch.where(rollout.finished, centred, missing_eos_score)

    def ref_logprobs(self, rollout: Rollout) -> Tensor:
        """Return each sampled token's log-probability under the frozen reference, ``[B,R]``.

        Raises:
            NonFiniteError: One of them is NaN or infinite; its rows are those of the rollout.
        """
        self.roles.actor.eval()  # with LoRA the reference is the actor with its adapter off
        return self._at_tokens(rollout, self.roles.ref_logprobs, "reference log-probability")

    def values(self, rollout: Rollout) -> Tensor:
        """Return the critic's value before each sampled token, ``[B,R]``.

        Raises:
            NonFiniteError: One of them is NaN or infinite; its rows are those of the rollout.
        """
        critic = self.roles.critic.eval()
        return self._at_tokens(rollout, lambda batch: critic(batch, at="counted"), "critic's value")

    def evaluate(self, held_out: Split) -> dict[str, float]:
        """Sample held-out prompts: mean score, KL, length and share of responses that end."""
        # a reward that draws random numbers draws the same ones at every evaluation
        seed_step(self.recipe.seed, EVALUATION)
        members = range(len(held_out.groups))
        rollout = self.sample(held_out, members, seed=self.recipe.seed + EVALUATION)
        responses = self.decode(rollout, held_out.examples)
        scores = self.score(held_out.examples, rollout, responses)
        kl = (rollout.logprobs - self.ref_logprobs(rollout)).sum(1)
        return {
            "score": scores.mean().item(),
            "kl": kl.mean().item(),
            "length": rollout.response_mask.sum(1).float().mean().item(),
            "eos_rate": rollout.finished.float().mean().item(),
        }

    def _at_tokens(
        self, rollout: Rollout, compute: Callable[[TokenBatch], Tensor], what: str
    ) -> Tensor:
        """Compute a finite number for every sampled token, ``[B,R]``."""
        accelerator, k = self.session.accelerator, self.recipe.generation.samples_per_prompt
        groups = rollout_groups(rollout, k)
        rows = self._my_rows(len(groups))
        found = torch.zeros_like(rollout.logprobs)
        found[rows] = over_rollout(
            [groups[row // k] for row in rows[::k]],
            compute,
            like=rollout.logprobs[rows],
            tokens_per_microbatch=self.recipe.train.tokens_per_microbatch,
        )
        found = add_over_processes(found, accelerator)
        bad = ~found.isfinite()
        if bad.any():
            value = found[bad][0].item()
            raise NonFiniteError(
                f"a {what} became {value}",
                what=what,
                value=value,
                rows=bad.any(1).nonzero().flatten().tolist(),
                cure="lower optim.lr",
            )
        return found

    def _my_rows(self, num_prompts: int) -> list[int]:
        """Rows of this rank: all samples of its share of the prompts."""
        k = self.recipe.generation.samples_per_prompt
        numbers = my_share(range(num_prompts), self.session.accelerator)
        return [number * k + sample for number in numbers for sample in range(k)]
