"""Reference log-probabilities on disk, keyed by the reference's weights and the token ids.

A second epoch, a second run and another beta then pay nothing for the reference. A key made of the
model's *name* would be wrong as soon as the folder's content changes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from align.data.packing import pack, windows
from align.data.token_cache import GroupFile
from align.models.load import fingerprint
from align.models.policy import Policy, batch_sequences
from align.progress import Progress
from align.types import TokenBatch


class ReferenceCache:
    """Summed log-probs, float32 ``[sequences]``, of every continuation of every group."""

    def __init__(self, groups: GroupFile, logprobs: np.ndarray) -> None:
        counts = groups.num_continuations()
        self._first = np.cumsum([0, *counts])
        self._logprobs = logprobs

    @classmethod
    def compute(
        cls,
        reference: Policy,
        groups: GroupFile,
        logprobs_of: Callable[[TokenBatch, Sequence[int]], Tensor],
        *,
        folder: Path,
        tokens_per_microbatch: int,
        is_main: bool,
    ) -> ReferenceCache:
        """Read the log-probs of all groups from ``folder``, or compute and write them."""
        path = folder / f"{_key(reference, groups)}.safetensors"
        if path.is_file():
            return cls(groups, load_file(path)["logprobs"])
        parts = [np.zeros(0, dtype=np.float32)]
        reference.eval()
        with Progress(len(groups), "reference", unit="row", shown=is_main) as bar:
            for part in windows(groups):
                found = np.zeros(sum(len(g.continuations) for g in part), dtype=np.float32)
                for batch in pack(part, tokens_per_microbatch=tokens_per_microbatch):
                    computed = logprobs_of(batch.to(reference.device), range(len(part)))
                    found[batch_sequences(batch)] = computed.cpu().numpy()
                    bar.advance(steps=0, tokens=batch.num_tokens)
                parts.append(found)
                bar.advance(steps=len(part))
        logprobs = np.concatenate(parts)
        if is_main and len(logprobs):
            folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}.partial")
            save_file({"logprobs": logprobs}, partial)
            os.replace(partial, path)
        return cls(groups, logprobs)

    def lookup(self, batch: TokenBatch, members: Sequence[int]) -> Tensor:
        """Log-probs of a batch whose sequences are numbered over ``members``' continuations."""
        mine = np.concatenate([np.arange(self._first[i], self._first[i + 1]) for i in members])
        found = self._logprobs[mine[batch_sequences(batch)]]
        return torch.from_numpy(found).to(batch.input_ids.device)


def _key(reference: Policy, groups: GroupFile) -> str:
    digest = hashlib.sha256(fingerprint(reference.inner).encode())
    digest.update(reference.precision.encode())
    groups.update(digest)
    return digest.hexdigest()[:32]
