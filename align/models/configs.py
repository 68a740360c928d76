"""Read a model's config, for loading and for ``align check``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from align.base.files import read_json
from align.base.progress import warn
from align.models.guard import loading, reason_of
from align.types import AlignError

WEIGHTS_NAME = r"[\w-][\w.-]*\.safetensors(\.index\.json)?"
SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h",
)  # fmt: skip
"""Keys of a generation config that act on sampling alone."""
MOST_LAYERS = 10_000
"""Layers above which a config is damaged; building its modules would not end."""


def read_config(where: str, options: dict[str, Any], *, trust_remote_code: bool = False) -> Any:
    """Read a model's config; kernels that it names are ignored, since align chooses its own.

    Raises:
        AlignError: It cannot be read, or the weights are quantised.
    """
    for file in ("config.json", "generation_config.json"):  # transformers ignores a bad second
        if (Path(where) / file).is_file():
            read_json(Path(where) / file)
    config = load_config(where, options, trust_remote_code=trust_remote_code)
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and not 0 < layers <= MOST_LAYERS:
        raise AlignError(f"model: {where}: its config.json has num_hidden_layers={layers}")
    named = getattr(config, "transformers_weights", None)
    if named is not None and not (isinstance(named, str) and re.fullmatch(WEIGHTS_NAME, named)):
        raise AlignError(
            f"model: {where}: its config.json names {str(named)[:100]!r} as transformers_weights; "
            "only a .safetensors file (or an index of them) in its own folder is loaded"
        )
    quantised = getattr(config, "quantization_config", None)
    if quantised and "gguf_file" not in options:
        method = dict(quantised).get("quant_method", "") if isinstance(quantised, dict) else ""
        raise AlignError(
            f"model: {where}: its weights are quantised ({str(method)[:40] or 'see its config'}), "
            "which align neither trains nor runs; name the model in full precision (for an "
            "adapter's base: base_model=...)"
        )
    return config


def load_config(where: str, options: dict[str, Any], *, trust_remote_code: bool = False) -> Any:
    """Load a config without checks, and without the kernels that it names."""
    from transformers import AutoConfig

    options = {k: v for k, v in options.items() if k != "use_safetensors"}
    with loading(where, file="config.json"):
        config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code, **options)
        # a name such as `org/kernel` would be fetched from the hub and run
        config._attn_implementation = config._experts_implementation = None
        config.get_text_config()
    return config


def settle_generation(model: Any, where: str) -> None:
    """Make a generation config savable, so that a run does not fail at its end.

    Sampling keys beside ``do_sample: false`` have no effect, but transformers refuses to save them;
    they are removed with a warning.

    Raises:
        AlignError: It cannot be saved for another reason.
    """
    config = getattr(model, "generation_config", None)
    if config is None:
        return
    begin, ids = f"model: {where}: its generation_config.json", config.eos_token_id
    listed = ids if isinstance(ids, list) else [ids]
    if ids is not None and not all(type(i) is int for i in listed):
        raise AlignError(f"{begin} has eos_token_id={ids!r}; wanted a token id, or a list of them")
    if _savable(config) is None:
        return
    removed = (
        [] if config.do_sample else [k for k in SAMPLING if getattr(config, k, None) is not None]
    )
    for key in removed:
        setattr(config, key, None)
    problem = _savable(config)
    if problem is not None:
        raise AlignError(f"{begin} is invalid: {reason_of(problem)}")
    warn(f"{where}: generation_config.json: {', '.join(removed)} beside do_sample=false: removed")


def _savable(config: Any) -> Exception | None:
    """Return the error that transformers raises on saving a generation config, or None."""
    try:
        config.validate(strict=True)
    except Exception as error:  # of wrong types too
        return error
    return None
