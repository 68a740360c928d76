"""Cache sampled responses on disk by weights, prompts and sampling, so that metrics can be added.

Tokens and log-probabilities are cached, not figures, so everything measured on responses is
measured again each time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from align.base.checksums import load_tensors, save_tensors
from align.base.files import AGAIN, BROKEN, reason, writing
from align.base.progress import warn
from align.config.sections import GenerationOptions
from align.models import Policy
from align.models.load import fingerprint
from align.types import Rollout

TENSORS = ("input_ids", "response_mask", "logprobs", "finished")
"""Cached fields of a rollout; its prompts are part of the key."""


def cached_rollout(
    folder: Path | None,
    policy: Policy,
    prompts: Sequence[np.ndarray],
    options: GenerationOptions,
    *,
    end_ids: Sequence[int],
    seed: int,
    make: Callable[[], Rollout],
) -> Rollout:
    """Read the rollout of these weights, prompts and options from ``folder``, or make and cache it.

    An unreadable file is made again. ``slots`` and ``vllm`` are not in the key, since they do not
    change the samples.
    """
    if folder is None:
        return make()
    path = folder / f"{_key(policy, prompts, options, end_ids, seed)}.safetensors"
    try:
        held = load_tensors(path)[0]
        return _to_rollout(held, prompts, options.samples_per_prompt, policy.device)
    except FileNotFoundError:
        rollout = make()
    except BROKEN as error:
        warn(f"{path}: cannot be read ({reason(error)}); sampled again")
        rollout = make()
    with writing(path, "cache_outputs=false keeps none", again=AGAIN):
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors({name: getattr(rollout, name) for name in TENSORS}, path)
    return rollout


def _to_rollout(
    held: dict[str, torch.Tensor], prompts: Sequence[np.ndarray], k: int, device: torch.device
) -> Rollout:
    on_device = {name: tensor.to(device) for name, tensor in held.items()}
    return Rollout(prompt_ids=tuple(p for p in prompts for _ in range(k)), **on_device)


def _key(
    policy: Policy,
    prompts: Sequence[np.ndarray],
    options: GenerationOptions,
    end_ids: Sequence[int],
    seed: int,
) -> str:
    drawn = {
        name: value for name, value in asdict(options).items() if name not in ("slots", "vllm")
    }
    if options.temperature == 0:
        seed = 0  # nothing is drawn
    facts = [
        fingerprint(policy.inner),
        policy.precision,
        policy.attention,
        drawn,
        list(end_ids),
        seed,
    ]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for ids in prompts:
        digest.update(np.int64(len(ids)).tobytes() + np.asarray(ids, np.int32).tobytes())
    return digest.hexdigest()[:32]
