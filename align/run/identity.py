"""Whether a run that is to go on is still the run that was begun."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from align.types import AlignError

VOLATILE = (
    "resume", "overwrite", "trackers", "save_every", "eval_every", "keep_checkpoints", "log_every",
    "output_dir", "on_nonfinite", "timeout",
)  # fmt: skip
"""Keys that may change when a run is resumed: every step stays what it was.

With ``keep_best``, `save_every` and `eval_every` say after which steps the held-out number is
measured, and so from which of them the saved model is chosen: after a change, from other ones.
"""


def lasting(config_yaml: str) -> dict[str, Any]:
    """The recipe as ``a.b: value``, without what may change."""
    flat: dict[str, Any] = {}

    def walk(value: Any, key: str) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                if name not in VOLATILE:
                    walk(inner, f"{key}.{name}" if key else str(name))
        else:
            flat[key] = value

    walk(yaml.safe_load(config_yaml), "")
    return flat


def require_same(
    folder: Path, stage: str, previous: Mapping[str, Any], manifest: Mapping[str, Any]
) -> None:
    """Refuse to go on with another run than the one whose manifest is ``previous``.

    Raises:
        AlignError: The stage, the recipe, the data or the starting weights are others.
    """
    before = previous.get("stage", stage)
    if before != stage:
        raise AlignError(
            f"resume: {folder} holds a run of {before}, not of {stage}; replace it "
            "with overwrite=true, or name another output_dir"
        )
    for key in ("recipe", "data", "start_weights"):
        before, now = previous.get(key), manifest.get(key)
        if key == "recipe" and before is not None and _begins_to_skip(before, now):
            continue
        if before is not None and before != now:
            raise AlignError(
                f"resume: {folder}: {_difference(key, before, now)}; restore it, or "
                "start anew with overwrite=true"
            )


def _begins_to_skip(before: Mapping[str, Any], now: Any) -> bool:
    """Whether all that differs is that bad rows of a stream are skipped: those before were good."""
    streamed = before.get("data.streaming") is True
    stopped = before.get("data.on_bad_row") == "stop"
    return streamed and stopped and {**before, "data.on_bad_row": "skip"} == now


def plain(value: Any) -> Any:
    """As it is after it was written and read again."""
    return json.loads(json.dumps(value))


def first_change(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """(key, what it was, what it is) of two flat recipes, as YAML has it; None where equal."""
    missing = object()
    for name in {**before, **now}:
        if before.get(name, missing) != now.get(name, missing):
            return name, _in_yaml(before, name), _in_yaml(now, name)
    return None


def _in_yaml(flat: Mapping[str, Any], name: str) -> str:
    """A key's value as a recipe writes it; of a section what is in it."""
    if name in flat:
        return json.dumps(flat[name], ensure_ascii=False)
    below = [key for key in flat if key.startswith(f"{name}.")]
    inner = [f"{key.removeprefix(f'{name}.')}: {_in_yaml(flat, key)}" for key in below]
    return f"{{{', '.join(inner)}}}" if inner else "not set"


def _difference(key: str, before: Any, now: Any) -> str:
    if key == "data":
        return "a data file has changed since the run began (sha256, or what was read from it)"
    if key == "start_weights":
        return "the model that training starts from has other weights than when the run began"
    name, was, is_now = first_change(before, now) or ("the recipe", "another", "this")
    return f"{name} was {was} and is now {is_now}"
