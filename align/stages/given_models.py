"""Models that were given as objects: their names, their files, what manifests say of them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from align.base.console import reason_in_line
from align.base.files import Unreadable, load_json, reason
from align.types import AlignError


def facts_of(manifest: Path) -> dict[str, str]:
    """Lines about the objects of the run of a manifest; none if it cannot be read."""
    try:
        found = load_json(manifest)
    except Unreadable:
        return {}
    facts = found.get("given") if isinstance(found, dict) else None
    return {k: v for k, v in facts.items() if isinstance(v, str)} if isinstance(facts, dict) else {}


def texts_in(value: Any) -> Iterator[str]:
    """All texts in a recipe's values."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for one in value:
            yield from texts_in(one)
    elif isinstance(value, str):
        yield value


def content_of(model: Any, tokenizer: Any) -> str:
    """Hash what `save_model` writes: weights, configurations, and all of the tokenizer."""
    from align.data.tokens.cache import tokenizer_hash
    from align.models.load import fingerprint

    generation = getattr(model, "generation_config", None)
    parts = [
        fingerprint(model),
        generation.to_dict() if generation is not None else None,
        tokenizer_hash(tokenizer),
        tokenizer.special_tokens_map,
        [tokenizer.padding_side, tokenizer.truncation_side, tokenizer.model_max_length],
    ]
    return hashlib.sha256(json.dumps(parts, default=str, sort_keys=True).encode()).hexdigest()


def save_model(place: Path, model: Any, tokenizer: Any) -> None:
    """Save beside, then rename: a run that is killed leaves no half of it."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=place.parent, prefix=".saving-"))
    except OSError as error:
        raise AlignError(f"output_dir: {place.parent}: {reason(error)}") from error
    try:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        beside.chmod(0o755)
        os.replace(beside, place)
    except Exception as error:  # of the disk, or of a model that the library cannot write
        raise AlignError(f"model: cannot be saved as {place}: {reason_in_line(error)}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
