"""A stand-in for vLLM with the names, arguments and records of its 0.32 that align uses.

Its model is transformers' own. It starts with random weights, draws with a generator of each
request's own, and keeps what it computed of a prompt until the prefix cache is reset: weights or
keys that are out of date show, as they would in vLLM.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM


@dataclass(kw_only=True)
class SamplingParams:
    """``vllm.SamplingParams``, those of its fields that align sets."""

    temperature: float
    top_p: float
    seed: int
    max_tokens: int
    stop_token_ids: list[int]
    ignore_eos: bool
    logprobs: int
    detokenize: bool


class LLM:
    """``vllm.LLM`` in this process."""

    started: list[LLM]
    reloads = True

    def __init__(
        self,
        model: str,
        *,
        load_format: str,
        skip_tokenizer_init: bool,
        dtype: str,
        max_model_len: int,
        max_num_seqs: int,
        enable_chunked_prefill: bool,
        max_num_batched_tokens: int,
        gpu_memory_utilization: float,
        enforce_eager: bool,
        logprobs_mode: str,
    ) -> None:
        if gpu_memory_utilization > 0.95:
            raise ValueError("Available memory is less than desired.\nDecrease it.")
        assert (load_format, skip_tokenizer_init) == ("dummy", True)
        assert not enable_chunked_prefill
        assert max_num_batched_tokens >= max(max_model_len, max_num_seqs)
        assert logprobs_mode == "processed_logprobs"
        random.seed(0)  # vLLM seeds the process's own generators
        np.random.seed(0)
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(model)
        self.model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
        for parameter in self.model.parameters():
            parameter.data.uniform_(-1e-3, 1e-3)
        assert max_model_len <= config.max_position_embeddings
        self.max_num_seqs, self.enforce_eager = max_num_seqs, enforce_eager
        self.first: dict[tuple[int, ...], torch.Tensor] = {}
        self.started.append(self)

    def collective_rpc(self, method: str, *, kwargs: dict[str, Any]) -> list[None]:
        assert method == "reload_weights"
        (weights,) = kwargs.values()
        self._reload(**kwargs)
        assert not list(weights)  # all of them were taken
        return [None]

    def _reload(self, weights_iterator: Iterable[tuple[str, torch.Tensor]]) -> None:
        own = dict(self.model.named_parameters())
        for name, tensor in weights_iterator:
            if name not in own:
                raise ValueError(f"There is no module or parameter named {name!r}")
            if self.reloads:
                own[name].data.copy_(tensor)

    def apply_model(self, func: Any) -> list[Any]:
        return [func(self.model)]

    def reset_prefix_cache(self) -> bool:
        self.first.clear()
        return True

    def generate(
        self, prompts: Sequence[dict[str, list[int]]], params: Sequence[Any], *, use_tqdm: bool
    ) -> list[Any]:
        assert use_tqdm is False
        return [
            SimpleNamespace(outputs=[self._answer(prompt["prompt_token_ids"], one)])
            for prompt, one in zip(prompts, params, strict=True)
        ]

    @torch.no_grad()
    def _answer(self, prompt: list[int], params: SamplingParams) -> Any:
        assert (params.logprobs, params.detokenize, params.ignore_eos) == (0, False, True)
        generator = torch.Generator().manual_seed(params.seed)
        tokens: list[int] = []
        logprobs: list[dict[int, Any]] = []
        while len(tokens) < params.max_tokens:
            logits = self._logits(prompt, tokens)
            if params.temperature:
                logits = logits / params.temperature
            found = logits.log_softmax(-1)
            if params.top_p < 1:
                ordered, order = found.exp().sort(descending=True)
                outside = ordered.cumsum(0) - ordered >= params.top_p
                found = found.scatter(0, order[outside], float("-inf")).log_softmax(-1)
            if params.temperature:
                token = int(torch.multinomial(found.exp(), 1, generator=generator))
            else:
                token = int(found.argmax())
            tokens.append(token)
            logprobs.append({token: SimpleNamespace(logprob=found[token].item())})
            if token in params.stop_token_ids:
                return SimpleNamespace(token_ids=tokens, logprobs=logprobs, finish_reason="stop")
        return SimpleNamespace(token_ids=tokens, logprobs=logprobs, finish_reason="length")

    def _logits(self, prompt: list[int], tokens: list[int]) -> torch.Tensor:
        if tokens or tuple(prompt) not in self.first:
            logits = self.model(torch.tensor([[*prompt, *tokens]])).logits[0, -1].float()
            if tokens:
                return logits
            self.first[tuple(prompt)] = logits
        return self.first[tuple(prompt)]


def module() -> ModuleType:
    """What ``import vllm`` finds; nothing has been started in it."""
    made = ModuleType("vllm")
    made.__spec__ = ModuleSpec("vllm", None)
    fresh = type("LLM", (LLM,), {"started": []})
    made.LLM, made.SamplingParams = fresh, SamplingParams  # type: ignore[attr-defined]
    return made
