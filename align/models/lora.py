"""Low-rank adapters by peft: put on, switched off for a reference, merged for saving.

Several models may stand on the same frozen weights, each with an adapter of its own: every one is a
module tree of its own over the same tensors, so no adapter is ever switched, and nothing here
writes into a frozen tensor.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from align.base.folders import whole_folder
from align.config.options import LoraOptions
from align.models.adapters import WEIGHTS
from align.models.guard import loading, reason_of
from align.types import AlignError

LINEAR = (torch.nn.Linear, Conv1D)
LM_HEADS = ("lm_head", "embed_out")
"""What the actor has and the critic, which is adapted by the same recipe, has not."""


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
    require_rank(options, model.config)
    layers = None
    if options.top_layers is not None:
        count = model.config.get_text_config().num_hidden_layers
        if not 0 < options.top_layers <= count:
            raise AlignError(
                f"lora.top_layers: got {options.top_layers}; the model has {count} layers"
            )
        layers = list(range(count - options.top_layers, count))
    targets: str | list[str] = list(options.target_modules)
    passed_over = LM_HEADS if task == "classifier" else ()
    if options.target_modules != ("all-linear",):
        _check_names(model, options.target_modules, but=passed_over)
    else:  # peft wants names where only some layers are adapted
        targets = "all-linear" if layers is None else _linear_names(model)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM if task == "causal_lm" else TaskType.SEQ_CLS,
        r=options.r,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=targets,
        layers_to_transform=layers,
        modules_to_save=["score"] if task == "classifier" else None,
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft's, about transformers 6
            adapted = get_peft_model(model, config)
    except (ValueError, TypeError, AttributeError, KeyError) as error:  # of layers of other kinds
        raise AlignError(f"lora.target_modules: {reason_of(error)}") from error
    _check_adapted(adapted, options, but=passed_over)
    # merging would change the embeddings with the head, or the head with them
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = [getattr(getattr(end, "base_layer", end), "weight", None) for end in ends]
    if weights[0] is weights[1] and any(isinstance(end, BaseTunerLayer) for end in ends):
        raise AlignError(
            "lora.target_modules: this model's output embeddings are its input embeddings, which "
            "one adapter cannot serve; leave them out"
        )
    return adapted


def require_rank(options: LoraOptions, config: PretrainedConfig) -> None:
    """Refuse a rank above the model's width: such an adapter is larger than what it adapts."""
    width = getattr(config.get_text_config(), "hidden_size", None)
    if width is not None and options.r > width:
        raise AlignError(
            f"lora.r: got {options.r}, above the model's width of {width}; use {width} at most, "
            "such as 16"
        )


def _check_adapted(model: PeftModel, options: LoraOptions, *, but: Sequence[str]) -> None:
    """Refuse a name that was passed over, and a rank above the width of every adapted layer, with
    which the update would be a full one at a higher price."""
    layers = {name: module for name, module in model.named_modules() if _is_adapted(module)}
    for name in () if options.target_modules == ("all-linear",) else options.target_modules:
        if name not in but and not any(layer.endswith(f".{name}") for layer in layers):
            why = (
                "it is in none of lora.top_layers" if options.top_layers else "it is trained whole"
            )
            raise AlignError(
                f"lora.target_modules: {name!r} gets no adapter, for {why}; leave it out"
            )
    width = max((min(m.get_base_layer().weight.shape) for m in layers.values()), default=0)
    if options.r > width:
        raise AlignError(
            f"lora.r: is {options.r}, but no adapted layer is wider than {width}; use at most "
            f"{width}, or train the whole model (lora=null)"
        )


def _check_names(model: PreTrainedModel, names: Sequence[str], *, but: Sequence[str]) -> None:
    """Refuse a name that no module has: peft would adapt the others without a word."""
    there = ", ".join(_linear_names(model))
    for name in names:
        found = [m for n, m in model.named_modules() if f".{n}".endswith(f".{name}")]
        if name not in but and not found:
            raise AlignError(
                f"lora.target_modules: no module is called {name!r}; this model has {there}; "
                "name some of them, or all-linear alone"
            )
        wrong = [m for m in found if not isinstance(m, (*LINEAR, torch.nn.Embedding))]
        if wrong:
            raise AlignError(
                f"lora.target_modules: {name!r} is a {type(wrong[0]).__name__}, which is neither a "
                f"linear layer nor embeddings; this model has {there}"
            )
    if names and all(name in but for name in names):
        raise AlignError(
            f"lora.target_modules: {', '.join(names)} alone: a model of one score has no "
            f"language-model head; name some of {there} too"
        )


def _linear_names(model: PreTrainedModel) -> list[str]:
    """What ``all-linear`` adapts."""
    trunk = getattr(model, model.base_model_prefix)
    return sorted({n.rpartition(".")[2] for n, m in trunk.named_modules() if isinstance(m, LINEAR)})


def unwrapped(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model under a peft wrapper (its adapted layers stay in place)."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


RECORD = "trunk.json"
"""Beside a saved adapter: the sha256 of the trunk that it belongs on, and whether a score head was
saved with it."""


def save_adapter(model: PeftModel, folder: Path, *, trunk_sha256: str) -> None:
    """The adapter (and head) alone, in peft's own format, and what it belongs on."""
    has_head = model.peft_config["default"].task_type == TaskType.SEQ_CLS
    text = json.dumps({"sha256": trunk_sha256, "head": has_head}) + "\n"
    with whole_folder(folder) as partial, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # peft's: that adapted embeddings are saved
        model.save_pretrained(str(partial))
        (partial / RECORD).write_text(text, encoding="utf-8")


def adapter_beside(model: str) -> tuple[Path, str] | None:
    """The adapter, with its head, that a one-label ``model`` was merged from, and the sha256 of its
    trunk, if it was kept. That of a policy is none: a score head on it would be a random one."""
    folder = Path(f"{model}_adapter")
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return (folder, str(record["sha256"])) if record["head"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def load_adapter(model: PreTrainedModel, folder: Path, *, trained: bool) -> PeftModel:
    """Put a saved adapter, and the head saved with it, on the trunk that it was trained on."""
    if not (folder / WEIGHTS).is_file():  # peft would look for a pickle next
        raise AlignError(f"adapter {folder}: has no {WEIGHTS}; remove the folder")
    with loading(str(folder)):
        return PeftModel.from_pretrained(model, str(folder), is_trainable=trained)


def on_same_weights(model: torch.nn.Module) -> PreTrainedModel:
    """The model without its adapter, as a module tree of its own over the very same tensors."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, tensors)
    return twin.unload() if isinstance(twin, PeftModel) else twin


def merged(model: PeftModel) -> PreTrainedModel:
    """A plain float32 model on the CPU with the adapter added in; ``model`` stays as it is.

    float32, because a small update added to a weight that is held in bf16 would be rounded away.
    """
    adapted = {id(m.get_base_layer().weight) for m in model.modules() if _is_adapted(m)}
    twins: dict[int, torch.Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        # merging adds in place: what it adds to has to be a copy
        twin = tensor.detach().to("cpu", dtype, copy=id(tensor) in adapted)
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        twins[id(tensor)] = torch.nn.Parameter(twin, False) if is_parameter else twin
    return copy.deepcopy(model, twins).merge_and_unload()


@torch.no_grad()
def plain_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights under the names of a model without adapters, one by one, each tensor once.

    A weight that an adapter updates is made anew with the update in it, float32 as in `merged`; the
    others are the model's own tensors, which must not be written to.
    """
    inner = unwrapped(model)
    adapted = {name: module for name, module in inner.named_modules() if _is_adapted(module)}
    seen: set[int] = set()
    for name, tensor in inner.state_dict(keep_vars=True).items():
        if "lora_" in name or id(tensor) in seen:  # tied weights stand under two names
            continue
        seen.add(id(tensor))
        layer, is_base, leaf = name.partition(".base_layer.")
        weight = tensor.detach()
        if is_base and leaf == "weight":
            module = adapted[layer]
            updates = [module.get_delta_weight(a).float() for a in module.active_adapters]
            weight = weight.float() + sum(updates)
        yield name.replace(".base_layer.", "."), weight


def _is_adapted(module: torch.nn.Module) -> bool:
    return isinstance(module, BaseTunerLayer)


@contextmanager
def adapter_off(model: torch.nn.Module) -> Iterator[None]:
    """The frozen trunk alone: the reference of a policy that is trained with LoRA."""
    if not isinstance(model, PeftModel):
        raise AlignError("reference: adapter_off needs lora; use online or cached")
    with model.disable_adapter():
        yield
