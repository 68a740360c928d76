"""What lies in a run's folder, whose it is, and how a run is replaced without losing it early."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from align.files import write_whole
from align.progress import warn
from align.types import AlignError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

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

RUNNING = ".running"
"""Which process writes in a folder, while it does."""

REPLACED = ".replaced"
"""The run that ``overwrite=true`` replaces, until the new one has numbers or a checkpoint."""

WHOLE = ".whole"
"""In ``REPLACED`` once all is there."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody else of this machine claims the folder meanwhile; not on Windows."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def claim(folder: Path) -> None:
    """Two runs in one folder would mix their rows: the second one is refused."""
    with locked(folder):
        holder = running_in(folder)
        if holder and holder != _me():
            host, process = holder
            gone = f", or remove {folder / RUNNING} if it no longer is"
            raise AlignError(
                f"output_dir: {folder}: process {process} is running in it"
                + (f" on {host}" if host != platform.node() else "")
                + "; wait for it, name another output_dir"
                + (gone if host != platform.node() else "")
            )
        mine = [*_me(), psutil.Process().create_time()]
        (folder / RUNNING).write_text(json.dumps(mine) + "\n", encoding="utf-8")


def running_in(folder: Path) -> tuple[str, int] | None:
    """(host, process) that writes in the folder; of another host it cannot be known whether it
    still does, so it counts."""
    try:
        host, process, started = json.loads((folder / RUNNING).read_text(encoding="utf-8"))
        if host != platform.node() or psutil.Process(process).create_time() == started:
            return str(host), int(process)
    except (OSError, ValueError, TypeError, psutil.Error):
        pass  # nobody, or a run that was killed
    return None


def _me() -> tuple[str, int]:
    return platform.node(), os.getpid()


def status_of(folder: Path, manifest: Mapping[str, Any]) -> str:
    """``done``, ``failed``, ``interrupted``, ``running``, or ``died``: nobody is running it."""
    status = str(manifest.get("status", ""))
    return "died" if status == "running" and running_in(folder) is None else status


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
    if running_in(folder) != _me():
        return
    (folder / RUNNING).unlink()
    if (folder / REPLACED).is_dir():
        _bring_back(folder)
        warn(f"{folder}: nothing was measured or saved yet, so the run that was there is kept")
        return
    path = folder / "manifest.json"
    held = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if held.get("status") == "running":
        line = " ".join(str(error).split()) or type(error).__name__
        write_whole(path, json.dumps({**held, "status": status, "error": line}, indent=2) + "\n")


def stillborn(folder: Path) -> bool:
    """Whether a run ended there before it had made anything: nothing is lost with it."""
    made = [name for name in OURS if (folder / name).exists()]
    if not set(made) <= {"config.yaml", "manifest.json", "train_rows.tsv", "nonfinite.jsonl"}:
        return False
    path = folder / "manifest.json"
    if not path.is_file():
        return False
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
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
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
