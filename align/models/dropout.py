"""Switch dropout off, so that training mode gives the same numbers as evaluation mode.

The policy's ratio must be 1 at the first step, and a reward must not depend on the mode: "N+
details" (arXiv:2403.17031), section 3. Rates called dropout are set to 0. Other layers that act in
training mode alone (a router's noise, sampled experts, a rate read from the config) are found by
running the model, and stay in evaluation mode. LoRA's own dropout is separate and kept.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from align.types import AlignError

PINNED = "align_evaluation_only"
"""Attribute of a layer that stays in evaluation mode while the model is trained."""

RATES = re.compile(r"dropout|layer_?drop|p_?drop$|drop_?(prob|rate|path)")
"""Names of dropout rates in transformers' layers, such as ``layerdrop`` and ``resid_pdrop``."""


def switch_off_dropout(model: nn.Module) -> None:
    """Set every dropout rate of every layer to 0, found by names such as ``attention_dropout``.

    Other numbers with "drop" in their name (a threshold, a capacity) may act in evaluation too.
    """
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if RATES.search(name) and isinstance(value, float):
                setattr(module, name, 0.0)


def keep_pinned(model: nn.Module) -> None:
    """Return pinned layers to evaluation mode, but not the layers inside them."""
    for module in model.modules():
        if getattr(module, PINNED, False):
            module.training = False


def require_same_in_training(model: nn.Module, forward: Callable[[], Tensor], *, name: str) -> None:
    """Pin layers until ``forward`` gives the same in training mode, drawn twice, as in evaluation.

    A layer that differs stays in evaluation mode, with all of its class. So does a layer that draws
    random numbers, since a short row need not show their effect.

    Args:
        model: Its training mode is switched; random states are restored.
        forward: One pass over a short row.
        name: The model's name for messages.

    Raises:
        AlignError: A layer differs and cannot be pinned; the message names it.
    """
    device = next(model.parameters()).device

    def run(seed: int | None) -> tuple[Tensor, bool]:
        """Return the output and whether random numbers were drawn."""
        model.train(seed is not None)
        torch.manual_seed(seed or 0)
        before = _random_state(device)
        with torch.no_grad():
            out = forward()
        return out, before != _random_state(device)

    with _lora_dropout_off(model), _random_states_kept(device):
        want, _ = run(None)
        for _ in range(MOST_CLASSES):
            runs = [run(seed) for seed in (1, 2)]
            apart = max((out - want).abs().max() for out, _ in runs)
            # a GPU may sum in another order each time
            noise = 10 * (run(None)[0] - want).abs().max() if apart else apart
            if apart <= noise and not any(drew for _, drew in runs):
                return
            where, layer, call = _first_that_differs(model, run, device)
            _pin(model, where, layer, call, name)
        raise AlignError(f"{name}: over {MOST_CLASSES} kinds of layers act otherwise in training")


MOST_CLASSES = 8
"""Classes of layers to pin at most; a model that needs more is refused."""


def _random_state(device: torch.device) -> tuple[bytes, ...]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    of_numpy: Any = np.random.get_state()
    others = (repr(random.getstate()).encode(), of_numpy[1].tobytes(), repr(of_numpy[2]).encode())
    return (*(state.numpy().tobytes() for state in states), *others)


@contextmanager
def _random_states_kept(device: torch.device) -> Iterator[None]:
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])


class _Call(NamedTuple):
    """One call of a layer: digests of input and output, and the input itself."""

    layer: str
    given: str
    made: str
    drew: bool
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _first_that_differs(
    model: nn.Module, run: Callable[[int | None], Any], device: torch.device
) -> tuple[str, nn.Module | None, _Call | None]:
    """Find the innermost layer that drew a random number, or mapped one input to another output."""
    layers = dict(model.named_modules())
    calm = _calls(model, lambda: run(None), device)
    for drawn in (_calls(model, partial(run, seed), device) for seed in (1, 2)):
        for call in drawn:
            if call.drew:
                return call.layer, layers[call.layer], call
        for before, now in zip(calm, drawn, strict=False):
            if before[:2] == now[:2] and before.made != now.made:
                return now.layer, layers[now.layer], now
    return "", None, None


def _calls(model: nn.Module, run: Callable[[], Any], device: torch.device) -> list[_Call]:
    """Record the calls of all layers in one run, inner ones first."""
    found: list[_Call] = []
    handles = []
    begun: dict[str, list[tuple[str, tuple[bytes, ...]]]] = {}
    for name, module in model.named_modules():

        def before(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            at_first = _digest((args, kwargs)), _random_state(device)
            begun.setdefault(name, []).append(at_first)

        def after(module: nn.Module, args: Any, kwargs: Any, out: Any, name: str = name) -> None:
            given, state = begun[name].pop()
            drew = state != _random_state(device)
            found.append(_Call(name, given, _digest(out), drew, args, kwargs))

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _digest(value: Any) -> str:
    digest = hashlib.sha256()
    for tensor in _tensors(value):
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _pin(
    model: nn.Module, where: str, layer: nn.Module | None, call: _Call | None, name: str
) -> None:
    kind = type(layer).__name__
    if layer is None or call is None or getattr(layer, PINNED, False):
        raise AlignError(
            f"{name}: {type(model).__name__} gives other numbers in training mode than in "
            f"evaluation{f', by {where} ({kind})' if where else ''}, which cannot be switched off, "
            "so align cannot train it"
        )
    for module in model.modules():
        if type(module) is type(layer):
            setattr(module, PINNED, True)
    layer.training = False
    if not _passes_gradients(layer, call):
        raise AlignError(
            f"{name}: {where} ({kind}) acts otherwise in training mode than in evaluation, and in "
            "evaluation mode passes no gradient, so align cannot train it"
        )


def _passes_gradients(layer: nn.Module, call: _Call) -> bool:
    def fresh(value: Any) -> Any:
        if isinstance(value, Tensor):
            # not a leaf: a layer may write into its input
            return value.detach().requires_grad_() * 1 if value.is_floating_point() else value
        if isinstance(value, tuple | list):
            return type(value)(fresh(item) for item in value)
        return value

    kwargs = {key: fresh(value) for key, value in call.kwargs.items()}
    with torch.enable_grad():
        out = layer(*fresh(call.args), **kwargs)
    return any(tensor.requires_grad for tensor in _tensors(out))


@contextmanager
def _lora_dropout_off(model: nn.Module) -> Iterator[None]:
    rates = {m: m.p for n, m in model.named_modules() if "lora_" in n and isinstance(m, _DropoutNd)}
    try:
        for module in rates:
            module.p = 0.0
        yield
    finally:
        for module, rate in rates.items():
            module.p = rate
