"""Which attention backend a model gets: the one asked for, or the best that proves right."""

from __future__ import annotations

from typing import Any

import torch

from align.models.policy import Packed, check_packable
from align.progress import say
from align.types import AlignError

CHOICES = ("auto", "segments", "flash", "flex")
LARGEST_HEAD = 256
"""Of the flash kernel; a multiple of 8."""


def settle_backend(model: Packed, wanted: str) -> None:
    """Give ``model`` the backend ``wanted``, having tried that it packs it rightly.

    With ``auto`` a kernel that fails on this machine, or gives other numbers, is passed over with a
    line that says so.

    Raises:
        AlignError: The backend that was asked for cannot run here, or the model cannot be packed.
    """
    names = candidates(wanted, model.inner.config, device=model.device, precision=model.precision)
    for name in names[:-1]:
        model.attention = name
        try:
            check_packable(model)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of a kernel or a compiler that is not ours
            reason = str(error).strip().split("\n")[0]
            say(f"  attention: {name} does not work here, trying {names[-1]}: {reason}")
        else:
            return
    model.attention = names[-1]
    check_packable(model)


def candidates(
    wanted: str, config: Any, *, device: torch.device, precision: str
) -> tuple[str, ...]:
    """Backends to try, best first. Each is used only once it has proved right on the very model.

    ``segments`` runs everywhere, and is all that there is on a CPU and in float32. Where scores are
    capped ``flex`` comes before it, which does not hold them, otherwise ``flash``.
    """
    if wanted not in CHOICES:
        raise AlignError(f"attention: got {wanted!r}; allowed are {', '.join(CHOICES)}")
    on_gpu = device.type == "cuda"
    unfit_for_flash = _unfit_for_flash(config, precision) if on_gpu else None
    if wanted in ("flash", "flex"):
        problem = unfit_for_flash if wanted == "flash" else None
        if not on_gpu:
            problem = f"needs a CUDA GPU, and the model is on {device.type}"
        if problem:
            raise AlignError(f"attention: {wanted} {problem}; auto finds what works")
        return (wanted,)
    if wanted == "segments" or not on_gpu or precision != "bf16":
        return ("segments",)
    if unfit_for_flash is None:
        return ("flash", "segments")
    return ("flex", "segments") if _caps_scores(config) else ("segments",)


def _unfit_for_flash(config: Any, precision: str) -> str | None:
    """What the flash kernel lacks for such a model."""
    if precision != "bf16":
        return f"needs precision=bf16, not {precision}"
    if _caps_scores(config):
        return "cannot cap scores, as this model does"
    text = config.get_text_config()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if size > LARGEST_HEAD or size % 8:
        return f"takes heads of 8, 16, ... {LARGEST_HEAD}, not of {size}"
    return None


def _caps_scores(config: Any) -> bool:
    return getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
