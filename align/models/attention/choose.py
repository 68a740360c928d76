"""Choose a model's attention backend: the one asked for, or the fastest that proves correct."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from align.base.progress import say
from align.models.attention import flash
from align.models.attention.packed import BACKENDS, segment_attention
from align.models.policy import Packed
from align.models.probes import check_packable
from align.types import AlignError, Segment

CHOICES = ("auto", *BACKENDS)
LARGEST_HEAD = 256
"""Largest head of the flash kernel; a multiple of 8."""
WORSE = 3.0
"""Largest error of a kernel, as a multiple of the error of ``segments`` in bf16."""
TRIAL = (
    Segment(0, 0, 150),
    Segment(0, 150, 170, 0, 150),
    Segment(0, 170, 320, 150, 170),
    Segment(0, 320, 420, 150, 170),
)
"""Trial row: a shared opening, a prompt, two answers; longer than the blocks of any kernel."""


def settle_backend(model: Packed, wanted: str) -> None:
    """Set ``model``'s backend after trying that it computes the same as ``segments``.

    With ``auto``, a kernel that fails on this machine or gives other numbers is skipped, and a line
    says so.

    Raises:
        AlignError: The backend asked for cannot run here, or the model cannot be packed.
    """
    model.attention = "segments"
    check_packable(model)
    config = model.inner.config
    names = candidates(wanted, config, device=model.device, precision=model.precision)
    for name in names:
        if name == "segments":
            return
        try:
            prove(name, config, model.device)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # kernels and compilers raise anything
            reason = str(error).strip().split("\n")[0]
            if len(names) == 1:
                raise AlignError(f"attention: {name} does not work here: {reason}") from error
            say(f"  attention: {name} does not work here, taking {names[-1]}: {reason}")
        else:
            model.attention = name
            return


def prove(backend: str, config: Any, device: torch.device) -> None:
    """Try a kernel on random heads of the model's shape, forward and backward, under autocast.

    Errors are taken against ``segments`` in float32; the kernel's may be up to `WORSE` times that
    of ``segments`` in bf16.

    Raises:
        ValueError: An error is larger. Errors raised by the kernel pass through.
    """
    text = config.get_text_config()
    heads, shared, size = head_shape(config)
    # the model's own window is longer than the trial row
    for window in (None, 100) if getattr(text, "sliding_window", None) else (None,):
        options = {"sliding_window": window, "softcap": _softcap(config)}
        shapes = [(1, n, TRIAL[-1].stop, size) for n in (heads, shared, shared, heads)]
        generator = torch.Generator().manual_seed(0)
        drawn = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
        *inputs, upstream = (t.to(device) for t in drawn)
        upstream = upstream.transpose(1, 2)
        want = _attended([t.float() for t in inputs], upstream.float(), "segments", **options)
        # rotary embeddings give float32 queries and keys
        mixed = [inputs[0].float(), inputs[1].float(), inputs[2]]
        with torch.autocast(device.type, dtype=torch.bfloat16):
            base = _attended(mixed, upstream, "segments", **options)
            got = _attended(mixed, upstream, backend, **options)
        names = ("output", "gradient of queries", "gradient of keys", "gradient of values")
        for what, mine, usual, true in zip(names, got, base, want, strict=True):
            error, allowed = (mine - true).norm().item(), WORSE * (usual - true).norm().item()
            if not error <= allowed:
                raise ValueError(f"its {what} is wrong by {error:.3g}, more than {allowed:.3g}")


def _attended(inputs: list[Tensor], upstream: Tensor, backend: str, **options: Any) -> list[Tensor]:
    """Compute output and gradients of queries, keys and values, float32."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    query, key, value = leaves
    options |= {"segments": TRIAL, "backend": backend}
    out, _ = segment_attention(nn.Module(), query, key, value, None, **options)
    grads = torch.autograd.grad(out, leaves, upstream.to(out.dtype))
    return [t.detach().float() for t in (out, *grads)]


def require_gpu(wanted: str, device: torch.device) -> None:
    """Refuse a GPU kernel on another device."""
    if wanted in ("flash", "flex") and device.type != "cuda":
        raise AlignError(
            f"attention: {wanted} needs a CUDA GPU, and the model is on {device.type}; auto finds "
            "what works"
        )


def candidates(
    wanted: str, config: Any, *, device: torch.device, precision: str
) -> tuple[str, ...]:
    """List the backends to try, best first; each is used only after it proves correct.

    ``segments`` runs everywhere, and is the only one on a CPU and in float32. ``flex`` comes before
    it for capped scores, since it does not store them, and ``flash`` otherwise.
    """
    if wanted not in CHOICES:
        raise AlignError(f"attention: got {wanted!r}; allowed are {', '.join(CHOICES)}")
    on_gpu = device.type == "cuda"
    unfit_for_flash = _unfit_for_flash(config, precision) if on_gpu else None
    require_gpu(wanted, device)
    if wanted == "flex" and _latent(config):
        raise AlignError(f"attention: flex {_latent(config)}; auto finds what works")
    if wanted == "flash" and unfit_for_flash:
        raise AlignError(f"attention: flash {unfit_for_flash}; auto finds what works")
    if wanted in ("flash", "flex"):
        return (wanted,)
    if wanted == "segments" or not on_gpu or precision != "bf16":
        return ("segments",)
    if unfit_for_flash is None:
        return ("flash", "segments")
    for_flex = _softcap(config) is not None and not _latent(config)
    return ("flex", "segments") if for_flex else ("segments",)


def _unfit_for_flash(config: Any, precision: str) -> str | None:
    """Say why the flash kernel cannot serve such a model; None if it can."""
    if precision != "bf16":
        return f"needs precision=bf16, not {precision}"
    if _latent(config):
        return _latent(config)
    if _softcap(config) is not None:
        return "cannot cap scores, as this model does"
    try:
        known = set(signature(flash.kernel()).parameters)
    except ImportError:
        known = set()
    if not known >= flash.OPTIONS:
        return "needs a newer torch (2.13 has its kernel), or set attention=flex"
    *_, size = head_shape(config)
    if size > LARGEST_HEAD or size % 8:
        return f"takes heads of 8, 16, ... {LARGEST_HEAD}, not of {size}"
    return None


def head_shape(config: Any) -> tuple[int, int, int]:
    """Return (query heads, key and value heads, head size)."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return heads, getattr(text, "num_key_value_heads", None) or heads, size


def _latent(config: Any) -> str | None:
    """Say why only ``segments`` serves multi-head latent attention (DeepSeek)."""
    values = getattr(config.get_text_config(), "v_head_dim", None)
    return "is not proved on heads whose values have another size than keys" if values else None


def _softcap(config: Any) -> float | None:
    return getattr(config.get_text_config(), "attn_logit_softcapping", None)
