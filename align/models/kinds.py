"""Check that a model fits its use: policy, reward, or start of a one-label model.

Its config or its adapter's decides, without weights; ``align check`` and the run share the check.
"""

from __future__ import annotations

from typing import Any, Literal

from align.models.adapters import Adapter
from align.types import AlignError

Use = Literal["policy", "reward", "start"]
"""``start``: starting point of a reward model or critic, with or without a head."""

LANGUAGE = ("ForCausalLM", "LMHeadModel")
CLASSIFIER = "ForSequenceClassification"
OTHERS = ("ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM", "ForRewardModel")
"""Heads of neither a language model nor a one-label model."""
TASKS = ("CAUSAL_LM", "SEQ_CLS")


def require_kind(
    key: str, model: str, config: Any, use: Use, *, adapter: Adapter | None = None
) -> None:
    """Refuse a model whose head does not fit ``use``.

    Args:
        config: Config of the model, or of the adapter's base.
        adapter: The adapter that ``model`` names, if any; its own head decides.
    """
    if adapter is not None:
        _require_adapter(key, adapter, use)
        if adapter.task == "SEQ_CLS":
            return  # its own head replaces the base's
        use, model = "policy", adapter.base  # the base of a language model's adapter is one
    made = _architecture(config)
    if use == "reward" and made.endswith(LANGUAGE):
        raise AlignError(
            f"{key}: {model} is a language model ({made}) without a trained score head; name a "
            "reward model, such as `align rm` makes"
        )
    if use == "policy" and made.endswith(CLASSIFIER):
        raise AlignError(
            f"{key}: {model} is a reward model ({made}), which has no language-model head; name "
            "the model that it was trained from"
        )
    if made.endswith(OTHERS):
        wanted = "a language model" if use == "policy" else "a reward model of one score"
        raise AlignError(f"{key}: {model} is a {made}, which has another head; name {wanted}")
    if made.endswith(CLASSIFIER) and config.num_labels != 1:
        raise AlignError(
            f"{key}: {model} is a classifier of {config.num_labels} labels ({made}); a reward "
            "model or critic has one"
        )


def _architecture(config: Any) -> str:
    """Return the class that saved the weights, or "" if the config does not name it."""
    made = getattr(config, "architectures", None)
    first = made[0] if isinstance(made, list) and made else made
    return first if isinstance(first, str) else ""


def _require_adapter(key: str, adapter: Adapter, use: Use) -> None:
    if adapter.task not in TASKS:
        raise AlignError(
            f"{key}: {adapter.name} is an adapter for {adapter.task[:40]}; align takes those for "
            f"{' and '.join(TASKS)}"
        )
    if use == "policy" and adapter.task == "SEQ_CLS":
        raise AlignError(
            f"{key}: {adapter.name} is the adapter of a reward model (SEQ_CLS), which has no "
            "language-model head; name the model that it was trained from"
        )
    if adapter.task == "SEQ_CLS" and adapter.labels is None:
        raise AlignError(
            f"{key}: {adapter.name} is the adapter of a reward model, but its score head was not "
            'saved with it; train it again with modules_to_save=["score"]'
        )
    if adapter.labels not in (None, 1):
        raise AlignError(
            f"{key}: {adapter.name} has a head of {adapter.labels} labels; a reward model or "
            "critic has one"
        )
    if use != "policy" and adapter.has_value_head:
        raise AlignError(
            f"{key}: {adapter.name} keeps its score head in a value_head file (TRL's v_head), "
            "which is not read; train a reward model of one label, such as `align rm` or TRL's "
            "RewardTrainer makes"
        )
    if use == "reward" and adapter.task == "CAUSAL_LM":
        raise AlignError(
            f"{key}: {adapter.name} is the adapter of a language model (CAUSAL_LM) without a score "
            "head; name a reward model, such as `align rm` makes"
        )
