"""Estimate the peak memory of a run, without loading weights.

The peak is in the backward pass of the largest microbatch. It is computed from shapes and printed
with its parts, and on a CPU with the memory that the allocator cannot use again (`HOLES`), the one
part that was measured. `benchmarks/memory.py` compares it with runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from align.config.keys import PPORecipe
from align.models.sizes import TRAINED_BYTES, Size, count_parameters, find_config, roles

LIBRARIES = 0.65e9
"""Bytes of a process that has imported torch, transformers, accelerate and peft and trained a tiny
model, without that model: a round figure. They are not in a GPU's memory."""
HOLES = 0.25e9
"""Fragmented memory on a CPU, bytes: tensors that outlive a microbatch are scattered among those
that it frees. Measured, 0.15 to 0.6 GB, with models of 40 and 135 million parameters, as the
largest resident set minus the other parts."""


def models_and_memory(command: str, recipe: Any, tokens_per_row: float | None) -> Iterator[str]:
    """Yield lines of ``align check``: every model with its parameters, then the peak and its parts.

    Args:
        tokens_per_row: Mean of the training rows, if they could be tokenised: the last microbatch
            may be far below the budget.
    """
    sizes: list[Size] = []
    config, missing = None, False
    for role in roles(command, recipe):
        found, reason = find_config(
            role.model, trust_remote_code=recipe.trust_remote_code, base_model=recipe.base_model
        )
        if found is None:
            missing = True
            yield f"{role.name:<11} {reason}; sizes not estimated"
            continue
        config = config or found
        size = count_parameters(role.name, found, lora=role.lora, trained=role.trained)
        note = ", the rest shared with another role" if role.shares_base else ""
        yield (
            f"{role.name:<12} {role.model}: {size.total:,} parameters, "
            f"{size.trained:,} trained{note}"
        )
        if role.shares_base:
            adapter = count_parameters(role.name, found, lora=role.lora, trained=True).trained
            size = Size(role.name, adapter, adapter if role.trained else 0)
        sizes.append(size)
    if not sizes or missing:
        return
    yield from _lines(command, recipe, config, sizes, tokens_per_row)


def microbatch_tokens(recipe: Any) -> int:
    return int(getattr(recipe, "train", recipe).tokens_per_microbatch)


def largest_microbatch(recipe: Any, tokens_per_row: float | None) -> int:
    """Return the tokens of the largest microbatch: the budget, or a whole optimizer step."""
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
    # a frozen backbone is held in bf16 on a GPU (align.models), in float32 on a CPU
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
        parts["holes"] = HOLES
        parts["libraries"] = LIBRARIES
    listed = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
    where = "of a GPU" if gpu else "of the process"
    yield f"memory      about {sum(parts.values()) / 1e9:.2f} GB {where} by shapes: {listed}"
    if recipe.activation_offload:
        kept = replace(recipe, activation_offload=False)
        there = training_bytes(config, kept, tokens, gpu=gpu, tokens_per_row=tokens_per_row)
        waiting = there["activations"] - parts["activations"]
        yield f"offloaded   about {waiting / 1e9:.2f} GB of activations to the CPU's memory"


def _on_gpu(recipe: Any) -> bool:
    """Tell whether the run will use a GPU; a recipe in bf16 is meant for one."""
    import torch

    return torch.cuda.is_available() or recipe.precision == "bf16"


def _in_bf16(recipe: Any, *, gpu: bool) -> bool:
    """Tell whether products will be in bf16, here or on the GPU that the recipe is meant for."""
    import torch

    from align.models.precision import resolve_precision

    if gpu:
        return bool(recipe.precision != "fp32")
    return resolve_precision(recipe.precision, torch.device("cpu")) == "bf16"


def training_bytes(
    config: Any, recipe: Any, tokens: int, *, gpu: bool, tokens_per_row: float | None = None
) -> dict[str, float]:
    """Estimate the memory of a microbatch of ``tokens`` beside the weights, in bytes by part.

    A llama-like block saves for each token: for each of its two norms the input and, if the gain is
    trained, the result before it; the inputs of its linear layers, of which autocast copies each of
    the five that follow a norm; queries, keys, values, the output of attention and, on a CPU, its
    probabilities (`align.models.attention.cpu`); four tensors as wide as the MLP. One chunk of the
    logits exists at a time, and two float32 copies of it, on a CPU in pieces.
    """
    from align.losses.logprobs import CHUNK_ELEMENTS, PIECE_ELEMENTS
    from align.models.attention.choose import head_shape
    from align.models.attention.cpu import BLOCK, KEPT

    text = config.get_text_config()
    width, layers, vocabulary = text.hidden_size, text.num_hidden_layers, text.vocab_size
    heads, shared, size = head_shape(config)
    queries, keys = heads * size, shared * size
    mlp = getattr(text, "intermediate_size", None) or 4 * width
    whole = recipe.lora is None
    product = 2 if _in_bf16(recipe, gpu=gpu) else 4
    stream = 2 if gpu and product == 2 and not whole else 4  # frozen weights in bf16
    norms = (4 if whole else 2) * width * stream
    inputs = (5 if product < stream else 2) * width * product
    attention = (2 * queries + 2 * keys) * product
    if gpu:
        attention += queries * product
    else:
        row = tokens_per_row or KEPT
        # a block of queries saves whole rows up to its last query's own key
        attention += heads * round((row + min(row, BLOCK)) / 2) * product if row <= KEPT else 0
    block = norms + inputs + attention + 4 * mlp * product
    trained_layers = layers if whole else recipe.lora.top_layers or layers
    kept = trained_layers * block
    if recipe.gradient_checkpointing:
        kept = layers * width * stream + block
    if recipe.activation_offload:  # one layer's at a time; the others are in the CPU's memory
        kept = block
    found = {"activations": float(tokens * kept)}
    if product < stream:  # autocast's copies of the weights, used by the backward pass too
        linear = width * (2 * queries + 2 * keys + 3 * mlp)
        head = 0 if hasattr(recipe, "reward_model") else vocabulary * width
        one = recipe.gradient_checkpointing or recipe.activation_offload
        held = 1 if one else trained_layers
        found["weights in bf16"] = float(product * (held * linear + head))
    if not hasattr(recipe, "reward_model"):  # a language model's head
        chunk = min(tokens * vocabulary, CHUNK_ELEMENTS)
        pieces = chunk if gpu else min(chunk, PIECE_ELEMENTS)
        # gradients of the head and the embedding, before they are accumulated
        dense = 2 * vocabulary * width * 4 if whole else 0
        found["logits"] = float(product * chunk + 8 * pieces + dense)
    return found
