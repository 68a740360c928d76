"""The appended layer hands on the mean of a sequence, and the model stays one of its kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from align.models import load_scalar_model
from align.models.pooling import GAIN, add_pooling_layer
from align.types import AlignError

CPU = torch.device("cpu")


@pytest.mark.parametrize(("name", "width"), [("llama", 16), ("qwen3", 16), ("phi3", 0)])
def test_the_layer_adds_the_mean(
    name: str, width: int, architecture: Callable[[str], Path]
) -> None:
    path = str(architecture(name))
    scalar = load_scalar_model(path, device=CPU, precision="fp32")
    if not width:  # one projection for queries, keys and values
        with pytest.raises(AlignError, match=r"reward_model\.pooling_layer"):
            add_pooling_layer(scalar.inner, name=path)
        return
    ids = torch.arange(5, 14)[None]
    seen: list[torch.Tensor] = []
    backbone = scalar.inner.model
    backbone.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    scalar.inner.set_attn_implementation("eager")
    with torch.no_grad():
        scalar.inner(input_ids=ids)
        add_pooling_layer(scalar.inner, name=path)
        scalar.inner(input_ids=ids)
    before, after = seen
    layer = backbone.layers[-1]
    states = layer.input_layernorm(before)
    means = states.cumsum(1) / torch.arange(1, 10)[None, :, None]
    # four heads share two of values: what comes out is the mean's projection onto 2 x 8 dimensions
    rows = layer.self_attn.v_proj.weight
    assert rows.shape == (width, 32)
    torch.testing.assert_close(rows @ rows.T, torch.eye(width), atol=1e-5, rtol=0)
    want = before + GAIN * means @ rows.T @ rows
    torch.testing.assert_close(after, want, atol=1e-4, rtol=1e-4)
    assert scalar.inner.config.num_hidden_layers == 3


def test_a_saved_model_loads_in_transformers(
    architecture: Callable[[str], Path], tmp_path: Path
) -> None:
    scalar = load_scalar_model(str(architecture("qwen3")), device=CPU, precision="fp32")
    add_pooling_layer(scalar.inner, name="qwen3")
    scalar.inner.set_attn_implementation("eager")
    scalar.inner.save_pretrained(tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, attn_implementation="eager"
    )
    ids = torch.arange(5, 14)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            plain.eval()(input_ids=ids).logits, scalar.inner.eval()(input_ids=ids).logits
        )


def test_every_new_part_is_trained(architecture: Callable[[str], Path]) -> None:
    scalar = load_scalar_model(str(architecture("llama")), device=CPU, precision="fp32")
    add_pooling_layer(scalar.inner, name="llama")
    scalar.inner.set_attn_implementation("eager")
    scalar.inner(input_ids=torch.arange(5, 14)[None]).logits.sum().backward()
    attention = scalar.inner.model.layers[-1].self_attn
    for part in (attention.q_proj, attention.v_proj, attention.o_proj):
        assert part.weight.grad.abs().sum() > 0
