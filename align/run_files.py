"""What lies in a run's folder, whose it is, and how a run is replaced without losing it early."""

from __future__ import annotations

import json
import os
import platform
import shutil
from pathlib import Path

import psutil

from align.files import write_whole
from align.types import AlignError

OURS = (
    "config.yaml", "manifest.json", "metrics.jsonl", "samples.jsonl", "pairs.jsonl", "best.jsonl",
    "eval.json",
    "model", "critic", "model_adapter", "critic_adapter", "checkpoints", "outputs", "tracking",
    "margins.png", "nonfinite.jsonl", "train_rows.tsv",
)  # fmt: skip
"""What a run writes, and so all that ``overwrite=true`` removes."""

NONFINITE = "nonfinite.jsonl"
"""Steps that were no number, with the ids of their rows."""

GROWING = ("metrics.jsonl", "samples.jsonl", NONFINITE)
"""Files that rows are added to while a run goes on."""

RUNNING = ".running"
"""Which process writes in a folder, while it does."""

REPLACED = ".replaced"
"""The run that ``overwrite=true`` replaces, until the new one has its first numbers."""


def claim(folder: Path) -> None:
    """Two runs in one folder would mix their rows: the second one is refused."""
    process = is_running(folder)
    if process and process != os.getpid():
        raise AlignError(
            f"output_dir: {folder}: process {process} is running in it; wait for it, or "
            "name another output_dir"
        )
    mine = [platform.node(), os.getpid(), psutil.Process().create_time()]
    (folder / RUNNING).write_text(json.dumps(mine) + "\n", encoding="utf-8")


def is_running(folder: Path) -> int:
    """The process of this machine that writes in the folder now; 0 where there is none."""
    try:
        host, process, started = json.loads((folder / RUNNING).read_text(encoding="utf-8"))
        alive = host == platform.node() and psutil.Process(process).create_time() == started
    except (OSError, ValueError, TypeError, psutil.Error):
        return 0  # nobody, or a run that was killed
    return int(process) if alive else 0


def note_failure(folder: Path, status: str, error: str) -> bool:
    """Close what this process has left open in ``folder``; True: the run before it is back."""
    if is_running(folder) != os.getpid():
        return False
    (folder / RUNNING).unlink()
    if (folder / REPLACED).is_dir():
        _bring_back(folder)
        return True
    path = folder / "manifest.json"
    held = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if held.get("status") == "running":
        write_whole(path, json.dumps({**held, "status": status, "error": error}, indent=2) + "\n")
    return False


def set_aside(folder: Path) -> None:
    """Make room for a new run; the manifest moves last, so that a crash in the middle is known."""
    place = folder / REPLACED
    if place.is_dir():  # the run that replaced it was killed before its first numbers
        _bring_back(folder)
    place.mkdir()
    for name in sorted(OURS, key="manifest.json".__eq__):
        if (folder / name).exists():
            os.replace(folder / name, place / name)


def _bring_back(folder: Path) -> None:
    place = folder / REPLACED
    whole = (place / "manifest.json").is_file()
    for name in OURS if whole else ():
        remove(folder / name)
    for path in place.iterdir():
        os.replace(path, folder / path.name)
    place.rmdir()


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
