"""Saved activations through `kept_on_cpu`, on a CPU, where a copy is as real as on a GPU.

What a GPU adds, streams and page-locked memory, is left out: none is at hand.
"""

from __future__ import annotations

import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from align.config.sections import LoraOptions
from align.data.tokens.packing import collate
from align.models import Policy, load_policy, load_scalar_model, offload
from align.models.offload import kept_on_cpu
from align.types import TokenBatch, TokenGroup, TokenSequence

CPU = torch.device("cpu")


@pytest.fixture
def batch() -> TokenBatch:
    def answer(*ids: int) -> TokenSequence:
        return TokenSequence(np.array(ids, np.int32), np.ones(len(ids), dtype=bool))

    first = TokenGroup(np.array([1, 20, 30], np.int32), (answer(40, 41, 2), answer(50, 2)))
    return collate([first, TokenGroup(np.array([1, 60], np.int32), (answer(7, 8, 9, 2),))])


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every tensor is large enough; the copies that were made, in order."""
    monkeypatch.setattr(offload, "LEAST_BYTES", 1)
    made: list[Tensor] = []

    def watched(*args: object, **options: object) -> saved_tensors_hooks:
        hooks = kept_on_cpu(*args, **options)  # type: ignore[arg-type]
        pack = hooks.pack_hook

        def watching(tensor: Tensor) -> object:
            packed = pack(tensor)
            if isinstance(packed, tuple):
                made.append(packed[0])
            return packed

        return saved_tensors_hooks(watching, hooks.unpack_hook)

    monkeypatch.setattr("align.models.policy.kept_on_cpu", watched)
    return made


def gradients(policy: Policy, batch: TokenBatch) -> dict[str, Tensor]:
    policy.train().zero_grad(set_to_none=True)
    policy(batch).logprobs.sum().backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [None, LoraOptions(r=4)])
def test_gradients_are_the_same_to_the_bit(
    tiny: Path,
    batch: TokenBatch,
    copied: list[Tensor],
    precision: str,
    checkpointing: bool,
    lora: LoraOptions | None,
) -> None:
    torch.manual_seed(0)
    policy = load_policy(
        str(tiny), device=CPU, precision=precision, lora=lora, gradient_checkpointing=checkpointing
    )
    want = gradients(policy, batch)
    assert want
    assert not copied
    policy.activation_offload = True
    got = gradients(policy, batch)
    assert copied
    assert want.keys() == got.keys()
    for name in want:
        assert torch.equal(want[name], got[name]), name


def test_what_is_copied_is_let_go(tiny: Path, batch: TokenBatch, copied: list[Tensor]) -> None:
    """The activations themselves are gone after the forward pass: their copies stand for them."""
    policy = load_policy(str(tiny), device=CPU, precision="fp32")
    inner: list[weakref.ref[Tensor]] = []
    policy.backbone.layers[0].mlp.down_proj.register_forward_hook(
        lambda module, args, out: inner.append(weakref.ref(args[0]))
    )
    out = policy.train()(batch)
    assert inner[0]() is not None  # held by the graph
    policy.activation_offload = True
    out = policy(batch)
    assert inner[1]() is None
    assert out.logprobs.requires_grad


def test_with_checkpointing_only_what_enters_a_layer_is_copied(
    tiny: Path, batch: TokenBatch, copied: list[Tensor]
) -> None:
    policy = load_policy(str(tiny), device=CPU, precision="fp32", gradient_checkpointing=True)
    policy.activation_offload = True
    policy.train()(batch)
    width = policy.inner.config.hidden_size
    layers = policy.inner.config.num_hidden_layers
    entering = (*batch.input_ids.shape, width)
    assert sum(tuple(t.shape) == entering for t in copied) >= layers
    mlp = policy.inner.config.intermediate_size
    assert not any(t.shape[-1:] == (mlp,) for t in copied)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_weight_is_copied(
    tiny: Path, batch: TokenBatch, copied: list[Tensor], precision: str
) -> None:
    policy = load_policy(str(tiny), device=CPU, precision=precision)
    policy.activation_offload = True
    policy.train()(batch)
    shapes = {tuple(p.shape) for p in policy.parameters() if p.ndim == 2}
    shapes |= {shape[::-1] for shape in shapes}
    assert copied
    assert not shapes & {tuple(t.shape) for t in copied}


def test_small_and_expanded_tensors_stay() -> None:
    module, x = torch.nn.Linear(1, 1), torch.ones(2**19, requires_grad=True)
    hooks = kept_on_cpu(module)
    assert isinstance(hooks.pack_hook(torch.ones(2**18)), tuple)  # 1 MiB of float32
    assert isinstance(hooks.pack_hook(torch.ones(2**18 - 1)), Tensor)
    assert isinstance(hooks.pack_hook(torch.ones(1).expand(2**19)), Tensor)
    with hooks:
        y = (x * 3).square()
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full_like(x, 18.0))


def test_memory_that_runs_out_leaves_no_hook_behind(
    tiny: Path, batch: TokenBatch, copied: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is done again in smaller microbatches; nothing of the first try is in it."""
    policy = load_policy(str(tiny), device=CPU, precision="fp32")
    want = gradients(policy, batch)
    policy.activation_offload = True
    layer = policy.backbone.layers[1]
    forward = layer.forward

    def runs_out(*args: object, **options: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(layer, "forward", runs_out)
    with pytest.raises(torch.OutOfMemoryError):
        policy(batch)
    monkeypatch.setattr(layer, "forward", forward)
    before = len(copied)
    (torch.ones(2**19, requires_grad=True) ** 2).sum()
    assert len(copied) == before
    got = gradients(policy, batch)
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_scalar_models_too_and_nothing_without_a_gradient(
    tiny: Path, batch: TokenBatch, copied: list[Tensor]
) -> None:
    scalar = load_scalar_model(str(tiny), device=CPU, precision="fp32")
    scalar.activation_offload = True
    with torch.no_grad():
        scalar(batch, at="last")
    assert not copied
    scalar(batch, at="last").sum().backward()
    assert copied
