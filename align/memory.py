"""The models that a run holds, and the most memory that it will need, without loading weights.

Parameters are counted on torch's meta device. Memory is what is held in the backward pass of the
largest microbatch, worked out from shapes and printed with its parts; it was not fitted to
measurements (`benchmarks/memory.py` makes them).
What is not on this machine is named and left out, never fetched.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from align.config import DPORecipe, EvalRecipe, PPORecipe
from align.nearest import did_you_mean
from align.options import LoraOptions
from align.types import AlignError

TRAINED_BYTES = 16
"""For each trained parameter: float32 weight, gradient and two Adam moments."""
LIBRARIES = 0.65e9
"""Bytes of a process that has imported torch, transformers, accelerate and peft and trained a tiny
model, less that model: a round figure. On a GPU they are not in its memory."""


@dataclass(frozen=True)
class Role:
    """A model of the run: what for, from where, with which adapter.

    ``on_trunk``: it stands on frozen weights that another role holds.
    """

    name: str
    model: str
    lora: LoraOptions | None = None
    trained: bool = False
    on_trunk: bool = False


@dataclass(frozen=True)
class Size:
    """One model of a run: how many parameters it has and how many of them are trained."""

    role: str
    total: int
    trained: int

    def gigabytes(self, frozen_bytes: int) -> float:
        return (frozen_bytes * (self.total - self.trained) + TRAINED_BYTES * self.trained) / 1e9


def models_and_memory(command: str, recipe: Any, tokens_per_row: float | None) -> Iterator[str]:
    """Lines of ``align check``: every model with its parameters, then the peak and its parts.

    Args:
        tokens_per_row: Mean of the training rows, if they could be tokenised: the last microbatch
            may be far below the budget.
    """
    sizes: list[Size] = []
    config, missing = None, False
    for role in roles(command, recipe):
        found, reason = find_config(role.model, trust_remote_code=recipe.trust_remote_code)
        if found is None:
            missing = True
            yield f"{role.name:<11} {reason}; sizes not estimated"
            continue
        config = config or found
        size = count_parameters(role.name, found, lora=role.lora, trained=role.trained)
        note = ", the rest shared with another role" if role.on_trunk else ""
        yield (
            f"{role.name:<12} {role.model}: {size.total:,} parameters, "
            f"{size.trained:,} trained{note}"
        )
        if role.on_trunk:
            adapter = count_parameters(role.name, found, lora=role.lora, trained=True).trained
            size = Size(role.name, adapter, adapter if role.trained else 0)
        sizes.append(size)
    if not sizes or missing:
        return
    yield from _lines(command, recipe, config, sizes, tokens_per_row)


# ---------------------------------------------------------------- roles and parameters


def roles(command: str, recipe: Any) -> list[Role]:
    """Every model that the run holds in memory at once."""
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
    """Critic, reference, rewards; with LoRA, those of the actor's own weights share them."""
    lora, rewards = recipe.lora, [term.model for term in recipe.reward if term.model]
    shares = {model: lora is not None and _adapter_of(model, recipe.model) for model in rewards}
    start = recipe.critic.model or (rewards[0] if rewards else recipe.model)
    # on the actor's weights, or on those of a reward model that has its own
    on_trunk = lora is not None and (
        start in (recipe.model, *shares) or _adapter_of(start, recipe.model)
    )
    found = [Role("critic", start, lora, trained=True, on_trunk=on_trunk)]
    if lora is None or recipe.reference_model not in (None, recipe.model):
        found.append(Role("reference", recipe.reference_model or recipe.model))
    for model, shared in shares.items():
        found.append(Role("reward", model, lora if shared else None, on_trunk=shared))
    return found


def _adapter_of(model: str, base: str) -> bool:
    """Whether an adapter with a score head, kept beside ``model``, names ``base`` as its trunk."""
    path = Path(f"{model}_adapter") / "adapter_config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
        return (config["base_model_name_or_path"], config["task_type"]) == (base, "SEQ_CLS")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def find_config(model: str, *, trust_remote_code: bool = False) -> tuple[Any, str]:
    """The model's transformers config if it is on this machine, else None and why not.

    Raises:
        AlignError: There is no such folder, no run will make it, and the hub has no such name.
    """
    from transformers import AutoConfig

    from align.models.locate import (
        adapter_base,
        in_the_cache,
        looks_like_hub_id,
        no_model_in,
        no_such_model,
    )

    model = adapter_base(model) or model
    path = Path(model)
    if path.is_file():
        return None, f"{model} is a file, read when the run starts"
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise AlignError(no_model_in(path))
    elif not looks_like_hub_id(model):
        if not _made_by_a_run(path):
            raise no_such_model(model)
        return None, f"{model} is not there yet: a run makes it{did_you_mean(path)}"
    elif not in_the_cache(model):
        return None, f"{model} is no folder here, nor in the hub's cache: the run will ask the hub"
    try:
        config = AutoConfig.from_pretrained(
            model, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise AlignError(f"model: {model}: its config cannot be read: {reason}") from error
    return config, ""


def _made_by_a_run(path: Path) -> bool:
    """Whether ``path`` is named like what a run writes, and that run has not ended yet."""
    run = path.parent
    begun = not run.exists() or (run / "manifest.json").is_file()
    return path.name in ("model", "critic") and begun


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


# ---------------------------------------------------------------- memory


def microbatch_tokens(recipe: Any) -> int:
    holder = recipe if hasattr(recipe, "tokens_per_microbatch") else recipe.train
    return int(holder.tokens_per_microbatch)


def largest_microbatch(recipe: Any, tokens_per_row: float | None) -> int:
    """Tokens of the largest microbatch: the budget, or all that an optimizer step has."""
    budget = microbatch_tokens(recipe)
    if tokens_per_row is None:
        return budget
    if isinstance(recipe, PPORecipe):
        k = recipe.generation.samples_per_prompt
        prompts = recipe.ppo.rollout_batch / recipe.ppo.num_minibatches / k
        whole = prompts * (tokens_per_row + k * recipe.generation.max_new_tokens)
    else:
        whole = recipe.train.minibatch * tokens_per_row
    return min(budget, max(1, round(whole)))


def _lines(
    command: str, recipe: Any, config: Any, sizes: Sequence[Size], tokens_per_row: float | None
) -> Iterator[str]:
    gpu = _on_gpu(recipe)
    # a frozen trunk is held in bf16 on a GPU (align.models), in float32 on a CPU
    frozen = 2 if gpu and recipe.precision != "fp32" else 4
    weights = sum(size.gigabytes(frozen) for size in sizes)
    yield (
        f"weights     about {weights:.2f} GB on each device, unsharded: {TRAINED_BYTES} bytes for "
        f"a trained parameter (weight, gradient, Adam), {frozen} for a frozen one"
    )
    if command in ("eval", "generate"):
        return
    tokens = largest_microbatch(recipe, tokens_per_row)
    parts = {"weights": weights * 1e9} | training_bytes(
        config, recipe, tokens, gpu=gpu, tokens_per_row=tokens_per_row
    )
    if not gpu:
        parts["libraries"] = LIBRARIES
    listed = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
    where = "of a GPU" if gpu else "of the process"
    yield f"memory      about {sum(parts.values()) / 1e9:.2f} GB {where} by shapes: {listed}"


def _on_gpu(recipe: Any) -> bool:
    """Where it will run; a recipe in bf16 is one for a GPU, wherever it is checked."""
    import torch

    return torch.cuda.is_available() or recipe.precision == "bf16"


def _in_bf16(recipe: Any, *, gpu: bool) -> bool:
    """Whether products will be in bf16, on this machine or the GPU that the recipe is meant for."""
    import torch

    from align.models.precision import resolve_precision

    if gpu:
        return bool(recipe.precision != "fp32")
    return resolve_precision(recipe.precision, torch.device("cpu")) == "bf16"


def training_bytes(
    config: Any, recipe: Any, tokens: int, *, gpu: bool, tokens_per_row: float | None = None
) -> dict[str, float]:
    """What a microbatch of ``tokens`` needs beside the weights, in bytes by part.

    A llama-like block keeps, for each token: of each of its two norms the input and, where the gain
    is trained, the result before it; what its linear layers multiply, of which autocast makes a
    copy for each of the five that follow a norm; queries, keys, values, what attention gave, on a
    CPU its probabilities (`align.models.products`); four tensors as wide as the MLP. Of the logits
    a chunk exists at a time, with its gradient, and twice more in float32, on a CPU in pieces.
    """
    from align.losses.logprobs import CHUNK_ELEMENTS, PIECE_ELEMENTS
    from align.models.products import BLOCK, KEPT

    text = config.get_text_config()
    width, layers, vocabulary = text.hidden_size, text.num_hidden_layers, text.vocab_size
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or width // heads
    queries, keys = heads * size, (getattr(text, "num_key_value_heads", None) or heads) * size
    mlp = getattr(text, "intermediate_size", None) or 4 * width
    whole = recipe.lora is None
    product = 2 if _in_bf16(recipe, gpu=gpu) else 4
    stream = 2 if gpu and product == 2 and not whole else 4  # a frozen trunk of bf16 weights
    norms = (4 if whole else 2) * width * stream
    inputs = (5 if product < stream else 2) * width * product
    attention = (2 * queries + 2 * keys) * product
    if gpu:
        attention += queries * product
    else:
        row = tokens_per_row or KEPT
        # a block of queries keeps whole rows up to its last query's own key
        attention += heads * round((row + min(row, BLOCK)) / 2) * product if row <= KEPT else 0
    block = norms + inputs + attention + 4 * mlp * product
    trained_layers = layers if whole else recipe.lora.top_layers or layers
    kept = trained_layers * block
    if recipe.gradient_checkpointing:
        kept = layers * width * stream + block
    found = {"activations": float(tokens * kept)}
    if product < stream:  # autocast's copies of the weights, which the backward pass multiplies too
        linear = width * (2 * queries + 2 * keys + 3 * mlp)
        head = 0 if hasattr(recipe, "reward_model") else vocabulary * width
        held = 1 if recipe.gradient_checkpointing else trained_layers
        found["weights in bf16"] = float(product * (held * linear + head))
    if not hasattr(recipe, "reward_model"):  # a language model's head
        chunk = min(tokens * vocabulary, CHUNK_ELEMENTS)
        pieces = chunk if gpu else min(chunk, PIECE_ELEMENTS)
        # the head's gradient, and the embedding's, before they are added to what is there
        dense = 2 * vocabulary * width * 4 if whole else 0
        found["logits"] = float(2 * product * chunk + 8 * pieces + dense)
    return found
