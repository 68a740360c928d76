"""Files that are written whole or not at all, and a disk that cannot be written as one line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from align.types import AlignError


def reason(error: BaseException) -> str:
    """What went wrong, without the system's number for it."""
    name = getattr(error, "filename", None)
    said = str(getattr(error, "strerror", None) or error)
    return f"{name}: {said}" if name and name not in said else said


@contextmanager
def writing(path: Path, kept: str = "what was saved before is untouched") -> Iterator[None]:
    """A disk that is full, or gone, is one line about ``path``."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        said = getattr(error, "strerror", None) or error
        raise AlignError(
            f"{path}: cannot be written: {said}; {kept}: make room, then go on with resume=auto"
        ) from error


def write_whole(path: Path, text: str | Iterable[str]) -> None:
    """Replace a text file, in pieces if need be: a crash leaves the old text or the new one."""
    partial = path.with_suffix(".tmp")
    with writing(path):
        with partial.open("w", encoding="utf-8") as file:
            file.writelines([text] if isinstance(text, str) else text)
        fsync(partial)
        move_into_place(partial, path)


def move_into_place(partial: Path, place: Path) -> None:
    """Rename, and force the rename to disk."""
    os.replace(partial, place)
    fsync(place.parent)


def fsync(path: Path) -> None:
    """Force a file, or the names in a folder, to disk; a system that cannot is not asked."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_logged(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file that a run has written; a last line that was cut short is left out."""
    if not path.is_file():
        return []
    # not splitlines: a text may hold U+2028, which is a line end to it
    *lines, _cut_short = path.read_text(encoding="utf-8").split("\n")
    try:
        return [json.loads(line) for line in lines if line.strip()]
    except ValueError as error:
        raise AlignError(f"{path}: not JSON: {error}") from error
