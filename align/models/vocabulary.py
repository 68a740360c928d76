"""Resize a model's vocabulary deterministically."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


def resize(model: PreTrainedModel, num_tokens: int) -> None:
    """Resize the embeddings; new tokens get the mean of the old ones.

    Random rows would differ between policy and reference, and take nearly all probability from a
    model whose logits are all far below 0, such as GPT-2 (Hewitt 2021).
    """
    old = len(model.get_input_embeddings().weight)
    model.resize_token_embeddings(num_tokens, mean_resizing=False)
    if num_tokens <= old:
        return
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            for rows in layer.parameters() if layer is not None else ():
                rows[old:] = rows[:old].mean(0)
