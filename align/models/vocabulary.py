"""Make a model's vocabulary larger or smaller, each time with the same numbers."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


def resize(model: PreTrainedModel, num_tokens: int) -> None:
    """Give tokens that the checkpoint lacks the mean of its embeddings.

    Random rows would differ between policy and reference, and take nearly all probability from a
    model whose logits all lie far below 0, as GPT-2's do (Hewitt 2021).
    """
    old = len(model.get_input_embeddings().weight)
    model.resize_token_embeddings(num_tokens, mean_resizing=False)
    if num_tokens <= old:
        return
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            for rows in layer.parameters() if layer is not None else ():
                rows[old:] = rows[:old].mean(0)
