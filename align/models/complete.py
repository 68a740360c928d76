"""Compare the names of a model's weights with what its config has a place for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import safe_open

from align.types import AlignError

LAYER = re.compile(r"(^|\.)(layers|h|blocks?)\.\d+\.")
"""Pattern in the names of a decoder layer's weights."""
BESIDE = re.compile(
    r"inv_freq$|masked_bias$|\.attn\.bias$|\.attention\.bias$|(cos|sin)_cached$|vis|image|audio|mtp"
)
"""Tensors in checkpoints that are no decoder weights: recomputed buffers, other towers."""


def require_complete(
    model: str, info: Mapping[str, Any], options: Mapping[str, Any], *, but: str = ""
) -> None:
    """Refuse weights that do not match the config.

    transformers would draw missing weights at random and drop those that have no place. Biases of
    zeros may be dropped: converters write them for models whose config switches biases off.

    Args:
        model: A folder or a hub id.
        info: What transformers reports on loading it.
        options: What it was loaded with.
        but: Beginning of the names that may be missing.
    """
    missing = sorted(k for k in info["missing_keys"] if not (but and k.startswith(but)))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise AlignError(
            f"model: {model}: its files lack {missing[0]}{more}, which would be random; "
            "fetch or save the model whole"
        )
    left = sorted(k for k in info["unexpected_keys"] if LAYER.search(k) and not BESIDE.search(k))
    zeros = _zero_biases(model, options, left)
    left = [name for name in left if name not in zeros]
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        key = "attention_bias or mlp_bias" if left[0].endswith(".bias") else "num_hidden_layers"
        raise AlignError(
            f"model: {model}: its files hold {left[0]}{more}, which would be left out, as its "
            f"config.json has no place for it; mend {key} there, or save the model whole"
        )


def _zero_biases(model: str, options: Mapping[str, Any], names: Sequence[str]) -> set[str]:
    """Find the biases among these tensors whose values are all 0."""
    wanted = {name for name in names if name.endswith(".bias")}
    if not wanted or "gguf_file" in options:
        return set()
    folder = Path(model)
    if not folder.is_dir():
        revision = options.get("revision")
        folder = Path(snapshot_download(model, revision=revision, local_files_only=True))
    found = set()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            there = wanted.intersection(file.keys())
            found |= {name for name in there if not file.get_tensor(name).any()}
    return found
