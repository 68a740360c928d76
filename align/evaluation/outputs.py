"""A model's answers to the evaluation prompts: generated, cached, or read from a JSONL."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from align.base.checksums import check_sums
from align.base.files import BROKEN, Unreadable, load_text, load_yaml, parse_object, reading, reason
from align.base.progress import warn
from align.base.suggest import did_you_mean
from align.config.keys import EvalRecipe
from align.config.sections import GenerationOptions, LoraOptions
from align.data.tokens.chat import encode_answers, encode_prompt, end_token_ids
from align.data.tokens.packing import pack
from align.evaluation.cache import cached_rollout
from align.models import Policy, load_policy, load_tokenizer
from align.models.lora import merged
from align.models.policy import batch_sequences
from align.rollout.engine import sample
from align.rollout.experience import decode_rollout, over_rollout, rollout_groups
from align.types import AlignError, PromptExample, Rollout


@dataclass(frozen=True)
class Outputs:
    """Answers to each prompt; the ``samples_per_prompt`` answers of a prompt are neighbours.

    Attributes:
        responses: Text, end token removed.
        lengths: Tokens of each response, end token included; None for outputs read from a file,
            since it is never guessed from characters.
        finished: True for each response that ended by itself; None for outputs read from a file.
        kl: Log-ratio to the reference of each response, nats; None without a reference.
    """

    responses: list[str]
    lengths: list[int] | None = None
    finished: list[bool] | None = None
    kl: list[float] | None = None


@dataclass(frozen=True)
class ReferenceFit:
    """Likelihood of each prompt's first reference under a model.

    Attributes:
        nll: Minus log p of the reference, summed over its tokens, nats ``[prompts]``.
        tokens: Tokens of each, end token included.
        num_bytes: UTF-8 bytes of each, to compare models with other tokenizers.
    """

    nll: np.ndarray
    tokens: np.ndarray
    num_bytes: np.ndarray


class Generator:
    """One model under evaluation, loaded once, that generates its answers."""

    def __init__(self, model: str, recipe: EvalRecipe, *, device: torch.device) -> None:
        checkpoint = training_checkpoint(model)
        name = checkpoint.model if checkpoint else model
        base = checkpoint.base_model if checkpoint else recipe.base_model
        self.tokenizer = load_tokenizer(
            name, trust_remote_code=recipe.trust_remote_code, base_model=base
        )
        self.policy = load_policy(
            name,
            device=device,
            precision=recipe.precision,
            attention=recipe.attention,
            lora=checkpoint.lora if checkpoint else None,
            trust_remote_code=recipe.trust_remote_code,
            base_model=base,
            from_scratch=checkpoint.from_scratch if checkpoint else False,
            frozen=True,
        )
        if checkpoint:
            checkpoint.load_into(self.policy)
        self.tokens_per_microbatch = recipe.tokens_per_microbatch
        self.cache = outputs_cache(recipe)

    def generate(
        self,
        examples: Sequence[PromptExample],
        options: GenerationOptions,
        *,
        seed: int,
        reference: Reference | None = None,
        on_tokens: Callable[[int], None] | None = None,
    ) -> Outputs:
        # KL is a mean over samples of the policy itself; greedy or nucleus outputs are not that
        sampled = options.temperature > 0 and options.top_p == 1
        end_ids = end_token_ids(self.tokenizer, self.policy.inner.generation_config.eos_token_id)
        prompts = [encode_prompt(self.tokenizer, e.prompt) for e in examples]

        def make() -> Rollout:
            return sample(
                self.policy,
                prompts,
                options,
                end_ids=end_ids,
                seed=seed,
                prefill_tokens=self.tokens_per_microbatch,
                on_tokens=on_tokens,
            )

        rollout = cached_rollout(
            self.cache, self.policy, prompts, options, end_ids=end_ids, seed=seed, make=make
        )
        return Outputs(
            decode_rollout(self.tokenizer, rollout, [e.prompt for e in examples], end_ids=end_ids),
            lengths=rollout.response_mask.sum(1).tolist(),
            finished=rollout.finished.tolist(),
            kl=reference.kl(rollout, options, self) if reference and sampled else None,
        )

    @torch.no_grad()
    def fit(self, examples: Sequence[PromptExample]) -> ReferenceFit:
        """Compute the log-probability of the first reference of each prompt, at temperature 1."""
        groups, sizes = [], []
        for example in examples:
            answer = example.references[:1]
            groups.append(encode_answers(self.tokenizer, example.prompt, answer, id=example.id))
            sizes.append(len(example.references[0].encode()))
        nll = np.zeros(len(groups))
        for batch in pack(groups, tokens_per_microbatch=self.tokens_per_microbatch):
            logprobs = self.policy(batch.to(self.policy.device)).logprobs.double().cpu().numpy()
            # counted tokens are in the order of the batch's columns, row by row
            rows, columns = batch.loss_mask.cpu().numpy().nonzero()
            for segment, number in zip(batch.sequences, batch_sequences(batch), strict=True):
                own = (rows == segment.row) & (columns >= segment.start) & (columns < segment.stop)
                nll[number] -= logprobs[own].sum()
        tokens = np.array([g.num_counted for g in groups])
        return ReferenceFit(nll, tokens, np.array(sizes))


class Reference:
    """The reference model of KL."""

    def __init__(self, generator: Generator) -> None:
        self._policy: Policy = generator.policy
        self._vocabulary = generator.tokenizer.get_vocab()
        self.generator = generator

    def kl(
        self, rollout: Rollout, options: GenerationOptions, generator: Generator
    ) -> list[float] | None:
        """Sum log pi - log pi_ref over each response, both at the sampling temperature.

        None if the vocabularies differ, since the two models then have different tokens.
        """
        if generator.tokenizer.get_vocab() != self._vocabulary:
            return None
        temperature = options.temperature or 1.0
        ref_logprobs = over_rollout(
            rollout_groups(rollout, options.samples_per_prompt),
            lambda batch: self._policy(batch, temperature=temperature).logprobs,
            like=rollout.logprobs,
            tokens_per_microbatch=generator.tokens_per_microbatch,
        )
        return (rollout.logprobs - ref_logprobs).sum(1).tolist()


@dataclass(frozen=True)
class TrainingCheckpoint:
    """``checkpoints/step-N`` of a run: parameters of the model that the run's recipe names."""

    weights: Path
    model: str
    lora: LoraOptions | None
    from_scratch: bool
    base_model: str | None = None

    def load_into(self, policy: Policy) -> None:
        with reading(f"models: {self.weights}"):
            check_sums(self.weights.parent, [self.weights.name], only=[self.weights.name])
            held = load_file(self.weights)
        parameters = dict(policy.named_parameters())
        unknown = [name for name in held if name not in parameters]
        if unknown:
            raise AlignError(f"models: {self.weights}: {self.model} has no parameter {unknown[0]}")
        with torch.no_grad():
            for name, weights in held.items():
                with reading(f"models: {self.weights}: {name}"):
                    parameters[name].copy_(weights)
        if self.lora is not None:
            adapted: Any = policy.model
            policy.model = merged(adapted).to(policy.device, policy.inner.dtype)


def training_checkpoint(model: str) -> TrainingCheckpoint | None:
    """Read a checkpoint folder of a run; None if ``model`` is no such folder."""
    folder = Path(model)
    if not (folder / "state.json").is_file():
        return None
    weights = [p for n in ("actor", "model") if (p := folder / f"{n}.safetensors").is_file()]
    config = folder.parents[1] / "config.yaml"
    if not weights:
        raise AlignError(f"models: {model}: a checkpoint, but not of a run of sft, dpo or ppo")
    try:
        recipe = load_yaml(config)
        lora = recipe.get("lora")
        if lora is not None:
            lora = LoraOptions(**lora | {"target_modules": tuple(lora["target_modules"])})
        return TrainingCheckpoint(
            weights[0],
            str(recipe["model"]),
            lora,
            bool(recipe.get("from_scratch")),
            recipe.get("base_model"),
        )
    except BROKEN as error:
        raise AlignError(
            f"models: {model}: a checkpoint, whose model {config} does not name: {reason(error)}"
        ) from error


def outputs_cache(recipe: EvalRecipe) -> Path | None:
    """Return the cache's folder, beside the run: shared by a suite, and not removed with a run."""
    return Path(recipe.output_dir).parent / "outputs_cache" if recipe.cache_outputs else None


_ROW = '{"prompt": ..., "response": "..."}'


def read_outputs(path: str, examples: Sequence[PromptExample]) -> Outputs:
    """Read another system's answers: JSONL rows with ``prompt`` and ``response``, in any order."""
    answers: dict[str, str] = {}
    if not os.path.lexists(path):
        raise AlignError(
            f"models: {path}: no such file{did_you_mean(Path(path))}; give JSONL rows {_ROW}, or a "
            "model's folder"
        )
    with reading(f"models: {path}"):
        lines = load_text(Path(path)).split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse_object(line)
        except Unreadable as error:
            raise AlignError(f"{path}:{number}: {error}; a row is {_ROW}") from error
        for name in ("prompt", "response"):
            if name not in row:
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
            f"{missing[0].id}: {_key(missing[0].prompt)[:60]}...; `prompt` has to be word for word "
            "that of `data`, and `data` may not have more prompts than were answered"
        )
    left = len(answers.keys() - {_key(e.prompt) for e in examples})
    if left:
        warn(f"{path}: {left} of {len(answers)} responses are to prompts that are not evaluated")
    return Outputs([answers[_key(e.prompt)] for e in examples])


def mean(values: Sequence[float] | Sequence[int] | Sequence[bool] | None) -> float | None:
    return None if values is None else float(np.mean(values))


def _key(prompt: object) -> str:
    return json.dumps(prompt, sort_keys=True, ensure_ascii=False)
