"""Context of a stage: a launcher's ranks, a run folder and the policy's tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

from accelerate import Accelerator

from align.data.tokens.text_ids import Tokenizer
from align.run.folder import Run


@dataclass(frozen=True)
class Session:
    """An open stage: where it runs, where it writes, and its tokenizer."""

    accelerator: Accelerator
    run: Run
    tokenizer: Tokenizer
