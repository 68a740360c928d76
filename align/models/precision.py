"""Choose the precision that suits the hardware; weights, log-probs and losses stay float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch
from torch import nn

from align.types import AlignError


def has_fast_bf16(device: torch.device) -> bool:
    """Tell whether the device has instructions for bf16 matrix products.

    Without them (AVX2-only processors) bf16 products are emulated: measured ten times *slower*
    than fp32 on such a CPU, and three to four times faster on one with AVX-512 BF16.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, name, lambda: False)() for name in checks)
    return False


def resolve_precision(precision: str, device: torch.device) -> Literal["bf16", "fp32"]:
    """Resolve ``auto`` to the device's faster precision; a named precision is kept."""
    if precision == "auto":
        return "bf16" if has_fast_bf16(device) else "fp32"
    if precision not in ("bf16", "fp32"):
        raise AlignError(f"precision: got {precision!r}; allowed are auto, bf16, fp32")
    return precision  # type: ignore[return-value]


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


@contextmanager
def autocast_once(model: nn.Module, precision: str, device: torch.device) -> Iterator[None]:
    """Autocast many passes without gradients: each weight is cast once and cached.

    Sampling runs the model once for every token. The weights must not change meanwhile; the cached
    copies take half their float32 size more, those of frozen weights too. Autocast caches casts
    until the outermost block ends, but only of leaves that require a gradient, so all weights do
    inside.
    """
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    if precision != "bf16":
        frozen = []
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        with torch.no_grad(), autocast(precision, device):
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
