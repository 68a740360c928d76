"""Add a decoder layer that starts as the mean over a sequence, for small reward models.

A score is read at a sequence's last token, whose state a language model never had to fill: nothing
is predicted from the end token. A small backbone is slow to learn to gather there what it knows
about every token. One more layer of its own kind, with uniform attention at first, passes the mean
of all states to the last token from the start.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from align.types import AlignError

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
GAIN = 16.0
"""Factor on the mean, which is added to the last token's own state and should outweigh it."""


def add_pooling_layer(model: PreTrainedModel, *, name: str) -> None:
    """Append a copy of the last full-attention layer that adds the mean of the states so far.

    Queries are 0, so attention to all earlier tokens of the sequence is uniform. Values and output
    are transposes of each other with orthonormal rows, so the layer gives `GAIN` times the mean of
    the normalised states (its projection, if values have fewer dimensions than the model). The MLP
    adds nothing. All of it is trained from there. The saved model has one layer more and loads like
    any other of its architecture.

    Raises:
        AlignError: The architecture's layers cannot be copied in this form.
    """
    config: Any = model.config.get_text_config()
    layers: Any = getattr(getattr(model, model.base_model_prefix), "layers", None)
    kinds = list(getattr(config, "layer_types", None) or [])
    full = [n for n, kind in enumerate(kinds) if kind == "full_attention"] if kinds else [-1]
    layer: Any = None
    if isinstance(layers, nn.ModuleList) and len(layers) and full:
        # the copied layer must share the model's configuration, not copy it
        shared = {id(one): one for one in (config, model.config)}
        layer = copy.deepcopy(layers[full[-1]], shared)
    attention: Any = getattr(layer, "self_attn", None)
    down: Any = getattr(getattr(layer, "mlp", None), "down_proj", None)
    parts: list[Any] = [getattr(attention, part, None) for part in PROJECTIONS]
    if not all(isinstance(part, nn.Linear) for part in (*parts, down)):
        raise AlignError(
            f"reward_model.pooling_layer: {name}: layers of {type(model).__name__} have no "
            f"self_attn with {', '.join(PROJECTIONS)} and mlp.down_proj to copy; leave it out"
        )
    attention.layer_idx = len(layers)
    q, _, v, o = parts
    _start_as_mean(q, v, o, down, head_dim=attention.head_dim)
    layers.append(layer)
    config.num_hidden_layers += 1
    if kinds:
        config.layer_types = [*kinds, "full_attention"]


@torch.no_grad()
def _start_as_mean(
    q: nn.Linear, v: nn.Linear, o: nn.Linear, down: nn.Linear, *, head_dim: int
) -> None:
    for part in (q, v, o, down):
        if part.bias is not None:
            part.bias.zero_()
    q.weight.zero_()
    down.weight.zero_()
    drawn = torch.empty(v.weight.shape, dtype=torch.float32)
    nn.init.orthogonal_(drawn)
    v.weight.copy_(drawn)
    # average the query heads that share a value head
    shared = o.in_features // v.out_features
    by_head = GAIN * drawn.T.reshape(o.out_features, -1, 1, head_dim) / shared
    o.weight.copy_(by_head.expand(-1, -1, shared, -1).reshape(o.weight.shape))
