"""List the models that a run holds at once, and count their parameters without loading weights.

Parameters are counted on torch's meta device. A model that is not on this machine is named, never
fetched.
"""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from align.base.suggest import did_you_mean
from align.config.keys import DPORecipe, EvalRecipe, PPORecipe
from align.config.sections import LoraOptions
from align.types import AlignError

TRAINED_BYTES = 16
"""Bytes of each trained parameter: float32 weight, gradient and two Adam moments."""


@dataclass(frozen=True)
class Role:
    """A model of the run: its role, name and adapter.

    ``shares_base``: it shares frozen weights that another role holds.
    """

    name: str
    model: str
    lora: LoraOptions | None = None
    trained: bool = False
    shares_base: bool = False


@dataclass(frozen=True)
class Size:
    """Parameters of one model of a run, and how many of them are trained."""

    role: str
    total: int
    trained: int

    def gigabytes(self, frozen_bytes: int) -> float:
        return (frozen_bytes * (self.total - self.trained) + TRAINED_BYTES * self.trained) / 1e9


def roles(command: str, recipe: Any) -> list[Role]:
    """List every model that the run holds in memory at once."""
    if isinstance(recipe, EvalRecipe):
        models = recipe.models or {"model": recipe.model or ""}
        found = [Role(name, model) for name, model in models.items()]
        if recipe.reference_model:
            found.append(Role("reference", recipe.reference_model))
    else:
        name = {"ppo": "actor", "rm": "reward model"}.get(command, "model")
        lora = getattr(recipe, "lora", None)
        found = [Role(name, recipe.model, lora, trained=command != "generate")]
    if isinstance(recipe, PPORecipe):
        return found + _more_of_ppo(recipe)
    if isinstance(recipe, DPORecipe) and recipe.dpo.reference == "online":
        found.append(Role("reference", recipe.dpo.reference_model or recipe.model))
    terms = getattr(recipe, "reward", ())
    return found + [Role("reward", term.model) for term in terms if term.model]


def _more_of_ppo(recipe: PPORecipe) -> list[Role]:
    """List critic, reference and rewards; with LoRA, those on the actor's weights share them."""
    lora, rewards = recipe.lora, [term.model for term in recipe.reward if term.model]
    shares = {model: lora is not None and _adapter_of(model, recipe.model) for model in rewards}
    start = recipe.critic.model or (rewards[0] if rewards else recipe.model)
    # shared with the actor, or with a reward model that does not share the actor's
    shares_base = lora is not None and (
        start in (recipe.model, *shares) or _adapter_of(start, recipe.model)
    )
    found = [Role("critic", start, lora, trained=True, shares_base=shares_base)]
    if lora is None or recipe.reference_model not in (None, recipe.model):
        found.append(Role("reference", recipe.reference_model or recipe.model))
    for model, shared in shares.items():
        found.append(Role("reward", model, lora if shared else None, shares_base=shared))
    return found


def _adapter_of(model: str, base: str) -> bool:
    """Tell whether ``model`` has an adapter with a score head beside it, trained on ``base``."""
    path = Path(f"{model}_adapter") / "adapter_config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
        return (config["base_model_name_or_path"], config["task_type"]) == (base, "SEQ_CLS")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def find_config(
    model: str, *, trust_remote_code: bool = False, base_model: str | None = None
) -> tuple[Any, str]:
    """Read a model's transformers config if it is on this machine; else (None, reason).

    An adapter has the config of its base, with the adapter's vocabulary.

    Raises:
        AlignError: There is no such folder, no run will write it, and the hub has no such name.
    """
    from align.models.adapters import find_adapter, of_adapter
    from align.models.configs import read_config
    from align.models.locate import (
        in_the_cache,
        locate,
        looks_like_hub_id,
        no_such_model,
    )

    adapter = find_adapter(model, base_model=base_model)
    if adapter is not None:
        with of_adapter(adapter):
            config, reason = find_config(adapter.base, trust_remote_code=trust_remote_code)
        return config, f"{model}: its base {reason}" if reason else ""
    path = Path(model)
    if path.is_file():
        return None, f"{model} is a file, read when the run starts"
    if not path.is_dir():
        if not looks_like_hub_id(model):
            if not _made_by_a_run(path):
                raise no_such_model(model)
            return None, f"{model} is not there yet: a run makes it{did_you_mean(path)}"
        if not in_the_cache(model):
            return (
                None,
                f"{model} is no folder here, nor in the hub's cache: the run will ask the hub",
            )
    where, _ = locate(model)
    return read_config(where, {"local_files_only": True}, trust_remote_code=trust_remote_code), ""


def _made_by_a_run(path: Path) -> bool:
    """Tell whether ``path`` is the output of a run that has not finished yet."""
    run = path.parent
    begun = not run.exists() or (run / "manifest.json").is_file()
    return path.name in ("model", "critic") and begun


def _check_sizes(where: str, model: Any) -> None:
    """Refuse a folder whose weights have other shapes than its config gives."""
    from safetensors import safe_open

    wanted = {name: list(weight.shape) for name, weight in model.state_dict().items()}
    wanted.pop("score.weight", None)
    for path in sorted(Path(where).glob("*.safetensors")) if Path(where).is_dir() else ():
        with safe_open(path, framework="np") as file:
            held = {k: file.get_slice(k).get_shape() for k in file.keys()}  # noqa: SIM118
        for name, shape in held.items():
            if wanted.get(name, shape) != shape:
                raise AlignError(
                    f"model: {where}: {path.name} holds {name} of {shape}, but its config.json "
                    f"makes it {wanted[name]}"
                )


def count_parameters(
    role: str, config: Any, *, lora: LoraOptions | None = None, trained: bool = True
) -> Size:
    """Build the model on the meta device, adapters included, and count its parameters.

    Raises:
        AlignError: Its architecture is one that the run would refuse.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from align.models.attention.packed import BACKENDS
    from align.models.guard import loading
    from align.models.lora import add_lora
    from align.models.probes import check_architecture

    logging.getLogger("transformers").setLevel(logging.ERROR)
    scalar = role in ("critic", "reward", "reward model")
    if scalar:
        config.num_labels = 1
    auto = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    where = str(config.name_or_path or role)
    with (
        torch.device("meta"),
        warnings.catch_warnings(),
        loading(where, file="config.json"),
    ):
        warnings.simplefilter("ignore", FutureWarning)  # peft's, about transformers 6
        model: Any = auto.from_config(config, attn_implementation=BACKENDS["segments"])
        _check_sizes(where, model)
        total = sum(p.numel() for p in model.parameters())
    check_architecture(where, model)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        if lora is not None and trained:
            task: Literal["causal_lm", "classifier"] = "classifier" if scalar else "causal_lm"
            adapted = add_lora(model, task=task, options=lora)
            learnt = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
            return Size(role, total + learnt, learnt)
    return Size(role, total, total if trained else 0)
