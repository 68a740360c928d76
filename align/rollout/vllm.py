"""Sample responses with vLLM, in this process, with the policy's current weights.

vLLM's kernels give slightly other log-probabilities than the policy. A rollout's ``logprobs`` are
therefore the policy's, from one packed pass over the sampled tokens; vLLM's are kept in
``engine_logprobs``.

A process has one engine, for one architecture, and loads all weights before each rollout: full ones
unchanged, LoRA's merged in float32. The engine starts with random weights, so a weight that was not
loaded shows in the first rollout, which is refused. Several processes are refused.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import math
import os
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.config.sections import GenerationOptions, VLLMOptions
from align.models.lora import plain_weights
from align.models.policy import Policy, check_length
from align.rollout.experience import over_rollout, rollout_groups
from align.rollout.sampler import require_finite, to_rollout
from align.types import AlignError, Rollout

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}

LARGEST_MISMATCH = {"bf16": 0.1, "fp32": 0.02}
"""Largest mean difference of vLLM from the policy at temperature 1, nats per token. Measured on a
CPU: 0.01 in bf16, 0.000001 in fp32."""

BATCH = 4096
"""Fewest tokens of one forward pass of vLLM: several short prompts at once."""

OURS = "set generation.engine=align"


def require_vllm() -> None:
    """Refuse if vLLM is not installed, or if several processes were started."""
    if importlib.util.find_spec("vllm") is None:
        raise AlignError(
            "generation.engine: vllm is not installed; run pip install 'align-rlhf[vllm]', "
            f"or {OURS}"
        )
    processes = int(os.environ.get("WORLD_SIZE") or 1)
    if processes > 1:
        raise AlignError(
            f"generation.engine: vllm samples in one process, and {processes} were started; "
            f"start one, or {OURS}"
        )


def sample(
    policy: Policy,
    prompts: Sequence[np.ndarray],
    options: GenerationOptions,
    *,
    end_ids: Sequence[int],
    seed: int,
    numbers: Sequence[int] | None = None,
    prefill_tokens: int = 4096,
    on_tokens: Callable[[int], None] | None = None,
) -> Rollout:
    """Sample like `align.rollout.sampler.sample`, with other random numbers.

    Sample j of prompt i has a generator of its own, seeded by (seed, i, j).

    Args:
        prefill_tokens: Tokens of one of the policy's passes over the samples.
        on_tokens: Called once, with the number of all tokens.

    Raises:
        AlignError: vLLM is missing, cannot run this model, or computes another one.
        NonFiniteError: The policy's log-probabilities are NaN or infinite.
    """
    longest = max(len(prompt) for prompt in prompts) + options.max_new_tokens
    check_length(policy, longest, "a prompt and its response may have")
    k = options.samples_per_prompt
    repeated = [prompt for prompt in prompts for _ in range(k)]
    numbers = range(len(prompts)) if numbers is None else numbers
    seeds = [_seed(seed, number, j) for number in numbers for j in range(k)]
    with _random_numbers_kept(policy.device):
        engine = _engine_for(policy, options)
        engine.require_room(longest)
        engine.load(policy)
        tokens, logprobs = engine.generate(repeated, seeds, options, end_ids)
    if on_tokens is not None:
        on_tokens(sum(len(row) for row in tokens))
    drawn = to_rollout(repeated, tokens, logprobs, end_ids=end_ids, device=policy.device)
    own = _logprobs(policy, drawn, options, prefill_tokens)
    sums = own.sum(-1).tolist()
    require_finite("a", "log-probability", sums, range(len(sums)))
    _require_same(policy, own, drawn, options)
    engine_logprobs = drawn.logprobs if options.top_p == 1 else None
    return replace(drawn, logprobs=own, engine_logprobs=engine_logprobs)


def _seed(seed: int, number: int, j: int) -> int:
    """Derive a seed of 63 bits: vLLM holds it in an int64 and takes -1 for none."""
    return int(np.random.SeedSequence([seed, number, j]).generate_state(1, np.uint64)[0] >> 1)


def _logprobs(
    policy: Policy, drawn: Rollout, options: GenerationOptions, tokens_per_microbatch: int
) -> Tensor:
    """Compute the policy's log-probs of the sampled tokens, ``[B,R]``, as the PPO update does."""
    temperature = options.temperature or 1.0
    training = policy.training
    policy.eval()
    try:
        return over_rollout(
            rollout_groups(drawn, options.samples_per_prompt),
            lambda batch: policy(batch, temperature=temperature).logprobs,
            like=drawn.logprobs,
            tokens_per_microbatch=tokens_per_microbatch,
        )
    finally:
        policy.train(training)


@dataclass(frozen=True)
class _Settings:
    """Start arguments of an engine.

    ``model`` is the configuration as JSON; ``tokens`` bounds a prompt with its response.
    """

    model: str
    dtype: str
    tokens: int
    slots: int
    vllm: VLLMOptions


class _Engine:
    """vLLM's ``LLM``, started with random weights."""

    def __init__(self, settings: _Settings, name: str) -> None:
        self.settings = settings
        # in this process, so that weights need no copy; vLLM reads this when it starts
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            require_vllm()
            raise AlignError(
                f"generation.engine: vllm cannot be imported: {_one_line(error)}; "
                f"install it for this torch, or {OURS}"
            ) from error
        self.params = SamplingParams
        with tempfile.TemporaryDirectory() as folder:
            with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
                file.write(settings.model)
            try:
                self.llm: Any = LLM(
                    model=folder,
                    load_format="dummy",
                    skip_tokenizer_init=True,
                    dtype=settings.dtype,
                    max_model_len=settings.tokens,
                    max_num_seqs=settings.slots,
                    # a chunked prompt draws and returns random numbers, which fails on a CPU
                    enable_chunked_prefill=False,
                    max_num_batched_tokens=max(settings.tokens, settings.slots, BATCH),
                    gpu_memory_utilization=settings.vllm.gpu_memory_utilization,
                    enforce_eager=settings.vllm.eager,
                    # after the temperature, which greedy decoding does not apply
                    logprobs_mode="processed_logprobs",
                )
            except Exception as error:
                raise AlignError(
                    f"generation.engine: vllm cannot run {name}: {_one_line(error)}; change "
                    f"generation.vllm.gpu_memory_utilization if it is memory, or {OURS}"
                ) from error

    def require_room(self, tokens: int) -> None:
        if tokens > self.settings.tokens:
            raise AlignError(
                f"generation.vllm.max_tokens: is {self.settings.tokens}, but a prompt and its "
                f"response may have {tokens}; raise it"
            )

    def load(self, policy: Policy) -> None:
        """Load every weight of the policy and drop the keys and values of older weights."""
        try:
            self.llm.collective_rpc(
                "reload_weights", kwargs={"weights_iterator": plain_weights(policy.model)}
            )
            self.llm.apply_model(_pack_tied_head)
        except Exception as error:
            raise AlignError(
                f"generation.engine: vllm does not take the weights of {policy.name}: "
                f"{_one_line(error)}; {OURS}"
            ) from error
        if not self.llm.reset_prefix_cache():
            raise AlignError(
                "generation.engine: vllm still holds keys and values of older weights; start the "
                f"run again with resume=auto, or {OURS}"
            )

    def generate(
        self,
        prompts: Sequence[np.ndarray],
        seeds: Sequence[int],
        options: GenerationOptions,
        end_ids: Sequence[int],
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Generate a response to each prompt: tokens, end token included, and vLLM's log-probs."""
        params = [
            self.params(
                temperature=options.temperature,
                top_p=options.top_p,
                seed=seed,
                max_tokens=options.max_new_tokens,
                stop_token_ids=list(end_ids),
                ignore_eos=True,  # `end_ids` alone end a response
                logprobs=0,  # of the sampled token alone
                detokenize=False,
            )
            for seed in seeds
        ]
        asked = [{"prompt_token_ids": prompt.tolist()} for prompt in prompts]
        try:
            outputs = self.llm.generate(asked, params, use_tqdm=False)
        except Exception as error:
            raise AlignError(
                f"generation.engine: vllm stopped sampling: {_one_line(error)}; {OURS}"
            ) from error
        answers = [output.outputs[0] for output in outputs]
        broken = [a.finish_reason for a in answers if a.finish_reason not in ("stop", "length")]
        if broken:
            raise AlignError(
                f"generation.engine: vllm broke {len(broken)} of {len(answers)} responses off "
                f"({broken[0]}); {OURS}"
            )
        tokens = [list(answer.token_ids) for answer in answers]
        logprobs = [
            [found[token].logprob for token, found in zip(row, answer.logprobs, strict=True)]
            for row, answer in zip(tokens, answers, strict=True)
        ]
        return tokens, logprobs


def _pack_tied_head(model: torch.nn.Module) -> None:
    """Pack a tied head again after its weights changed.

    On a CPU vLLM 0.32 computes logits from a packed copy of the head, which `reload_weights` does
    not renew if the head is the embedding; `_require_same` caught it.
    """
    module: Any
    for module in model.modules():
        weight = getattr(module, "weight", None)
        # other layers drop their weight once packed, and were packed again
        if hasattr(module, "cpu_linear") and weight is not None and weight.numel():
            module.quant_method.process_weights_after_loading(module)


_running: list[_Engine] = []


def _engine_for(policy: Policy, options: GenerationOptions) -> _Engine:
    """Return the process's one engine, started on first use: vLLM does not free its memory."""
    settings = _settings(policy, options)
    if not _running:
        require_vllm()
        _running.append(_Engine(settings, policy.name))
        atexit.register(_stop)
    if _running[0].settings != settings:
        raise AlignError(
            f"generation.engine: this process's vllm was started for another architecture, "
            f"precision or generation than {policy.name} now asks for; {OURS}"
        )
    return _running[0]


def _stop() -> None:
    """Stop the engine at exit, before the process group ends, which vLLM needs to shut down."""
    while _running:
        _running.pop().llm.llm_engine.engine_core.shutdown()


def _settings(policy: Policy, options: GenerationOptions) -> _Settings:
    config = policy.inner.config.to_dict()
    for name in ("_name_or_path", "transformers_version", "dtype", "auto_map"):
        config.pop(name, None)
    config["architectures"] = [type(policy.inner).__name__]
    text = json.dumps(config, sort_keys=True, default=str)
    positions = getattr(policy.inner.config.get_text_config(), "max_position_embeddings", None)
    tokens = min(options.vllm.max_tokens, positions or options.vllm.max_tokens)
    return _Settings(text, DTYPES[policy.precision], tokens, options.slots, options.vllm)


@contextmanager
def _random_numbers_kept(device: torch.device) -> Iterator[None]:
    """Restore this process's generators, which vLLM seeds when it starts."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _require_same(policy: Policy, own: Tensor, drawn: Rollout, options: GenerationOptions) -> None:
    """Refuse responses whose log-probs show that vLLM ran another model than the policy."""
    difference = (drawn.logprobs - own).abs()[drawn.response_mask].mean().item()
    # dividing logits scales their differences; a nucleus is up to 1 / top_p more probable
    allowed = LARGEST_MISMATCH[policy.precision] / min(options.temperature or 1.0, 1.0)
    allowed += -math.log(options.top_p)
    if not difference <= allowed:
        raise AlignError(
            f"generation.engine: vllm's log-probabilities differ from those of {policy.name} by "
            f"{difference:.3g} nats per token, more than rounding ({allowed:.3g}): it runs this "
            f"model in another way; {OURS}"
        )


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".:;") if lines else type(error).__name__
