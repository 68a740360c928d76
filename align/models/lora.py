"""Low-rank adapters by peft: add, disable for the reference, merge for saving.

Several models may share the same frozen weights, each with an adapter of its own: each is a
module tree of its own over the same tensors. No adapter is ever switched, and nothing here writes
to a frozen tensor.
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
from align.config.sections import LoraOptions
from align.models.adapters import WEIGHTS
from align.models.guard import loading, reason_of
from align.types import AlignError

LINEAR = (torch.nn.Linear, Conv1D)
LM_HEADS = ("lm_head", "embed_out")
"""Modules of the actor that the critic, adapted by the same recipe, does not have."""


def add_lora(
    model: PreTrainedModel,
    *,
    task: Literal["causal_lm", "classifier"],
    options: LoraOptions,
) -> PeftModel:
    """Freeze the backbone and add adapters; a classifier's head is trained and saved whole.

    Source: Hu et al. 2021 (arXiv:2106.09685). A reward head that is not in ``modules_to_save``
    stays at its random initialisation and is lost on saving: a known mistake.
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
    else:  # peft needs names if only some layers are adapted
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
    # tied: merging into one of the two would change the other
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = [getattr(getattr(end, "base_layer", end), "weight", None) for end in ends]
    if weights[0] is weights[1] and any(isinstance(end, BaseTunerLayer) for end in ends):
        raise AlignError(
            "lora.target_modules: this model's output embeddings are its input embeddings, which "
            "one adapter cannot serve; leave them out"
        )
    return adapted


def require_rank(options: LoraOptions, config: PretrainedConfig) -> None:
    """Refuse a rank above the model's width: such an adapter is larger than the layer it adapts."""
    width = getattr(config.get_text_config(), "hidden_size", None)
    if width is not None and options.r > width:
        raise AlignError(
            f"lora.r: got {options.r}, above the model's width of {width}; use {width} at most, "
            "such as 16"
        )


def _check_adapted(model: PeftModel, options: LoraOptions, *, but: Sequence[str]) -> None:
    """Refuse a target that peft skipped, and a rank above the width of every adapted layer.

    Such a rank makes a full-rank update at a higher price.
    """
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
    """Refuse a target that no module has: peft would adapt the others silently."""
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
    """List the module names that ``all-linear`` adapts."""
    backbone = getattr(model, model.base_model_prefix)
    linear = (name for name, m in backbone.named_modules() if isinstance(m, LINEAR))
    return sorted({name.rpartition(".")[2] for name in linear})


def unwrapped(model: torch.nn.Module) -> PreTrainedModel:
    """Return the transformers model inside a peft wrapper; its adapted layers stay in place."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


RECORD = "trunk.json"
"""File beside a saved adapter: sha256 of its backbone, and whether it comes with a score head."""


def save_adapter(model: PeftModel, folder: Path, *, backbone_sha256: str) -> None:
    """Save the adapter (and head) alone in peft's format, with the hash of its backbone."""
    has_head = model.peft_config["default"].task_type == TaskType.SEQ_CLS
    text = json.dumps({"sha256": backbone_sha256, "head": has_head}) + "\n"
    with whole_folder(folder) as partial, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # peft's: that adapted embeddings are saved
        model.save_pretrained(str(partial))
        (partial / RECORD).write_text(text, encoding="utf-8")


def adapter_beside(model: str) -> tuple[Path, str] | None:
    """Find the adapter and head that a one-label ``model`` was merged from.

    Returns:
        (adapter folder, sha256 of its backbone); None if there is none, or if it is a policy's, on
        which a score head would be random.
    """
    folder = Path(f"{model}_adapter")
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return (folder, str(record["sha256"])) if record["head"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def load_adapter(model: PreTrainedModel, folder: Path, *, trained: bool) -> PeftModel:
    """Load a saved adapter and its head onto the backbone that it was trained on."""
    if not (folder / WEIGHTS).is_file():  # peft would look for a pickle next
        raise AlignError(f"adapter {folder}: has no {WEIGHTS}; remove the folder")
    with loading(str(folder)):
        return PeftModel.from_pretrained(model, str(folder), is_trainable=trained)


def on_same_weights(model: torch.nn.Module) -> PreTrainedModel:
    """Build the model without its adapter as a second module tree over the same tensors."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, tensors)
    return twin.unload() if isinstance(twin, PeftModel) else twin


def merged(model: PeftModel) -> PreTrainedModel:
    """Merge the adapter into a copy on the CPU, float32; ``model`` is unchanged.

    float32, because bf16 would round away a small update.
    """
    adapted = {id(m.get_base_layer().weight) for m in model.modules() if _is_adapted(m)}
    twins: dict[int, torch.Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        # merging adds in place, so adapted weights have to be copied
        twin = tensor.detach().to("cpu", dtype, copy=id(tensor) in adapted)
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        twins[id(tensor)] = torch.nn.Parameter(twin, False) if is_parameter else twin
    return copy.deepcopy(model, twins).merge_and_unload()


@torch.no_grad()
def plain_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each weight once, under its name in a model without adapters.

    An adapted weight is computed with its update, in float32 as in `merged`; the others are the
    model's own tensors, which must not be written to.
    """
    inner = unwrapped(model)
    adapted = {name: module for name, module in inner.named_modules() if _is_adapted(module)}
    seen: set[int] = set()
    for name, tensor in inner.state_dict(keep_vars=True).items():
        if "lora_" in name or id(tensor) in seen:  # tied weights have two names
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
    """Run the frozen backbone alone: the reference of a policy trained with LoRA."""
    if not isinstance(model, PeftModel):
        raise AlignError("reference: adapter_off needs lora; use online or cached")
    with model.disable_adapter():
        yield
