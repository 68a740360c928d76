"""Run-folder layout, its lock, its manifest, and crash-safe overwrite."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from align.base import locks
from align.base.console import LONGEST_ERROR, reason_in_line
from align.base.files import RESUME, Unreadable, load_json, read_json, write_whole
from align.base.progress import warn
from align.types import AlignError

MANIFEST = "manifest.json"

OURS = (
    "config.yaml", "manifest.json", "metrics.jsonl", "samples.jsonl", "pairs.jsonl", "best.jsonl",
    "eval.json",
    "model", "critic", "model_adapter", "critic_adapter", "checkpoints", "outputs", "tracking",
    "margins.png", "nonfinite.jsonl", "train_rows.tsv", "rounds",
)  # fmt: skip
"""Names that a run writes, which ``overwrite=true`` removes."""

NONFINITE = "nonfinite.jsonl"
"""Non-finite steps with the ids of their rows."""

GROWING = ("metrics.jsonl", "samples.jsonl", NONFINITE)
"""Files that a run appends to."""

REPLACED = ".replaced"
"""Folder of the run being replaced, until the new one has numbers or a checkpoint."""

WHOLE = ".whole"
"""Marker in ``REPLACED`` once everything is moved there."""


def claim(folder: Path) -> None:
    """Lock the folder until the run ends: two runs in it would mix their rows."""
    other = locks.take(folder)
    if other is not None:
        raise AlignError(f"output_dir: {folder}: {locks.refusal(folder, other)}")


def status_of(folder: Path, manifest: Mapping[str, Any]) -> str:
    """Return ``done``, ``failed``, ``interrupted``, ``running`` or ``died`` (no process runs
    it).
    """
    status = str(manifest.get("status", ""))
    return "died" if status == "running" and locks.holder_of(folder) is None else status


CHECKSUM = "checksum"
SHAPES = {
    "stage": str, "status": str, "recipe": dict, "data": dict, "held_out": dict, "versions": dict,
    "hardware": dict, "stream": dict, "run": str,
}  # fmt: skip
"""Types of a manifest's keys that are read."""


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Replace ``manifest.json``, with a checksum of its lasting content."""
    text = json.dumps({**manifest, CHECKSUM: _checksum(manifest)}, indent=2) + "\n"
    write_whole(folder / MANIFEST, text, again=RESUME)


def read_manifest(folder: Path, remedy: str = "") -> dict[str, Any]:
    """Read the manifest of a run.

    Raises:
        AlignError: It is missing, damaged, or something else; one line with its name.
    """
    path = folder / MANIFEST
    manifest = read_json(path, remedy)
    behind = f"; {remedy}" if remedy else ""
    for key, kind in SHAPES.items():
        if manifest.get(key) is not None and not isinstance(manifest[key], kind):
            raise AlignError(f"{path}: {key}: not what a run writes there{behind}")
    if manifest.get(CHECKSUM) not in (None, _checksum(manifest)):
        raise AlignError(f"{path}: has changed since the run wrote it (checksum){behind}")
    return manifest


def _checksum(manifest: Mapping[str, Any]) -> str:
    """Hash everything but how the run ended, which may be corrected by hand."""
    fixed = {k: v for k, v in manifest.items() if k not in ("status", "error", CHECKSUM)}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


_AT_END: list[Callable[[], None]] = []
"""Open run folders of this process, newest last; `supervise` closes them."""


def at_end(close: Callable[[], None]) -> None:
    """Call ``close`` when the current run has ended, however it ends."""
    _AT_END.append(close)


def supervise(stage: Callable[[Any], None], recipe: Any) -> None:
    """Run a stage; if it fails, record how in the manifest, and restore a run being replaced."""
    opened_before = len(_AT_END)
    try:
        stage(recipe)
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt)
        close(Path(recipe.output_dir), "interrupted" if stopped else "failed", error)
        raise
    finally:
        while len(_AT_END) > opened_before:
            _AT_END.pop()()


def close(folder: Path, status: str, error: BaseException) -> None:
    """Close this process's open run in ``folder``."""
    if not locks.holds(folder):
        return
    try:
        if (folder / REPLACED).is_dir():
            _bring_back(folder)
            warn(f"{folder}: nothing was measured or saved yet, so the run that was there is kept")
            return
        with suppress(AlignError):  # neither a damaged manifest nor a full disk hides the error
            held = read_manifest(folder)
            if held.get("status") == "running":
                line = reason_in_line(error, LONGEST_ERROR)
                write_manifest(folder, {**held, "status": status, "error": line})
    finally:
        locks.release(folder)


def stillborn(folder: Path) -> bool:
    """Tell whether a run ended before it had made anything, so that nothing is lost with it."""
    made = [name for name in OURS if (folder / name).exists()]
    if not set(made) <= {"config.yaml", "manifest.json", "train_rows.tsv", "nonfinite.jsonl"}:
        return False
    try:
        manifest = load_json(folder / MANIFEST)
    except Unreadable:
        return False
    return status_of(folder, manifest) in ("failed", "interrupted", "died")


def set_aside(folder: Path) -> None:
    """Move an existing run to ``.replaced`` for a new one."""
    place = folder / REPLACED
    if place.is_dir():  # the run that replaced it was killed before its first numbers
        _bring_back(folder)
    there = [name for name in OURS if (folder / name).exists()]
    if not there:
        return
    if stillborn(folder):
        for name in there:
            remove(folder / name)
        return
    place.mkdir()
    for name in there:
        os.replace(folder / name, place / name)
    (place / WHOLE).touch()


def _bring_back(folder: Path) -> None:
    place = folder / REPLACED
    if (place / WHOLE).exists():  # else a crash came between two moves, and the rest is unmoved
        for name in OURS:
            remove(folder / name)
        (place / WHOLE).unlink()
    for path in place.iterdir():
        os.replace(path, folder / path.name)
    place.rmdir()


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
