"""Replace folders atomically."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from align.base.files import fsync, move_into_place, reason_on_disk, writing
from align.types import AlignError


@contextmanager
def whole_folder(folder: Path, *, needs: int = 0) -> Iterator[Path]:
    """Yield a new folder that replaces ``folder`` once it is filled and on disk.

    All content of ``folder`` is then removed, so it must hold nothing of the user's: see
    `require_no_folder`. A link is followed.
    """
    place = Path(os.path.realpath(folder))
    partial = place.with_name(f"{place.name}.partial")
    old = place.with_name(f".{place.name}.old")
    with writing(folder, needs=needs):
        if old.exists() and not place.exists():  # a process was killed between the two renames
            move_into_place(old, place)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            for path in (*partial.rglob("*"), partial):
                fsync(path)
            replace_folder(partial, place, old)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def replace_folder(partial: Path, place: Path, old: Path) -> None:
    """Rename a finished folder into its place; restore the old one if that fails.

    Args:
        old: Temporary name of the old folder: a folder cannot be renamed onto another one.
    """
    if not os.path.lexists(place):
        move_into_place(partial, place)
        shutil.rmtree(old, ignore_errors=True)
        return
    shutil.rmtree(old, ignore_errors=True)
    try:
        move_into_place(place, old)
        move_into_place(partial, place)
    except BaseException as error:
        _put_back(partial, place, old, error)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _put_back(partial: Path, place: Path, old: Path, error: BaseException) -> None:
    if not os.path.lexists(old):
        return
    try:
        if os.path.lexists(place):  # the rename succeeded, but could not be forced to disk
            os.replace(place, partial)
        os.replace(old, place)
    except OSError as again:
        raise AlignError(
            f"{place}: cannot be written: {reason_on_disk(again)}; what was there before is in "
            f"{old}: rename it to {place.name}"
        ) from error


def require_no_folder(folder: Path) -> None:
    """Refuse a place with content, which would be removed."""
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise AlignError(f"{folder}: exists already and is no folder; name another one")
    if os.path.samefile(folder, os.curdir):
        raise AlignError(f"{folder}: is the folder that you are in; name a new one, such as model")
    if any(folder.iterdir()):
        raise AlignError(f"{folder}: exists already and is not empty; name a new folder")
