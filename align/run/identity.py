"""Check that a run to be resumed is the run that was begun."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from align.config.names import RENAMED
from align.types import AlignError

VOLATILE = (
    "resume", "overwrite", "trackers", "save_every", "eval_every", "keep_checkpoints", "log_every",
    "output_dir", "on_nonfinite", "timeout",
)  # fmt: skip
"""Keys that may change when a run is resumed, since every step stays the same.

With ``keep_best``, `save_every` and `eval_every` set the steps at which the held-out number is
measured, so after a change the saved model is chosen from other steps.
"""


def lasting(config_yaml: str) -> dict[str, Any]:
    """Flatten the recipe to ``a.b: value``, without the keys that may change."""
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
    """Refuse to resume another run than the one whose manifest is ``previous``.

    Raises:
        AlignError: The stage, the recipe, the data or the starting weights differ.
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
        if key == "data" and before and now:
            now = _fields_of(before, now)
        if before is None or before == now:
            continue
        if key != "recipe" or first_change(before, now or {}):
            raise AlignError(
                f"resume: {folder}: {_difference(key, before, now)}; restore it, or "
                "start anew with overwrite=true"
            )


def _fields_of(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the fields of ``now``'s reports that ``before`` has: an older align wrote fewer."""
    found = {}
    for side, reports in now.items():
        written = before.get(side, [])
        fields = written[0].keys() if written else ()
        kept = [{k: v for k, v in report.items() if k in fields} for report in reports]
        found[side] = kept if written else reports
    return found


def _begins_to_skip(before: Mapping[str, Any], now: Any) -> bool:
    """Tell whether only ``on_bad_row`` changed from stop to skip: earlier rows were all good."""
    streamed = before.get("data.streaming") is True
    stopped = before.get("data.on_bad_row") == "stop"
    return streamed and stopped and {**before, "data.on_bad_row": "skip"} == now


def plain(value: Any) -> Any:
    """Convert to what JSON gives after writing and reading."""
    return json.loads(json.dumps(value))


def first_change(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """Return (key, old value, new value) of two flat recipes as YAML; None if equal.

    ``before`` may have the keys of an earlier version: `RENAMED` has their names now.
    """
    before = {_current_name(key, now): value for key, value in before.items()}
    missing = object()
    for name in {**before, **now}:
        if before.get(name, missing) != now.get(name, missing):
            return name, _in_yaml(before, name), _in_yaml(now, name)
    return None


def _current_name(key: str, now: Mapping[str, Any]) -> str:
    for renamed in RENAMED.values():
        if renamed.get(key) in now and key not in now:
            return renamed[key]
    return key


def _in_yaml(flat: Mapping[str, Any], name: str) -> str:
    """Format a key's value as in a recipe; a section with its keys."""
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
