"""Checks of a loaded model before use: eight tokens, a few forward passes.

Its packed rows must equal the single sequences, these must equal plain transformers, its head must
be a linear map that is at most scaled or capped, and training mode must equal evaluation mode.
Windows, which eight tokens cannot show, are read from transformers' masks. A model that fails is
refused in one line.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from align.models.attention.masks import RECORDED, Record
from align.models.attention.packed import (
    INSTEAD,
    UnpackableError,
    not_on_the_interface,
    own_attention,
)
from align.models.dropout import require_same_in_training
from align.models.policy import Packed, Policy
from align.models.precision import autocast
from align.types import AlignError, Segment, TokenBatch

STATE = (
    "carry a state from token to token, which would run from one sequence of a packed row into the "
    "next"
)


def check_packable(model: Packed) -> None:
    """Refuse a model that cannot be packed, by trying; see the module.

    The trial runs in float32 if the weights are, since rounding to bf16 may hide a difference or
    look like one.

    Raises:
        AlignError: One line that says what is wrong with the architecture or the weights.
    """
    if own_attention(type(model.inner)):
        raise AlignError(f"{model.name}: {not_on_the_interface(type(model.inner).__name__)}")
    training, precision = model.training, model.precision
    exact = all(p.dtype == torch.float32 for p in model.parameters())
    try:
        model.precision = "fp32" if exact else precision
        model.eval()
        with torch.no_grad(), _one_line(model):
            packed, alone = _rows(model)
            want = _recorded(model, alone)[0, 3:]
            got = model.hidden_states(packed)[0, 5:]
            _require_finite(model, got, want)
            require_same_in_training(model, lambda: model.hidden_states(packed), name=model.name)
            model.eval()
            if not _close(got, want, exact):
                raise AlignError(f"{model.name}: {_why_not(model, alone, got, want)}; {INSTEAD}")
            plain, logits = _plain(model, alone)
            what = "gives other numbers than in plain transformers"
            _require_close(model, want, plain[0, 3:], exact, what)
            if logits is not None and isinstance(model, Policy):
                _learn_head(model, plain[0], logits[0], exact)
    finally:
        model.train(training)
        model.precision = precision


def check_architecture(name: str, inner: PreTrainedModel) -> None:
    """Refuse a model without weights (on the meta device) whose architecture cannot be packed.

    A forward pass that depends on values, as in a mixture of experts, is not judged.
    """
    model, kind = Packed(inner, precision="fp32", name=name), type(inner).__name__
    if own_attention(type(inner)):
        raise AlignError(f"{name}: {not_on_the_interface(kind)}")
    if getattr(inner, "_is_stateful", False) and any(
        isinstance(module, torch.nn.Conv1d) for module in inner.modules()
    ):
        raise AlignError(f"{name}: {kind} has layers that {STATE}; {INSTEAD}")
    if "chunked_attention" in (getattr(inner.config.get_text_config(), "layer_types", None) or ()):
        raise AlignError(f"{name}: {kind} cannot be packed: its attention is in chunks; {INSTEAD}")
    model.eval()  # layerdrop would skip layers
    try:
        with torch.no_grad():
            _recorded(model, _rows(model)[1])
    except UnpackableError as error:
        raise AlignError(f"{name}: {kind} cannot be packed: {error}; {INSTEAD}") from error
    except AlignError:
        raise
    except Exception:  # its forward pass depends on values, which the meta device lacks
        return


@contextmanager
def _one_line(model: Packed) -> Iterator[None]:
    try:
        yield
    except (AlignError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError) as error:
        reason = str(error).strip().split("\n")[0]
        raise AlignError(
            f"{model.name}: {type(model.inner).__name__} cannot be packed: {reason}"
            + (f"; {INSTEAD}" if isinstance(error, UnpackableError) else "")
        ) from error


def _rows(model: Packed) -> tuple[TokenBatch, TokenBatch]:
    """Make a packed row (two sequences behind two prefixes), and the second sequence alone."""
    embeddings = model.inner.get_input_embeddings()
    vocabulary = getattr(embeddings, "base_layer", embeddings).num_embeddings  # peft's layer
    tokens = torch.arange(8, device=model.device)[None] % vocabulary
    where = torch.tensor([[0, 1, 2, 3, 4, 3, 4, 5]], device=model.device)
    prefixes = Segment(0, 0, 2), Segment(0, 2, 3, 0, 2)
    packed = _batch(tokens, where, (*prefixes, Segment(0, 3, 5, 2, 3), Segment(0, 5, 8, 2, 3)))
    alone = torch.cat([tokens[:, :3], tokens[:, 5:]], dim=1)
    single = _batch(alone, torch.arange(6, device=model.device)[None], (Segment(0, 0, 6),))
    return packed, single


def _batch(tokens: Tensor, positions: Tensor, segments: Sequence[Segment]) -> TokenBatch:
    zeros = torch.zeros_like(tokens)
    return TokenBatch(tokens, positions, zeros + 1, zeros, zeros.bool(), segments=tuple(segments))


def _recorded(model: Packed, batch: TokenBatch) -> Tensor:
    """Compute hidden states of a row and record each layer's window.

    Raises:
        AlignError: A layer has no attention, or attention that is not on the interface.
    """
    record = Record()
    row: dict[str, Any] = {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "use_cache": False,
    }
    if model.device.type == "meta":  # transformers would read positions to see if they are packed
        row["attention_mask"] = torch.ones_like(batch.input_ids)
    with _attention(model, RECORDED), autocast(model.precision, model.device):
        out = model.backbone(**row, segments=batch.segments, record=record)
    config = model.inner.config.get_text_config()
    layers = getattr(config, "decoder_layers", None) or config.num_hidden_layers
    stateful = getattr(model.inner, "_is_stateful", False)
    if not record.calls or (stateful and record.calls < layers):
        few = f"{record.calls} attention layers" if record.calls else "no attention layer"
        raise AlignError(
            f"{model.name}: {type(model.inner).__name__} has {few} among its {layers}; the others "
            f"{STATE}; {INSTEAD}"
        )
    record.apply()
    return out.last_hidden_state


def _plain(model: Packed, batch: TokenBatch) -> tuple[Tensor, Tensor | None]:
    """Compute hidden states and logits of a row with plain transformers."""
    row = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    taken: list[Tensor] = []
    handle = model.backbone.register_forward_hook(lambda *call: taken.append(call[-1][0]))
    try:
        with _attention(model, "eager"), autocast(model.precision, model.device):
            logits = model.model(**row).logits if isinstance(model, Policy) else None
            if not taken:  # a head that bypasses the backbone's own forward (OPT)
                model.backbone(**row)
    finally:
        handle.remove()
    return taken[0], logits


@contextmanager
def _attention(model: Packed, name: str) -> Iterator[None]:
    config = model.inner.config
    before = config._attn_implementation
    try:
        config._attn_implementation = name
        yield
    finally:
        config._attn_implementation = before


def _learn_head(model: Policy, hidden: Tensor, logits: Tensor, exact: bool) -> None:
    """Find the architecture's factor on its logits, and refuse a head that does more.

    Rounding to bf16 has mean 0, so the factor is known more exactly than a logit.
    """
    cap = model._head()["softcap"]
    raw, true = model.logits(hidden).double(), logits.double()
    if cap is not None:
        inside = (raw.abs() < 0.95 * cap) & (true.abs() < 0.95 * cap)
        raw, true = (torch.atanh(t[inside] / cap) for t in (raw, true))
    scale = ((raw * true).sum() / raw.square().sum()).item()
    tolerance = 1e-5 if exact else 1e-2
    if math.isfinite(scale) and abs(scale - 1) > 10 * tolerance:
        model.logit_scale = _named(model, scale, tolerance)
    got, want = model.logits(hidden), logits
    _require_close(model, got, want, exact, "has a head that does more than a linear map")


def _named(model: Policy, scale: float, tolerance: float) -> float:
    """Return the number of the config (or its inverse) that equals the scale, else the scale."""
    named = [
        given
        for value in vars(model.inner.config.get_text_config()).values()
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0
        for given in (float(value), 1 / value)
    ]
    nearest = min(named, key=lambda given: abs(given / scale - 1))
    return nearest if abs(nearest / scale - 1) < tolerance else scale


def _why_not(model: Packed, alone: TokenBatch, got: Tensor, want: Tensor) -> str:
    """Explain why packed rows differ from the single sequences."""
    kind = type(model.inner).__name__
    moved = replace(alone, position_ids=alone.position_ids * 2)
    if torch.equal(model.hidden_states(moved), model.hidden_states(alone)):
        return f"{kind} counts positions along the row and takes no position_ids"
    return (
        f"{kind} gives other numbers when packed (by {(got - want).abs().max():.3g}): something "
        "besides its attention runs from one token to the next"
    )


def _close(got: Tensor, want: Tensor, exact: bool) -> bool:
    tolerance = 1e-3 if exact else 0.1
    got, want = got.float(), want.float()
    scale = want.abs().max().item()
    return torch.allclose(got, want, rtol=tolerance, atol=tolerance * scale)


def _require_close(model: Packed, got: Tensor, want: Tensor, exact: bool, what: str) -> None:
    if not _close(got, want, exact):
        raise AlignError(
            f"{model.name}: {type(model.inner).__name__} {what} "
            f"(by {(got.float() - want.float()).abs().max():.3g}), so align cannot train it"
        )


def _require_finite(model: Packed, *values: Tensor) -> None:
    if not all(v.isfinite().all() for v in values):
        raise AlignError(
            f"{model.name}: its numbers become NaN or infinite; its weights are broken, or "
            "overflow in this precision: try precision=fp32"
        )
