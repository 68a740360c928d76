"""Load policies, references, reward models and critics, and run them over packed rows."""

from __future__ import annotations

from pathlib import Path

import torch

from align.config.sections import LoraOptions
from align.models.adapters import find_adapter
from align.models.attention.choose import settle_backend
from align.models.kinds import require_kind
from align.models.load import classifier_on, load_causal_lm, load_classifier, load_tokenizer
from align.models.lora import add_lora, load_adapter, on_same_weights
from align.models.policy import Policy, ScalarModel
from align.models.precision import resolve_precision
from align.types import AlignError

__all__ = [
    "Policy", "ScalarModel", "load_policy", "load_scalar_model", "load_tokenizer",
    "scalar_model_on",
]  # fmt: skip


def load_policy(
    model: str,
    *,
    device: torch.device,
    precision: str = "auto",
    attention: str = "auto",
    lora: LoraOptions | None = None,
    gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
    base_model: str | None = None,
    from_scratch: bool = False,
    frozen: bool = False,
) -> Policy:
    """Load a language model on ``device`` and check that its sequences can be packed.

    Args:
        model: Folder, hub id or GGUF file.
        lora: Adapter to train; None trains every weight.
        base_model: Base that replaces the one an adapter names.
        frozen: The model is never trained, so a GPU may hold it in bf16.
    """
    precision = resolve_precision(precision, device)
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code, base_model=base_model)
    loaded = load_causal_lm(
        model,
        tokenizer,
        dtype=_dtype(precision, device, trained_whole=lora is None and not frozen),
        trust_remote_code=trust_remote_code,
        base_model=base_model,
        from_scratch=from_scratch,
    )
    if lora is not None:
        loaded = add_lora(loaded, task="causal_lm", options=lora)
    policy = Policy(loaded.to(device), precision=precision, name=model)
    if gradient_checkpointing:
        policy.enable_gradient_checkpointing()
    if frozen:
        policy.requires_grad_(False).eval()
    settle_backend(policy, attention)
    return policy


def load_scalar_model(
    model: str,
    *,
    device: torch.device,
    precision: str = "auto",
    attention: str = "auto",
    lora: LoraOptions | None = None,
    gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
    base_model: str | None = None,
    head_required: bool = False,
) -> ScalarModel:
    """Load a one-label model on ``device``; a checkpoint without a head gets a new one.

    Raises:
        AlignError: ``head_required`` and the checkpoint has no ``score`` head: it was never
            trained as a reward model, so its scores would be noise.
    """
    precision = resolve_precision(precision, device)
    adapter = find_adapter(model, base_model=base_model, fetch=True)
    if adapter is not None and head_required:
        require_kind("reward model", model, None, "reward", adapter=adapter)
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code, base_model=base_model)
    loaded, fresh = load_classifier(
        model,
        tokenizer,
        dtype=_dtype(precision, device, trained_whole=lora is None and not head_required),
        trust_remote_code=trust_remote_code,
        base_model=base_model,
    )
    if fresh and head_required:
        raise AlignError(f"reward model {model}: no `score` head; train one with `align rm`")
    if lora is not None:
        loaded = add_lora(loaded, task="classifier", options=lora)
    scalar = ScalarModel(loaded.to(device), precision=precision, name=model)
    scalar.fresh_head = fresh
    if gradient_checkpointing:
        scalar.enable_gradient_checkpointing()
    settle_backend(scalar, attention)
    return scalar


def scalar_model_on(
    base: Policy | ScalarModel,
    *,
    name: str,
    lora: LoraOptions | None = None,
    adapter: Path | None = None,
    gradient_checkpointing: bool = False,
    frozen: bool = False,
) -> ScalarModel | None:
    """Build a one-label model on the weights of ``base``, frozen and shared, not copied.

    Give exactly one of ``lora`` (a new adapter) and ``adapter`` (a saved one, with its head). A
    `ScalarModel` lends its head; a `Policy` has none, so the new model gets a fresh one.

    Returns:
        None if transformers has no one-label model with this backbone.
    """
    plain = on_same_weights(base.model)
    fresh = isinstance(base, Policy)
    model = classifier_on(plain) if fresh else plain
    if model is None:
        return None
    if adapter is not None:
        model, fresh = load_adapter(model, adapter, trained=not frozen), False
    elif lora is not None:
        model = add_lora(model, task="classifier", options=lora)
    scalar = ScalarModel(model, precision=base.precision, name=name)
    scalar.fresh_head = fresh
    if gradient_checkpointing:
        scalar.enable_gradient_checkpointing()
    if frozen:
        scalar.requires_grad_(False).eval()
    return scalar


def _dtype(precision: str, device: torch.device, *, trained_whole: bool) -> torch.dtype:
    """Return the dtype of the weights: float32 if trained, bf16 if frozen on a GPU.

    On a CPU, bf16 weights are slower than bf16 autocast over float32 weights.
    """
    frozen_bf16 = precision == "bf16" and device.type == "cuda" and not trained_whole
    return torch.bfloat16 if frozen_bf16 else torch.float32
