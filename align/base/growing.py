"""JSONL files of a run's folder that rows are added to, and what a checkpoint says of them.

A checkpoint keeps the length of each file and the hash of its bytes. A run that goes on finds out
from them whether a file is still what it was, and cuts off the rows of steps that it will do again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.base.checksums import sha256_of
from align.base.files import fsync, writing
from align.types import AlignError

Marks = Mapping[str, Any]
"""``{"sizes": {name: bytes}, "sha256": {name: hash of them}}``; an older one has no hashes."""


class GrowingFiles:
    """The files ``names`` of one folder, of which this process alone writes."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self._folder, self._names = folder, names
        # name -> (bytes so far, their running hash)
        self._so_far: dict[str, tuple[int, Any]] = {}

    def append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows at the end of one of the files."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        data = text.encode("utf-8", "backslashreplace")
        size, digest = self._state(name)
        path = self._folder / name
        with writing(path, needs=len(data)), path.open("ab") as file:
            file.write(data)
        digest.update(data)
        self._so_far[name] = size + len(data), digest

    def marks(self) -> dict[str, Any]:
        """Sizes and sums for a checkpoint to keep, with the files' bytes on disk before it."""
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
        """Refuse to go on where a file lacks rows, or has other ones, from before a checkpoint.

        Raises:
            AlignError: With the file, what is wrong with it, and what can be done.
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
            f"resume: {path}: {wrong}; restore it, or remove {checkpoint} to go on from an older "
            "checkpoint, or start anew with overwrite=true"
        )

    def cut_back(self, marks: Marks) -> None:
        """Drop the rows of steps that a resumed run will do again, and what a crash cut short."""
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
