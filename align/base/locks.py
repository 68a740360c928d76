"""Locks on folders that the operating system holds for a process's life (``flock``).

A lock goes with its process, however that ends: no clock and no process number is compared, and a
killed run leaves none behind. The file ``.running`` in the folder is what is locked; its content
says who holds it, for a line to the user. Where a file system has no locks (some network ones, and
Windows) the content alone has to do: a process of another machine counts as running then until the
file is removed.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from align.types import AlignError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NAME = ".running"
"""The file that is locked."""

PATIENCE = 0.5
"""Seconds that a lock is waited for: to ask whether it is held takes it for a moment."""

_held: dict[Path, int] = {}
"""Folder -> descriptor of the file that this process has locked."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock, and whether the file system keeps it."""

    host: str
    process: int
    locked: bool = True

    def __str__(self) -> str:
        there = f" on {self.host}" if self.host != platform.node() else ""
        return f"process {self.process}{there}" if self.process else "another process"

    def may_be_alive(self) -> bool:
        return self.host != platform.node() or psutil.pid_exists(self.process)


def take(folder: Path) -> Holder | None:
    """Hold the folder's lock until `release` or the end of this process.

    Returns:
        Who else holds it, or None where it is held by this process now.
    """
    if holds(folder):
        return None
    path, until = folder / NAME, time.monotonic() + PATIENCE
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        got = _lock(handle, exclusive=True)
        if got is False:
            os.close(handle)
            if time.monotonic() < until:
                time.sleep(0.02)
                continue
            return _recorded(path) or Holder(platform.node(), 0)
        if _is_at(handle, path):  # else its holder removed it between open and lock
            break
        os.close(handle)
    recorded = _recorded(path)
    if recorded is not None and not recorded.locked and recorded.may_be_alive():
        os.close(handle)
        return recorded
    record = {"host": platform.node(), "process": os.getpid(), "locked": got is True}
    os.ftruncate(handle, 0)
    os.pwrite(handle, (json.dumps(record) + "\n").encode(), 0)
    _held[folder.resolve()] = handle
    return None


def release(folder: Path) -> None:
    """Give the lock back, if this process holds it."""
    handle = _held.pop(folder.resolve(), None)
    if handle is not None:
        with suppress(OSError):
            if _is_at(handle, folder / NAME):
                (folder / NAME).unlink()
        os.close(handle)


def holds(folder: Path) -> bool:
    """Whether this process holds the folder's lock, and the folder is still the same one."""
    handle = _held.get(folder.resolve())
    return handle is not None and _is_at(handle, folder / NAME)


def holder_of(folder: Path) -> Holder | None:
    """Who holds the folder's lock now; changes nothing, and works in a folder that is read-only."""
    if holds(folder):
        return Holder(platform.node(), os.getpid())
    path = folder / NAME
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        return None
    try:
        got, recorded = _lock(handle, exclusive=False), _recorded(path)
    finally:
        os.close(handle)
    if got is False:
        return recorded or Holder(platform.node(), 0)
    by_record = recorded is not None and not recorded.locked and recorded.may_be_alive()
    return recorded if by_record else None


@contextmanager
def held(folder: Path, what: str) -> Iterator[None]:
    """Hold the lock of a folder that several runs are made in; ``what`` names it in the refusal."""
    folder.mkdir(parents=True, exist_ok=True)
    mine = holds(folder)
    other = take(folder)
    if other is not None:
        raise AlignError(f"{what}: {folder}: {refusal(folder, other)}")
    try:
        yield
    finally:
        if not mine:
            release(folder)


@contextmanager
def waiting_for(folder: Path) -> Iterator[None]:
    """Be alone among those who ask for the same, for a moment; nothing where there are no locks."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def refusal(folder: Path, holder: Holder) -> str:
    others = "wait for it, or name another output_dir"
    if not holder.locked:
        others = f"wait for it, name another output_dir, or remove {folder / NAME} if it has ended"
    return f"{holder} is running in it; {others}"


def _lock(handle: int, *, exclusive: bool) -> bool | None:
    """Whether the lock was taken; None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # ENOLCK, ENOSYS, EOPNOTSUPP: a file system without locks
        return None
    return True


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except OSError:
        return False


def _recorded(path: Path) -> Holder | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Holder(str(found["host"]), int(found["process"]), bool(found["locked"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # no record, or one of an older align


def _let_go() -> None:
    """Close a forked child's copies: they would hold the locks of a parent that has died."""
    for handle in _held.values():
        with suppress(OSError):
            os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
