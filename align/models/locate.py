"""Resolve a model's name to a folder, a GGUF file or a hub id; nothing is loaded."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from align.base.files import read_json
from align.base.how_to_make import how_to_make
from align.base.hub import require_on_the_hub
from align.base.suggest import did_you_mean
from align.models.adapters import CONFIG, find_adapter
from align.models.guard import loading
from align.types import AlignError

INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
"""Suffixes of pickled weights."""

DATA_FILES = {".gguf", ".jsonl", ".json", ".csv", ".parquet", ".arrow", ".gz"}
"""Suffixes of files that a recipe may name: no hub id has one."""

GIVEN = "another model: a folder, a hub id (org/name) or a .gguf"
"""Remedy for a wrong name: the forms of a model's name."""

SHOWN = 6
"""Subfolders with a model that a message lists."""


def locate(model: str) -> tuple[str, dict[str, Any]]:
    """Return ``from_pretrained``'s arguments for a folder, a GGUF file or a hub id."""
    path = Path(model)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise no_such_model(model)
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise AlignError(no_model_in(path))
        require_safe_weights(model, path)
        return str(path), {"use_safetensors": True}
    if path.exists() or not looks_like_hub_id(model):
        raise no_such_model(model)
    return model, {"use_safetensors": True}


def require_safe_weights(model: str, folder: Path) -> None:
    """Refuse pickles, and an index that names a pickle or a file outside its folder."""
    if not list(folder.glob("*.safetensors")) and not (folder / INDEX).exists():
        pickled = sorted(p.name for end in PICKLES for p in folder.glob(f"*{end}"))
        pickled = [name for name in pickled if name != "training_args.bin"]
        if pickled:
            raise AlignError(
                f"model: {model}: only pickled weights ({pickled[0]}), which are never "
                "loaded; convert them to safetensors first"
            )
    if (folder / INDEX).exists():
        check_index(model, folder / INDEX)


def check_index(model: str, index: Path) -> None:
    """Refuse an index of shards that is damaged, names a pickle, or leads out of its folder.

    A shard may be a link, as in the hub's cache and in stores of DVC and git-annex: the user put it
    there, whereas an index is fetched.
    """
    held = read_json(index)
    shards = held.get("weight_map")
    if "metadata" not in held:  # transformers reads it
        raise AlignError(f"model: {model}: {index}: has no metadata; save the model again")
    if not isinstance(shards, dict) or not all(isinstance(n, str) for n in shards.values()):
        raise AlignError(f"model: {model}: {index}: weight_map is not {{tensor: file}}")
    for name in sorted(set(shards.values())):
        if not name.endswith(".safetensors"):
            raise AlignError(
                f"model: {model}: {index} names {name[:100]!r}, which is no safetensors file: "
                "pickled weights are never loaded; convert them to safetensors first"
            )
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise AlignError(
                f"model: {model}: {index} names {name[:100]!r}, which is outside its folder; put "
                "the file itself into the folder"
            )
        if Path(model).is_dir() and not (index.parent / name).is_file():
            raise AlignError(f"model: {model}: {index} names {name[:100]!r}, which is not there")


def require_safe_on_hub(model: str, options: dict[str, Any]) -> None:
    """Check the files of a hub id as `locate` checks a folder's, before weights are loaded."""
    if Path(model).exists() or "gguf_file" in options:
        return
    from transformers.utils import cached_file, find_adapter_config_file

    revision = options.get("revision")
    with loading(model):
        index = cached_file(
            model,
            INDEX,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        embedded = find_adapter_config_file(model, revision=revision)
    if index is not None:
        check_index(model, Path(index))
    if embedded is not None:  # transformers would apply it, even from a pickle
        raise AlignError(
            f"model: {model}: holds a whole model and an adapter, and which is meant is not known; "
            "name a folder with one of them"
        )


def require_found(model: str) -> tuple[str, dict[str, Any]]:
    """Call `locate`, and ask the hub for an id that the cache does not hold."""
    where, options = locate(model)
    if where == model and not Path(model).exists() and not in_the_cache(model):
        require_on_the_hub(model, "model", "config.json")
    return where, options


def in_the_cache(model: str, file: str = "config.json") -> bool:
    """Tell whether the hub's cache on this machine holds a file of a hub id."""
    from huggingface_hub import try_to_load_from_cache

    try:
        return isinstance(try_to_load_from_cache(model, file), str)
    except ValueError:
        return False  # a name that the hub forbids


def looks_like_hub_id(name: str) -> bool:
    """Tell whether ``name`` can be a hub id: ``org/name``, or a bare name such as ``gpt2``.

    It cannot if its first part is a local folder: the name is then a misspelt path.
    """
    if Path(name).suffix in DATA_FILES or name.startswith("."):
        return False
    first = name.split("/", 1)[0]
    known_folder = first in {"runs", "models", "data"} or ("/" in name and Path(first).exists())
    return bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)) and not known_folder


def no_such_model(model: str) -> AlignError:
    """Build the error for a name that is no model here and no hub id."""
    if Path(model).is_file():
        return AlignError(
            f"model: {model}: a file, not a model; name a folder, a hub id or a .gguf"
        )
    what = "file" if Path(model).suffix in DATA_FILES else "folder"
    remedy = how_to_make(model)
    if remedy is None:
        near = did_you_mean(Path(model))
        return AlignError(f"model: {model}: no such {what}{near or f'; give {GIVEN}'}")
    return AlignError(f"model: {model}: no such {what}; {remedy}; or give {GIVEN}")


def no_model_in(folder: Path) -> str:
    """Say that a folder holds no model, and name those below it."""
    line = f"model: {folder}: the folder has no config.json, so it holds no model"
    inside = [n for n in ("model", "critic") if (folder / n / "config.json").is_file()]
    if inside:
        return f"{line}; it is a run's folder: name {folder / inside[0]}"
    below = sorted(
        {
            str(path.parent)
            for depth in (1, 2, 3)
            for file in ("config.json", CONFIG)
            for path in folder.glob(f"{'*/' * depth}{file}")
        }
    )
    if below:
        more = ", ..." if len(below) > SHOWN else ""
        return f"{line}; there are {', '.join(below[:SHOWN])}{more}"
    return f"{line}; give {GIVEN}"


def name_on_the_hub(model: str, *, base_model: str | None = None) -> str | None:
    """Name the model, or the adapter's base, that would be read from the hub or its cache.

    None if all is here; a misspelt folder raises.
    """
    adapter = find_adapter(model, base_model=base_model)
    if adapter is not None:
        return name_on_the_hub(adapter.base)
    return model if locate(model)[0] == model and not Path(model).exists() else None
