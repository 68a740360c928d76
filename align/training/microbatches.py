"""Microbatches under a token budget that is halved when memory runs out, without losing the step.

Gradients are sums over microbatches, so a step that is done again in smaller ones has the same
result. With several processes it is not done again: the others would wait for this one for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from align.base.progress import say
from align.data.tokens.packing import pack
from align.types import AlignError, TokenBatch, TokenGroup

ADVICE = "data.max_tokens, or set gradient_checkpointing=true or lora.r=16"

Visit = Callable[[TokenBatch, bool], None]


def is_out_of_memory(error: BaseException) -> bool:
    """Recognise out-of-memory errors of a GPU, of page-locked memory, or of torch's CPU allocator.

    The last two raise a plain RuntimeError.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = ("DefaultCPUAllocator", "CUDA error: out of memory")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in said)


class Microbatches:
    """Token budget of one forward and backward; it only decreases during a run."""

    def __init__(self, tokens: int, *, num_processes: int) -> None:
        self.tokens = tokens
        self.num_processes = num_processes

    def accumulate(
        self,
        groups: Sequence[TokenGroup],
        visit: Visit,
        restart: Callable[[], None],
        *,
        rounds: Callable[[int], int] = int,
        idle: Visit | None = None,
    ) -> int:
        """Call ``visit(batch, is_last)`` for every microbatch of the groups; return their tokens.

        Args:
            visit: Forward and backward of one microbatch; gradients add up.
            restart: Called before everything is repeated: clear gradients and sums.
            rounds: Number of microbatches -> number of visits, which may be more: the others are
                ``idle(batch, is_last)`` with a batch that was visited already.

        Raises:
            AlignError: One group alone needs more memory than there is.
        """
        while True:
            batches = pack(groups, tokens_per_microbatch=self.tokens)
            visits = [(batch, visit) for batch in batches]
            smallest = min(batches, key=lambda batch: batch.num_tokens)
            visits += [(smallest, idle or visit)] * (rounds(len(batches)) - len(batches))
            failed = _first_failing(visits)
            if failed is None:
                return sum(batch.num_tokens for batch in batches)
            restart()
            self._halve(groups, failed)

    def _halve(self, groups: Sequence[TokenGroup], failed: TokenBatch) -> None:
        firsts = np.cumsum([len(group.continuations) for group in groups])
        owners = {int(np.searchsorted(firsts, s.sequence, "right")) for s in failed.sequences}
        if len(owners) == 1:
            group = groups[owners.pop()]
            name = f" ({group.id})" if group.id else ""
            raise AlignError(
                f"out of memory: one row{name} of {failed.num_tokens} tokens alone does not fit; "
                f"lower {ADVICE}"
            )
        fewer = min(self.tokens, failed.num_tokens) // 2
        if self.num_processes > 1:
            raise AlignError(
                f"out of memory in a microbatch of {failed.num_tokens} tokens; set "
                f"tokens_per_microbatch to {fewer} (several processes cannot do a step again)"
            )
        say(
            f"  out of memory in a microbatch of {failed.num_tokens} tokens: the step is done "
            f"again with tokens_per_microbatch={fewer}, which stays for this run"
        )
        self.tokens = fewer


def _first_failing(visits: Sequence[tuple[TokenBatch, Visit]]) -> TokenBatch | None:
    for number, (batch, visit) in enumerate(visits):
        try:
            visit(batch, number == len(visits) - 1)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            # the error's traceback holds the activations: it must be gone before the next try
            error.__traceback__ = None
        else:
            continue
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what is free lies in pieces of the wrong size
        return batch
    return None
