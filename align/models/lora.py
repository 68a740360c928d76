"""Low-rank adapters by peft: put on, switched off for a reference, merged for saving."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from align.options import LoraOptions
from align.types import AlignError


def add_lora(
    model: PreTrainedModel,
    *,
    task: Literal["causal_lm", "classifier"],
    options: LoraOptions,
) -> PeftModel:
    """Freeze the trunk and train adapters; a classifier's head is trained and saved whole.

    Source: Hu et al. 2021 (arXiv:2106.09685). A reward head that is not in ``modules_to_save``
    stays at its random initialisation and is lost on saving, which is a known mistake.
    """
    layers = None
    if options.top_layers is not None:
        count = model.config.get_text_config().num_hidden_layers
        if not 0 < options.top_layers <= count:
            raise AlignError(
                f"lora.top_layers: got {options.top_layers}; the model has {count} layers"
            )
        layers = list(range(count - options.top_layers, count))
    every = options.target_modules == ("all-linear",)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM if task == "causal_lm" else TaskType.SEQ_CLS,
        r=options.r,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=_linear_names(model, layers) if every else list(options.target_modules),
        layers_to_transform=layers,
        modules_to_save=["score"] if task == "classifier" else None,
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft's, about transformers 6
            return get_peft_model(model, config)
    except ValueError as error:
        raise AlignError(f"lora.target_modules: {str(error).splitlines()[0]}") from error


def _linear_names(model: PreTrainedModel, layers: list[int] | None) -> str | list[str]:
    """``all-linear``, spelt out where peft wants names because only some layers are adapted."""
    if layers is None:
        return "all-linear"
    trunk = getattr(model, model.base_model_prefix)
    linear = (torch.nn.Linear, Conv1D)
    return sorted({n.rpartition(".")[2] for n, m in trunk.named_modules() if isinstance(m, linear)})


def unwrapped(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model under a peft wrapper (its adapted layers stay in place)."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextmanager
def adapter_off(model: torch.nn.Module) -> Iterator[None]:
    """The frozen trunk alone: the reference of a policy that is trained with LoRA."""
    if not isinstance(model, PeftModel):
        raise AlignError("reference: adapter_off needs lora; use online or cached")
    with model.disable_adapter():
        yield
