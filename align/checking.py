"""``align check``: what a recipe will run, worked out without loading any weights.

Parameters are counted on torch's meta device. The memory is an estimate by the formulas printed
with it; what is not on this machine is named and left out, never fetched.
"""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from align.config import DataConfig, DPORecipe, EvalRecipe, GenerateRecipe, IterateRecipe, PPORecipe
from align.options import LoraOptions
from align.recipe_builder import nearest
from align.types import AlignError, DataSource

Kind = Literal["sft", "preference", "prompt"]

# command -> what its rows are
KINDS: dict[str, Kind] = {
    "sft": "sft",
    "rm": "preference",
    "dpo": "preference",
    "ppo": "prompt",
    "eval": "prompt",
    "generate": "prompt",
}

# (role, model, adapter, whether it is trained)
Role: TypeAlias = tuple[str, str, LoraOptions | None, bool]

# bytes for each trained parameter: float32 weight, gradient and two Adam moments
TRAINED_BYTES = 16


@dataclass(frozen=True)
class Size:
    """One model of a run: how many parameters it has and how many of them are trained."""

    role: str
    total: int
    trained: int

    def gigabytes(self, frozen_bytes: int) -> float:
        return (frozen_bytes * (self.total - self.trained) + TRAINED_BYTES * self.trained) / 1e9


def check(command: str, recipe: Any) -> Iterator[str]:
    """The lines that ``align check`` prints. Keys and values were validated on reading."""
    yield f"command     align {command}"
    yield f"output_dir  {recipe.output_dir}{_output_note(recipe)}"
    if isinstance(recipe, IterateRecipe):
        from align.stages.iterate import stage_recipes

        yield f"rounds      at most {recipe.rounds}, each of these stages"
        for name, stage in stage_recipes(recipe).items():
            yield f"{name:<11} {getattr(recipe, name)}: {_first_source(stage.data)}"
        return
    if isinstance(recipe, DPORecipe):
        from align.stages.dpo_options import check_options

        check_options(recipe)
    for term in getattr(recipe, "reward", ()):
        if term.function:
            from align.rewards.function import load_function

            yield f"reward      {load_function(term.function).name}: found"
    rows = 0
    for name in ("train", "test"):
        for source in getattr(recipe.data, name):
            count, line = _count_rows(source, recipe.data, KINDS[command])
            rows += count if name == "train" else 0
            label = "data" if isinstance(recipe, EvalRecipe | GenerateRecipe) else f"data.{name}"
            yield f"{label:<11} {line}"
    yield from _schedule(recipe, rows)
    yield from _models(command, recipe)


# ---------------------------------------------------------------- data


def _count_rows(source: DataSource, data: DataConfig, kind: Kind) -> tuple[int, str]:
    """Rows of one source, read and checked as the run will do it."""
    from align.data.preferences import load_examples, with_columns

    path = Path(source.path)
    if not path.exists():
        if looks_like_hub_id(source.path):
            return 0, f"{source.path} [{source.split}]: a hub data set; rows not counted"
        if path.parent.is_dir():
            raise AlignError(f"data: {path}: no such file or folder{_did_you_mean(path)}")
        return 0, f"{source.path}: not there yet, nor is its folder; rows not counted"
    sources = with_columns((source,), data.columns)
    loaded = load_examples(sources, kind=kind, on_bad_row=data.on_bad_row)
    dropped = sum(sum(report.dropped.values()) for report in loaded.reports)
    note = f", {dropped:,} bad ones left out" if dropped else ""
    return len(loaded.examples), f"{source.path}: {len(loaded.examples):,} rows{note}"


def _first_source(data: DataConfig) -> str:
    return (*data.train, *data.test)[0].path


def _did_you_mean(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    near = nearest(path.name, [p.name for p in path.parent.iterdir()])
    return f" (did you mean {path.parent / near}?)" if near else ""


def looks_like_hub_id(name: str) -> bool:
    """``org/name`` whose first part is no folder here, or a bare name such as ``gpt2``."""
    if Path(name).suffix in {".gguf", ".jsonl", ".json", ".csv", ".parquet", ".arrow", ".gz"}:
        return False
    first = name.split("/", 1)[0]
    known_folder = first in {"runs", "models", "data", ".", ".."} or Path(first).exists()
    return bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)) and not known_folder


def _output_note(recipe: Any) -> str:
    folder = Path(recipe.output_dir)
    if folder.exists() and not folder.is_dir():
        raise AlignError(f"output_dir: {folder} is a file; name a folder")
    if not (folder / "manifest.json").is_file():
        return ""
    if recipe.overwrite:
        return " (holds a run, which is overwritten)"
    if getattr(recipe, "resume", "never") == "auto":
        return " (holds a run, which is resumed)"
    return " (holds a run already: refused without overwrite=true or resume=auto)"


# ---------------------------------------------------------------- steps


def _schedule(recipe: Any, rows: int) -> Iterator[str]:
    if isinstance(recipe, PPORecipe):
        ppo, generation = recipe.ppo, recipe.generation
        steps = ppo.iterations * ppo.epochs * ppo.num_minibatches
        minibatch = math.ceil(ppo.rollout_batch / ppo.num_minibatches)
        yield (
            f"rollouts    {ppo.iterations:,} of {ppo.rollout_batch:,} sequences, "
            f"at most {generation.max_new_tokens:,} new tokens each"
        )
        yield (
            f"steps       {steps:,} = {ppo.iterations:,} iterations x {ppo.epochs} epochs x "
            f"{ppo.num_minibatches} minibatches of {minibatch:,} sequences"
        )
    elif isinstance(recipe, EvalRecipe | GenerateRecipe):
        per_prompt = recipe.generation.samples_per_prompt
        yield f"samples     {per_prompt} for each prompt, {recipe.generation.slots} side by side"
    else:
        yield f"steps       {_steps_in_words(recipe, rows)}"
    tokens = microbatch_tokens(recipe)
    yield f"microbatch  {tokens:,} tokens on each device (sets the memory, not the result)"


def _steps_in_words(recipe: Any, rows: int) -> str:
    train, data = recipe.train, recipe.data
    of = f"minibatches of {train.minibatch:,} over all processes"
    if train.max_steps is not None:
        return f"{train.max_steps:,} {of}"
    if not rows:
        return f"{train.epochs:g} epochs of {of}; the rows are not known yet"
    used = rows if data.test else round(rows * (1 - data.test_fraction))
    used = min(used, data.max_train_rows or used)
    steps = math.ceil(used * train.epochs / train.minibatch)
    return f"about {steps:,} {of}: {train.epochs:g} epochs of {used:,} training rows"


def microbatch_tokens(recipe: Any) -> int:
    holder = recipe if hasattr(recipe, "tokens_per_microbatch") else recipe.train
    return int(holder.tokens_per_microbatch)


# ---------------------------------------------------------------- parameters and memory


def _models(command: str, recipe: Any) -> Iterator[str]:
    roles, missing = _roles(command, recipe), []
    sizes: list[Size] = []
    config = None
    for role, model, lora, trained in roles:
        found, reason = find_config(model, trust_remote_code=recipe.trust_remote_code)
        if found is None:
            missing.append(role)
            yield f"{role:<11} {reason}; sizes not estimated"
            continue
        config = config or found
        size = count_parameters(role, found, lora=lora, trained=trained)
        sizes.append(size)
        yield f"{role:<12} {model}: {size.total:,} parameters, {size.trained:,} trained"
    if not sizes or missing:
        return
    # a frozen trunk is held in bf16 on a GPU (align.models), in float32 on a CPU
    frozen = 2 if recipe.precision == "bf16" else 4
    weights = sum(size.gigabytes(frozen) for size in sizes)
    yield (
        f"weights     about {weights:.2f} GB on each device, unsharded: {TRAINED_BYTES} bytes for "
        f"a trained parameter (weight, gradient, Adam), {frozen} for a frozen one"
    )
    if command not in ("eval", "generate"):
        yield _activations(config, recipe)


def _roles(command: str, recipe: Any) -> list[Role]:
    """Every model that the run holds in memory at once."""
    roles: list[Role]
    if isinstance(recipe, EvalRecipe):
        models = recipe.models or {"model": recipe.model or ""}
        roles = [(name, model, None, False) for name, model in models.items()]
        if recipe.reference_model:
            roles.append(("reference", recipe.reference_model, None, False))
    else:
        trained = command != "generate"
        lora = getattr(recipe, "lora", None)
        name = {"ppo": "actor", "rm": "reward model"}.get(command, "model")
        roles = [(name, recipe.model, lora, trained)]
    if isinstance(recipe, PPORecipe):
        rewards = [term.model for term in recipe.reward if term.model]
        critic = recipe.critic.model or (rewards[0] if rewards else recipe.model)
        roles.append(("critic", critic, recipe.lora, True))
        if recipe.lora is None or recipe.reference_model:
            roles.append(("reference", recipe.reference_model or recipe.model, None, False))
    if isinstance(recipe, DPORecipe) and recipe.dpo.reference == "online":
        roles.append(("reference", recipe.dpo.reference_model or recipe.model, None, False))
    terms = getattr(recipe, "reward", ())
    return roles + [("reward", term.model, None, False) for term in terms if term.model]


def find_config(model: str, *, trust_remote_code: bool = False) -> tuple[Any, str]:
    """The model's transformers config if it is on this machine, else None and why not."""
    from huggingface_hub import try_to_load_from_cache
    from transformers import AutoConfig

    path = Path(model)
    if path.is_file():
        return None, f"{model} is a file, read when the run starts"
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise AlignError(f"model: {model}: the folder has no config.json, so it holds no model")
    elif not looks_like_hub_id(model):
        return None, f"{model} is not there yet{_did_you_mean(path)}"
    elif not isinstance(try_to_load_from_cache(model, "config.json"), str):
        return None, f"{model} is not in the local cache"
    try:
        config = AutoConfig.from_pretrained(
            model, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise AlignError(f"model: {model}: its config cannot be read: {reason}") from error
    return config, ""


def count_parameters(
    role: str, config: Any, *, lora: LoraOptions | None = None, trained: bool = True
) -> Size:
    """Build the model on the meta device, adapters included, and count."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from align.models.lora import add_lora

    logging.getLogger("transformers").setLevel(logging.ERROR)
    scalar = role in ("critic", "reward", "reward model")
    if scalar:
        config.num_labels = 1
    auto = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft's, about transformers 6
        model = auto.from_config(config)
        total = sum(p.numel() for p in model.parameters())
        if lora is not None and trained:
            task: Literal["causal_lm", "classifier"] = "classifier" if scalar else "causal_lm"
            adapted = add_lora(model, task=task, options=lora)
            learnt = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
            return Size(role, total + learnt, learnt)
    return Size(role, total, total if trained else 0)


def _activations(config: Any, recipe: Any) -> str:
    """What the backward pass keeps of a llama-like block: about ten tensors as wide as the model
    (norms, q, k, v, attention, residuals) and four as wide as the MLP; the head is never [T,V]."""
    text = config.get_text_config()
    width, layers = text.hidden_size, text.num_hidden_layers
    mlp = getattr(text, "intermediate_size", None) or 4 * width
    tokens = microbatch_tokens(recipe)
    each = 2 if recipe.precision == "bf16" else 4
    if recipe.gradient_checkpointing:
        kept = tokens * each * (layers * width + 10 * width + 4 * mlp)
        formula = "tokens x bytes x (layers x hidden + one block)"
    else:
        kept = tokens * each * layers * (10 * width + 4 * mlp)
        formula = "tokens x bytes x layers x (10 hidden + 4 mlp)"
    return f"activations about {kept / 1e9:.2f} GB: {formula}"
