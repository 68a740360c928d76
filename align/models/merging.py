"""Merge an adapter into its base, with the same numbers as peft's own model."""

from __future__ import annotations

import warnings
from dataclasses import fields
from typing import Any

from align.base.progress import warn
from align.models.adapters import CONFIG, WEIGHTS, Adapter
from align.models.guard import loading, reason_of
from align.types import AlignError


def merge(model: Any, adapter: Adapter) -> Any:
    """Merge the adapter into its float32 base; all parameters of the result can be trained.

    The vocabulary is resized to the embeddings that the adapter holds. Tied embeddings are untied
    if the adapter changes only one of them.

    Raises:
        AlignError: A tensor of the adapter fits nothing in the base, or one is missing.
    """
    from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    with (
        loading(adapter.name, folder=adapter.folder, file=CONFIG),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # peft's: the important ones are checked here
        kind = PEFT_TYPE_TO_CONFIG_MAPPING[adapter.settings.get("peft_type", "LORA")]
        known = {field.name for field in fields(kind)}
        unknown = [key for key, value in adapter.settings.items() if value and key not in known]
        if unknown:  # peft would ignore them
            raise AlignError(
                f"model: {adapter.name}: {adapter.folder / CONFIG} has {', '.join(unknown)[:100]}, "
                "which the installed peft does not know; upgrade peft, or save the adapter merged"
            )
        config = kind.from_pretrained(str(adapter.folder))
        tied = _tied(model)
        _resize(model, adapter, tied=tied)
        config.inference_mode = True
        wrapper = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
        wrapped = wrapper(model, config)
        if tied:
            _untie(model)
    with (
        loading(adapter.name, folder=adapter.folder, file=WEIGHTS),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        found = _load(wrapped, adapter)
        left_over = _fitting_nothing(found.unexpected_keys, adapter)
        for keys, what in ((found.missing_keys, "lacks"), (left_over, "has")):
            if keys:
                more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
                raise AlignError(
                    f"model: {adapter.name}: {adapter.folder / WEIGHTS} {what} {keys[0]}{more}, "
                    f"which does not fit its config and its base {adapter.base}"
                )
        merged = wrapped.merge_and_unload(safe_merge=True)
    if tied:
        _tie_if_equal(merged)
    return merged.requires_grad_(True)


def _load(wrapped: Any, adapter: Adapter) -> Any:
    """Load the tensors from safetensors; return peft's lists of missing and unexpected names."""
    try:
        return wrapped.load_adapter(str(adapter.folder), "default", torch_device="cpu")
    except KeyError as error:
        raise AlignError(
            f"model: {adapter.name}: {adapter.folder / WEIGHTS} lacks {reason_of(error)[9:]}, "
            f"which {CONFIG} names in modules_to_save (or peft adds for its task type)"
        ) from error


def _fitting_nothing(keys: list[str], adapter: Adapter) -> list[str]:
    """List tensors that fit nothing, except peft's copies of embeddings that it saves anyway."""
    from safetensors.torch import load_file

    held: dict[str, Any] = {}
    left = []
    for key in keys:
        plain = key.replace(".original_module.", ".").replace(".modules_to_save.", ".")
        if plain == key or plain not in adapter.shapes:
            left.append(key)
        elif ".modules_to_save." in key:
            held = held or load_file(adapter.folder / WEIGHTS)
            left += [] if bool((held[key] == held[plain]).all()) else [key]
    return left


def _resize(model: Any, adapter: Adapter, *, tied: bool) -> None:
    """Resize the vocabulary to the adapter's, and warn of new rows that it does not hold."""
    from align.models.vocabulary import resize

    old = len(model.get_input_embeddings().weight)
    held, rows = _vocabulary(model, adapter)
    if rows != old:
        resize(model, rows)
    file, lost = adapter.folder / "tokenizer.json", ""
    if file.is_file():
        from tokenizers import Tokenizer

        count = Tokenizer.from_file(str(file)).get_vocab_size()
        if count > rows:
            lost = f"{count - rows} tokens of its tokenizer have no embedding in it or in its base"
    if rows > old and not tied and held == {"input"} and model.get_output_embeddings() is not None:
        lost = f"{rows - old} new tokens have no output embedding in it"
    if lost:
        warn(
            f"{adapter.name}: {lost}; they get the mean of the others (to have them saved, train "
            'with modules_to_save=["embed_tokens","lm_head"])'
        )


def _vocabulary(model: Any, adapter: Adapter) -> tuple[set[str], int]:
    """Return the embeddings that the adapter holds (``input``, ``output``) and their rows."""
    ends = {"input": model.get_input_embeddings(), "output": model.get_output_embeddings()}
    paths = {id(module): name for name, module in model.named_modules()}
    names = {end: paths[id(m)].rpartition(".")[2] for end, m in ends.items() if id(m) in paths}
    held, rows = set(), set()
    for key, shape in adapter.shapes.items():
        parts = key.split(".")
        of = [end for end, name in names.items() if name in parts]
        if not of:
            continue
        if parts[-1] == "weight" and not any(p.startswith("lora_") for p in parts):
            rows.add(shape[0])
        elif "lora_embedding_A" in parts:
            rows.add(shape[1])
        elif "lora_B" in parts:
            rows.add(shape[0])
        held.update(of)
    if len(rows) > 1:
        raise AlignError(
            f"model: {adapter.name}: {adapter.folder / WEIGHTS} holds embeddings of "
            f"{' and '.join(map(str, sorted(rows)))} tokens"
        )
    if rows:
        return held, rows.pop()
    indices = adapter.settings.get("trainable_token_indices") or ()
    lists = indices.values() if isinstance(indices, dict) else (indices,)
    largest = max((int(i) for part in lists for i in part), default=-1) + 1
    return held, max(largest, len(ends["input"].weight))


def _weight(layer: Any) -> Any:
    """Return the weight of an embedding or head inside peft's wrappers."""
    layer = getattr(layer, "original_module", layer)
    return getattr(layer, "base_layer", layer).weight


def _tied(model: Any) -> bool:
    output = model.get_output_embeddings()
    return output is not None and _weight(output) is _weight(model.get_input_embeddings())


def _untie(model: Any) -> None:
    """Give an adapted output layer its own weight, since merging would change both."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    adapted = [end for end in ends if isinstance(end, BaseTunerLayer)]
    if adapted and _weight(ends[0]) is _weight(ends[1]):
        base = getattr(ends[1], "base_layer", ends[1])
        base.weight = torch.nn.Parameter(base.weight.detach().clone(), requires_grad=False)


def _tie_if_equal(model: Any) -> None:
    """Tie embeddings that are equal again, and record in the config whether they are tied.

    peft records them as untied as soon as an adapter holds one of them.
    """
    import torch

    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    equal = torch.equal(head.weight, embeddings.weight)
    if equal:
        head.weight = embeddings.weight
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = equal
