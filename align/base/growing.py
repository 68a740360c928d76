"""Append to a run's JSONL files, and restore them to a checkpoint's state.

A checkpoint records the length of each file and the hash of its bytes. A resumed run checks from
them that a file is unchanged up to there, and cuts off the rows of steps that it will repeat.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.base.files import fsync, writing
from align.base.hashing import sha256_of
from align.types import AlignError

Marks = Mapping[str, Any]
"""``{"sizes": {name: bytes}, "sha256": {name: hash}}``; old checkpoints have no hashes."""


class GrowingFiles:
    """The files ``names`` of one folder, written by this process alone."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self._folder, self._names = folder, names
        # name -> (bytes so far, their running hash)
        self._so_far: dict[str, tuple[int, Any]] = {}

    def append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows to one of the files."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        data = text.encode("utf-8", "backslashreplace")
        size, digest = self._state(name)
        path = self._folder / name
        with writing(path, needs=len(data)), path.open("ab") as file:
            file.write(data)
        digest.update(data)
        self._so_far[name] = size + len(data), digest

    def marks(self) -> dict[str, Any]:
        """Return sizes and hashes for a checkpoint, after forcing the files to disk."""
        there = [name for name in self._names if (self._folder / name).is_file()]
        for name in there:
            with writing(self._folder / name):
                fsync(self._folder / name)
        states = {name: self._state(name) for name in there}
        return {
            "sizes": {name: size for name, (size, _) in states.items()},
            "sha256": {name: digest.hexdigest() for name, (_, digest) in states.items()},
        }

    def require(self, marks: Marks, checkpoint: Path) -> None:
        """Refuse to resume if a file lacks rows from before the checkpoint, or has changed.

        Raises:
            AlignError: One line with the file, the problem, and the remedy.
        """
        for name, size in (marks.get("sizes") or {}).items():
            path = self._folder / name
            found = path.stat().st_size if path.is_file() else 0
            if found < size:
                wrong = f"has {found} bytes, and {checkpoint.name} was saved when it had {size}"
                self._refuse(path, wrong if path.exists() else "is missing", checkpoint)
            digest = sha256_of(path, size) if size else hashlib.sha256()
            if (marks.get("sha256") or {}).get(name, digest.hexdigest()) != digest.hexdigest():
                wrong = f"its first {size} bytes have changed since {checkpoint.name} was saved"
                self._refuse(path, wrong, checkpoint)

    def _refuse(self, path: Path, wrong: str, checkpoint: Path) -> None:
        raise AlignError(
            f"resume: {path}: {wrong}; restore it, or remove {checkpoint} to resume from an older "
            "checkpoint, or start anew with overwrite=true"
        )

    def cut_back(self, marks: Marks) -> None:
        """Drop rows of steps that a resumed run will repeat, and a row cut short by a crash."""
        sizes = marks.get("sizes") or {}
        for name in self._names:
            path = self._folder / name
            if path.is_file():
                with writing(path):
                    os.truncate(path, min(path.stat().st_size, sizes.get(name, 0)))
            self._so_far.pop(name, None)

    def _state(self, name: str) -> tuple[int, Any]:
        if name not in self._so_far:
            path = self._folder / name
            size = path.stat().st_size if path.is_file() else 0
            self._so_far[name] = size, sha256_of(path, size) if size else hashlib.sha256()
        return self._so_far[name]
