"""Average saved models: a moving average over rounds."""

from __future__ import annotations

from pathlib import Path

import torch

from align.base.folders import whole_folder
from align.models.load import load_causal_lm, load_tokenizer


def average_models(slow: str, fast: str, folder: Path, *, decay: float) -> None:
    """Save ``decay * slow + (1 - decay) * fast``, weight by weight, with fast's tokenizer.

    Both must have the same architecture, such as a policy and an earlier one of the same run.
    """
    tokenizer = load_tokenizer(fast)
    averaged, other = load_causal_lm(slow, tokenizer), load_causal_lm(fast, tokenizer)
    with torch.no_grad():
        for mine, its in zip(averaged.parameters(), other.parameters(), strict=True):
            mine.lerp_(its, 1 - decay)
    averaged.generation_config = other.generation_config
    with whole_folder(folder) as partial:
        averaged.save_pretrained(str(partial))
        tokenizer.save_pretrained(str(partial))
