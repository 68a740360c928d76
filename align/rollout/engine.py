"""Sampling engines, align's own and vLLM, behind one function."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from align.config.sections import GenerationOptions
from align.models.policy import Policy
from align.rollout import sampler, vllm
from align.types import Rollout

ENGINES = {"align": sampler.sample, "vllm": vllm.sample}


def require_engine(options: GenerationOptions) -> None:
    """Refuse an engine that is not available, before anything slow.

    Raises:
        AlignError: vLLM is not installed, or several processes were started.
    """
    if options.engine == "vllm":
        vllm.require_vllm()


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
    """Sample responses with the engine of ``options.engine``; log-probs are the policy's.

    Row ``i * k + j`` is sample j of prompt i; `align.rollout.sampler.sample` documents the
    arguments.
    """
    return ENGINES[options.engine](
        policy,
        prompts,
        options,
        end_ids=end_ids,
        seed=seed,
        numbers=numbers,
        prefill_tokens=prefill_tokens,
        on_tokens=on_tokens,
    )
