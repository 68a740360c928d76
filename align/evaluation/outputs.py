"""A model's answers to the evaluation prompts: generated, or read from somebody's JSONL."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from align.data.chat import encode_prompt, end_token_ids
from align.models import Policy, load_policy, load_tokenizer
from align.options import GenerationOptions
from align.rollout.experience import decode_rollout, over_rollout, rollout_groups
from align.rollout.sampler import sample
from align.types import AlignError, PromptExample, Rollout


@dataclass(frozen=True)
class Outputs:
    """Answers to each prompt, ``samples_per_prompt`` neighbours for one prompt.

    Attributes:
        responses: Text, end token removed.
        lengths: Tokens of each response, end token included; characters / 4 is never guessed, so
            it is None for outputs read from a file.
        finished: Whether each ended by itself; None for outputs read from a file.
        kl: Log-ratio to the reference of each response, nats; None without a reference.
    """

    responses: list[str]
    lengths: list[int] | None = None
    finished: list[bool] | None = None
    kl: list[float] | None = None


class Answerer:
    """One model under evaluation, loaded once."""

    def __init__(
        self,
        model: str,
        *,
        device: torch.device,
        precision: str,
        trust_remote_code: bool,
        tokens_per_microbatch: int,
    ) -> None:
        self.tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
        self.policy = load_policy(
            model,
            device=device,
            precision=precision,
            trust_remote_code=trust_remote_code,
            frozen=True,
        )
        self.tokens_per_microbatch = tokens_per_microbatch

    def answer(
        self,
        examples: Sequence[PromptExample],
        options: GenerationOptions,
        *,
        seed: int,
        reference: Reference | None = None,
        on_tokens: Callable[[int], None] | None = None,
    ) -> Outputs:
        # KL is a mean over what the policy itself says; of greedy or nucleus outputs it is none
        sampled = options.temperature > 0 and options.top_p == 1
        end_ids = end_token_ids(self.tokenizer, self.policy.inner.generation_config.eos_token_id)
        rollout = sample(
            self.policy,
            [encode_prompt(self.tokenizer, e.prompt) for e in examples],
            options,
            end_ids=end_ids,
            seed=seed,
            prefill_tokens=self.tokens_per_microbatch,
            on_tokens=on_tokens,
        )
        return Outputs(
            decode_rollout(self.tokenizer, rollout, end_ids=end_ids),
            lengths=rollout.response_mask.sum(1).tolist(),
            finished=rollout.finished.tolist(),
            kl=reference.kl(rollout, options, self) if reference and sampled else None,
        )


class Reference:
    """The model that KL is measured against."""

    def __init__(self, answerer: Answerer) -> None:
        self._policy: Policy = answerer.policy
        self._vocabulary = answerer.tokenizer.get_vocab()

    def kl(
        self, rollout: Rollout, options: GenerationOptions, answerer: Answerer
    ) -> list[float] | None:
        """Sum of log pi - log pi_ref over each response, both at the sampling temperature.

        None where the vocabularies differ: the two models then do not speak of the same tokens.
        """
        if answerer.tokenizer.get_vocab() != self._vocabulary:
            return None
        temperature = options.temperature or 1.0
        ref_logprobs = over_rollout(
            rollout,
            rollout_groups(rollout, options.samples_per_prompt),
            lambda batch: self._policy(batch, temperature=temperature).logprobs,
            tokens_per_microbatch=answerer.tokens_per_microbatch,
        )
        return (rollout.logprobs - ref_logprobs).sum(1).tolist()


_ROW = '{"prompt": ..., "response": "..."}'


def read_outputs(path: str, examples: Sequence[PromptExample]) -> Outputs:
    """Somebody else's answers: JSONL rows with ``prompt`` and ``response``, in any order."""
    answers: dict[str, str] = {}
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise AlignError(f"models: {path}: cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise AlignError(f"{path}:{number}: not JSON: {error}") from error
        for name in ("prompt", "response"):
            if not isinstance(row, dict) or name not in row:
                raise AlignError(f"{path}:{number}: has no `{name}`; a row is {_ROW}")
        key = _key(row["prompt"])
        if key in answers:
            raise AlignError(f"{path}:{number}: a second response to the same prompt; keep one")
        if not isinstance(row["response"], str):
            raise AlignError(f"{path}:{number}: response: wanted text; a row is {_ROW}")
        answers[key] = row["response"]
    missing = [e for e in examples if _key(e.prompt) not in answers]
    if missing:
        raise AlignError(
            f"{path}: no response to {len(missing)} of {len(examples)} prompts; the first is "
            f"{missing[0].id}: {_key(missing[0].prompt)[:60]}; `prompt` has to be word for word "
            "that of `data`"
        )
    return Outputs([answers[_key(e.prompt)] for e in examples])


def mean(values: Sequence[float] | Sequence[int] | Sequence[bool] | None) -> float | None:
    return None if values is None else float(np.mean(values))


def _key(prompt: object) -> str:
    return json.dumps(prompt, sort_keys=True, ensure_ascii=False)
