"""Use a trained reward model as a reward source, with its own tokenizer and chat template.

A score is a function of the text: prompt and response are tokenised as in the reward model's
training, end token included, whatever tokens the policy sampled. So a response has one score, in
training, in PPO, in evaluation and through plain transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import cached_file

from align.base.files import BROKEN, load_json
from align.data.tokens.chat import encode_answers
from align.data.tokens.packing import longest_sequence, pack
from align.models import load_scalar_model, load_tokenizer
from align.models.policy import ScalarModel, batch_sequences, check_length
from align.rewards.function import checked_scores
from align.types import AlignError, Columns, Text, TokenGroup


class ModelReward:
    """Scores in the reward model's unit; ``mean`` is its training data's mean, 0 if unknown."""

    def __init__(
        self,
        model: ScalarModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        tokens_per_microbatch: int = 4096,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.tokens_per_microbatch = tokens_per_microbatch
        self.name = f"model:{model.name}"
        self.mean = _recorded_mean(model.name)

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[Text],
        responses: Sequence[str],
        references: Sequence[Sequence[str]],
        columns: Columns | None = None,
    ) -> list[float]:
        if not responses:
            return []
        training = self.model.training
        self.model.eval()
        scores = np.zeros(len(responses))
        groups = self._groups(prompts, responses)
        longest = max(longest_sequence(group) for group in groups)
        check_length(self.model, longest, "a prompt and its response have")
        for batch in pack(groups, tokens_per_microbatch=self.tokens_per_microbatch):
            found = self.model(batch.to(self.model.device), at="last")
            scores[batch_sequences(batch)] = found.double().cpu().numpy()
        self.model.train(training)
        return checked_scores(self.name, scores, len(responses))

    def _groups(self, prompts: Sequence[Text], responses: Sequence[str]) -> list[TokenGroup]:
        """Group neighbouring responses to one prompt, which is then computed once."""
        groups: list[TokenGroup] = []
        start = 0
        for stop in range(1, len(prompts) + 1):
            if stop == len(prompts) or prompts[stop] != prompts[start]:
                groups.append(encode_answers(self.tokenizer, prompts[start], responses[start:stop]))
                start = stop
        return groups


def reward_model_loader(
    device: torch.device,
    *,
    precision: str,
    attention: str,
    trust_remote_code: bool,
    base_model: str | None = None,
    tokens_per_microbatch: int,
) -> Callable[[str], ModelReward]:
    """Make ``load(folder or hub id)``, which returns a frozen model, for `build_reward`."""

    def load(model: str) -> ModelReward:
        scalar = load_scalar_model(
            model,
            device=device,
            precision=precision,
            attention=attention,
            trust_remote_code=trust_remote_code,
            base_model=base_model,
            head_required=True,
        )
        scalar.requires_grad_(False)
        tokenizer = load_tokenizer(
            model, trust_remote_code=trust_remote_code, base_model=base_model
        )
        return ModelReward(scalar.eval(), tokenizer, tokens_per_microbatch=tokens_per_microbatch)

    return load


def _recorded_mean(model: str) -> float:
    """Read the mean beside the weights, in a folder or on the hub; 0 if there is no file."""
    path = cached_file(
        model,
        "reward_stats.json",
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None:
        return 0.0
    try:
        return float(load_json(Path(path))["mean"])
    except BROKEN as error:
        raise AlignError(
            f'reward model {model}: {path}: wanted {{"mean": number}}, as `align rm` writes it'
        ) from error
