"""Refuse a recipe's models without loading weights: missing, of the wrong kind, pickled.

``align check`` and every run before it reads data call this, so both refuse the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align.config.keys import DPORecipe, EvalRecipe, GenerateRecipe, PPORecipe
from align.models.adapters import find_adapter
from align.models.kinds import Use, require_kind
from align.models.router import require_router
from align.models.sizes import find_config
from align.types import AlignError

WEIGHTS = "*.safetensors"
SAME_VOCABULARY = ("dpo.reference_model", "reference_model", "critic.model")
"""Keys of models that must share the policy's vocabulary."""


def named_models(command: str, recipe: Any) -> Iterator[tuple[str, str, Use]]:
    """Yield every model that a recipe names: key, name and use."""
    if isinstance(recipe, EvalRecipe):
        if recipe.model:
            yield "model", recipe.model, "policy"
        yield from ((f"models.{n}", model, "policy") for n, model in recipe.models.items())
    else:
        yield "model", recipe.model, "start" if command == "rm" else "policy"
    if isinstance(recipe, GenerateRecipe):
        yield from (("also", model, "policy") for model in recipe.also)
    if isinstance(recipe, DPORecipe) and recipe.dpo.reference_model:
        yield "dpo.reference_model", recipe.dpo.reference_model, "policy"
    if getattr(recipe, "reference_model", None):
        yield "reference_model", recipe.reference_model, "policy"
    if isinstance(recipe, PPORecipe) and recipe.critic.model:
        yield "critic.model", recipe.critic.model, "start"
    for name in ("reward", "gold_reward"):
        terms = getattr(recipe, name, ())
        yield from ((f"{name}.model", term.model, "reward") for term in terms if term.model)


def check_models(command: str, recipe: Any) -> None:
    """Raise an ``AlignError`` about the first model that a run of the recipe would refuse."""
    bases: dict[str, str] = {}
    coef = getattr(getattr(recipe, "train", None), "router_aux_coef", 0.0)
    for key, model, use in named_models(command, recipe):
        if isinstance(recipe, EvalRecipe) and _is_no_model(Path(model)):
            continue
        adapter = find_adapter(model, base_model=recipe.base_model)
        if adapter is not None:
            bases.setdefault(adapter.named, model)
        config, _ = find_config(
            model, trust_remote_code=recipe.trust_remote_code, base_model=recipe.base_model
        )
        if getattr(recipe, "from_scratch", False):
            if adapter is not None:
                raise AlignError(f"from_scratch: {model} is an adapter; name its base model")
        elif config is not None or adapter is not None:
            require_kind(key, model, config, use, adapter=adapter)
            if key == "model" and config is not None and coef:
                require_router(model, config)
            if adapter is None and Path(model).is_dir() and not list(Path(model).glob(WEIGHTS)):
                raise AlignError(f"{key}: {model}: has a config.json, but no weights ({WEIGHTS})")
    if recipe.base_model and not bases:
        raise AlignError("base_model: has no effect, for no model here is an adapter; remove it")
    if recipe.base_model and len(bases) > 1:
        (one, first), (two, second) = list(bases.items())[:2]
        raise AlignError(
            f"base_model: {first} and {second} are adapters of two bases ({one}, {two}); correct "
            "base_model_name_or_path in their adapter_config.json instead"
        )


def check_tokenizers(command: str, recipe: Any) -> None:
    """Load the tokenizers of local models, and compare those that must be the same."""
    from align.models.load import load_tokenizer

    options = {"trust_remote_code": recipe.trust_remote_code, "base_model": recipe.base_model}
    first: dict[str, int] | None = None
    for key, model, _ in named_models(command, recipe):
        if isinstance(recipe, EvalRecipe) and _is_no_model(Path(model)):
            continue
        if find_config(model, **options)[0] is None:
            continue
        vocabulary = load_tokenizer(model, **options).get_vocab()
        if key == "model":
            first = vocabulary
        elif key in SAME_VOCABULARY and first is not None and vocabulary != first:
            raise other_vocabulary(key, model, recipe.model)


def check_weights(command: str, recipe: Any) -> None:
    """Compare the names of local models' weights with their configs, without reading a weight."""
    from align.models.load import require_whole

    options = {"trust_remote_code": recipe.trust_remote_code, "base_model": recipe.base_model}
    if getattr(recipe, "from_scratch", False):
        return
    for _, model, use in named_models(command, recipe):
        if isinstance(recipe, EvalRecipe) and _is_no_model(Path(model)):
            continue
        if find_config(model, **options)[0] is not None:
            require_whole(model, use, **options)


def other_vocabulary(key: str, model: str, policy: str) -> AlignError:
    """Build the error about a model whose vocabulary is not the policy's."""
    return AlignError(
        f"{key}: {model} has another vocabulary than {policy}, so its numbers would be of other "
        "tokens; name a model with the same tokenizer"
    )


def has_adapter(recipe: Any) -> bool:
    """Tell whether a recipe names an adapter."""
    names = (model for _, model, _ in named_models("", recipe))
    return any(find_adapter(name, base_model=recipe.base_model) for name in names)


def _is_no_model(path: Path) -> bool:
    """Tell whether an evaluation's entry is a file of outputs or a checkpoint of a run."""
    return path.suffix == ".jsonl" or (path / "state.json").is_file()
