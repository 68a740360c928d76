"""What lies in a run's folder, whose it is, and how a run is replaced without losing it early."""

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
from align.base.console import bounded, one_line
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
"""What a run writes, and so all that ``overwrite=true`` removes."""

NONFINITE = "nonfinite.jsonl"
"""Steps that were no number, with the ids of their rows."""

GROWING = ("metrics.jsonl", "samples.jsonl", NONFINITE)
"""Files that rows are added to while a run goes on."""

REPLACED = ".replaced"
"""The run that ``overwrite=true`` replaces, until the new one has numbers or a checkpoint."""

WHOLE = ".whole"
"""In ``REPLACED`` once all is there."""


def claim(folder: Path) -> None:
    """Hold the folder until the run ends: two runs in it would mix their rows."""
    other = locks.take(folder)
    if other is not None:
        raise AlignError(f"output_dir: {folder}: {locks.refusal(folder, other)}")


def status_of(folder: Path, manifest: Mapping[str, Any]) -> str:
    """``done``, ``failed``, ``interrupted``, ``running``, or ``died``: nobody is running it."""
    status = str(manifest.get("status", ""))
    return "died" if status == "running" and locks.holder_of(folder) is None else status


# ---------------------------------------------------------------- the manifest

CHECKSUM = "checksum"
SHAPES = {
    "stage": str, "status": str, "recipe": dict, "data": dict, "held_out": dict, "versions": dict,
    "hardware": dict, "stream": dict, "run": str,
}  # fmt: skip
"""Keys of a manifest that are used, and what their values are."""


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Replace ``manifest.json``, with the checksum of what a run is known by."""
    text = json.dumps({**manifest, CHECKSUM: _checksum(manifest)}, indent=2) + "\n"
    write_whole(folder / MANIFEST, text, again=RESUME)


def read_manifest(folder: Path, remedy: str = "") -> dict[str, Any]:
    """The manifest of a run.

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
    """Over all but how the run ended, which may be put right by hand."""
    fixed = {k: v for k, v in manifest.items() if k not in ("status", "error", CHECKSUM)}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------- the end of a run


def supervise(stage: Callable[[Any], None], recipe: Any) -> None:
    """Run a stage; if it fails, the manifest says how, and a run that it was to replace is back."""
    try:
        stage(recipe)
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt)
        close(Path(recipe.output_dir), "interrupted" if stopped else "failed", error)
        raise


def close(folder: Path, status: str, error: BaseException) -> None:
    """Close what this process has left open in ``folder``."""
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
                line = bounded(one_line(str(error))) or type(error).__name__
                write_manifest(folder, {**held, "status": status, "error": line})
    finally:
        locks.release(folder)


def stillborn(folder: Path) -> bool:
    """Whether a run ended there before it had made anything: nothing is lost with it."""
    made = [name for name in OURS if (folder / name).exists()]
    if not set(made) <= {"config.yaml", "manifest.json", "train_rows.tsv", "nonfinite.jsonl"}:
        return False
    try:
        manifest = load_json(folder / MANIFEST)
    except Unreadable:
        return False
    return status_of(folder, manifest) in ("failed", "interrupted", "died")


def set_aside(folder: Path) -> None:
    """Make room for a new run: what lies there waits in ``.replaced``."""
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
    if (place / WHOLE).exists():  # else a crash came between two moves: the rest is still there
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
