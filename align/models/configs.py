"""A model's config, read for loading and for ``align check`` alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from align.models.guard import loading, read_object
from align.types import AlignError

MOST_LAYERS = 10_000
"""Above it a config is nonsense, and building its modules would not end."""


def read_config(where: str, options: dict[str, Any], *, trust_remote_code: bool = False) -> Any:
    """Read a model's config; kernels that it names are forgotten: align chooses its own.

    Raises:
        AlignError: It cannot be read, or the weights are quantised.
    """
    options = {k: v for k, v in options.items() if k != "use_safetensors"}
    file = Path(where) / "config.json"
    if file.is_file():
        read_object(file)
    with loading(where, file="config.json"):
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code, **options)
        # a name such as `org/kernel` would be fetched from the hub and run
        config._attn_implementation = config._experts_implementation = None
        layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and not 0 < layers <= MOST_LAYERS:
        raise AlignError(f"model: {where}: its config.json has num_hidden_layers={layers}")
    quantised = getattr(config, "quantization_config", None)
    if quantised and "gguf_file" not in options:
        method = dict(quantised).get("quant_method", "") if isinstance(quantised, dict) else ""
        raise AlignError(
            f"model: {where}: its weights are quantised ({str(method)[:40] or 'see its config'}), "
            "which align neither trains nor runs; name the model in full precision (for an "
            "adapter's base: base_model=...)"
        )
    return config
