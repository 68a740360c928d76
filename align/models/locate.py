"""A model's name -> a folder, a GGUF file or a hub id. Nothing is loaded here."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from align.hub import require_on_the_hub
from align.made_by import made_by
from align.nearest import did_you_mean
from align.types import AlignError

DATA_FILES = {".gguf", ".jsonl", ".json", ".csv", ".parquet", ".arrow", ".gz"}
"""Endings of files that a recipe may name: no hub id has one."""

GIVEN = "another model: a folder, a hub id (org/name) or a .gguf"
"""What a recipe may name as a model."""

SHOWN = 6
"""Models that are named of a folder that has some below it."""


def locate(model: str) -> tuple[str, dict[str, Any]]:
    """What ``from_pretrained`` takes for a folder, a GGUF file or a hub id."""
    path = Path(model)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise no_such_model(model)
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise AlignError(no_model_in(path))
        if list(path.glob("pytorch_model*.bin")) and not list(path.glob("*.safetensors")):
            raise AlignError(
                f"model: {model}: only pickled weights (pytorch_model.bin), which are never "
                "loaded; convert them to safetensors first"
            )
        return str(path), {"use_safetensors": True}
    if path.exists() or not looks_like_hub_id(model):
        raise no_such_model(model)
    return model, {"use_safetensors": True}


def require_found(model: str) -> tuple[str, dict[str, Any]]:
    """`locate`, and a hub id of which nothing is in the cache is asked for, once."""
    where, options = locate(model)
    if where == model and not Path(model).exists() and not in_the_cache(model):
        require_on_the_hub(model, "model", "config.json")
    return where, options


def in_the_cache(model: str) -> bool:
    """Whether the hub's cache on this machine holds the config of a hub id."""
    from huggingface_hub import try_to_load_from_cache

    try:
        return isinstance(try_to_load_from_cache(model, "config.json"), str)
    except ValueError:
        return False  # a name that the hub forbids


def looks_like_hub_id(name: str) -> bool:
    """``org/name`` whose first part is no folder here, or a bare name such as ``gpt2``.

    With a folder of that name here, the hub would be asked for what is a misspelt path.
    """
    if Path(name).suffix in DATA_FILES or name.startswith("."):
        return False
    first = name.split("/", 1)[0]
    known_folder = first in {"runs", "models", "data"} or ("/" in name and Path(first).exists())
    return bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)) and not known_folder


def no_such_model(model: str) -> AlignError:
    """For a name that is no hub id either."""
    if Path(model).is_file():
        return AlignError(
            f"model: {model}: a file, not a model; name a folder, a hub id or a .gguf"
        )
    what = "file" if Path(model).suffix in DATA_FILES else "folder"
    remedy = made_by(model)
    if remedy is None:
        near = did_you_mean(Path(model))
        return AlignError(f"model: {model}: no such {what}{near or f'; give {GIVEN}'}")
    return AlignError(f"model: {model}: no such {what}; {remedy}; or give {GIVEN}")


def no_model_in(folder: Path) -> str:
    """What is wrong with a folder that holds no model, and where one lies if it is a run's."""
    line = f"model: {folder}: the folder has no config.json, so it holds no model"
    inside = [n for n in ("model", "critic") if (folder / n / "config.json").is_file()]
    if inside:
        return f"{line}; it is a run's folder: name {folder / inside[0]}"
    below = sorted(str(p.parent) for n in (1, 2, 3) for p in folder.glob(f"{'*/' * n}config.json"))
    if below:
        more = ", ..." if len(below) > SHOWN else ""
        return f"{line}; there are {', '.join(below[:SHOWN])}{more}"
    return f"{line}; give {GIVEN}"


def adapter_base(model: str) -> str | None:
    """The base model of a folder that holds a LoRA adapter alone; None where it does not."""
    config = Path(model) / "adapter_config.json"
    if not config.is_file() or (Path(model) / "config.json").is_file():
        return None
    base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise AlignError(f"model: {model}: the adapter does not name its base model; merge them")
    return str(base)


def is_on_the_hub(model: str) -> bool:
    """Whether it would be asked of the hub, or its cache; a misspelt folder raises."""
    model = adapter_base(model) or model
    return locate(model)[0] == model and not Path(model).exists()
