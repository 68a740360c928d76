"""Cache reference log-probabilities on disk, keyed by the reference's weights and the token ids.

A second epoch, a second run and another beta then cost nothing for the reference. A key from the
model's *name* would be wrong as soon as the folder's content changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from align.base.checksums import load_tensors, save_tensors
from align.base.files import BROKEN, reason, writing
from align.base.progress import Progress, warn
from align.data.tokens.groups import TokenGroups
from align.data.tokens.packing import WINDOW, pack, windows
from align.models.load import fingerprint
from align.models.policy import Policy, batch_sequences
from align.training.distributed import gather_in_order, max_over_processes, my_share
from align.types import TokenBatch, TokenGroup


class ReferenceCache:
    """Summed log-probs, float32 ``[sequences]``, of every continuation of every group."""

    def __init__(self, groups: TokenGroups, logprobs: np.ndarray) -> None:
        counts = groups.num_continuations()
        self._first = np.cumsum([0, *counts])
        self._logprobs = logprobs

    @classmethod
    def compute(
        cls,
        reference: Policy,
        groups: TokenGroups,
        logprobs_of: Callable[[TokenBatch, Sequence[TokenGroup]], Tensor],
        *,
        folder: Path,
        tokens_per_microbatch: int,
        accelerator: Accelerator,
    ) -> ReferenceCache:
        """Read the log-probs of all groups from ``folder``, or compute and write them.

        Each rank computes its share.
        """
        path = folder / f"{_key(reference, groups)}.safetensors"
        kept = _read(path)
        missing = max_over_processes(float(kept is None), accelerator)  # all ranks take one branch
        if kept is not None and not missing:
            return cls(groups, kept)
        is_main = accelerator.is_main_process
        size = min(WINDOW, -(-len(groups) // accelerator.num_processes) or 1)
        mine = my_share(list(windows(range(len(groups)), size)), accelerator)
        parts: list[np.ndarray] = []
        reference.eval()
        with Progress(sum(map(len, mine)), "reference", unit="row", shown=is_main) as bar:
            for members in mine:
                part = [groups[i] for i in members]
                found = np.zeros(sum(len(g.continuations) for g in part), dtype=np.float32)
                for batch in pack(part, tokens_per_microbatch=tokens_per_microbatch):
                    computed = logprobs_of(batch.to(reference.device), part)
                    found[batch_sequences(batch)] = computed.cpu().numpy()
                    bar.advance(steps=0, tokens=batch.num_tokens)
                parts.append(found)
                bar.advance(steps=len(part))
        every = gather_in_order(parts, accelerator)
        logprobs = np.concatenate([np.zeros(0, dtype=np.float32), *every])
        if is_main and len(logprobs):
            with writing(path, "dpo.reference=online keeps none"):
                folder.mkdir(parents=True, exist_ok=True)
                save_tensors({"logprobs": torch.from_numpy(logprobs)}, path)
        return cls(groups, logprobs)

    def lookup(self, batch: TokenBatch, groups: Sequence[TokenGroup]) -> Tensor:
        """Return a batch's log-probs; its sequences are numbered over the groups' answers."""
        numbers = [group.index for group in groups]
        mine = np.concatenate([np.arange(self._first[i], self._first[i + 1]) for i in numbers])
        found = self._logprobs[mine[batch_sequences(batch)]]
        return torch.from_numpy(found).to(batch.input_ids.device)


def _read(path: Path) -> np.ndarray | None:
    """Read cached log-probs; None if there are none, or if they are damaged."""
    try:
        return load_tensors(path)[0]["logprobs"].numpy()
    except FileNotFoundError:
        return None
    except BROKEN as error:
        warn(f"{path}: cannot be read ({reason(error)}); computing it again")
        return None


def _key(reference: Policy, groups: TokenGroups) -> str:
    digest = hashlib.sha256(fingerprint(reference.inner).encode())
    digest.update(f"{reference.precision} {reference.attention}".encode())
    groups.update(digest)
    return digest.hexdigest()[:32]
