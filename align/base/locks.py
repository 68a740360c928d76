"""Locks on folders, held for the life of a process and taken through ``filelock``.

The operating system drops a lock when its process ends, however that ends, so no clock and no
process number is compared and a killed run leaves no lock behind. The locked file is ``.running``
in the folder; its content names the holder, for a line to the user. On a file system without locks
(some network ones) the content alone decides: a process of another machine counts as running until
the file is removed.
"""

from __future__ import annotations

import errno
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from align.types import AlignError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NAME = ".running"
"""The file that is locked."""

PATIENCE = 0.5
"""Seconds to wait for a lock: `holder_of` takes it for a moment."""

WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""Errors of a file system that has no locks."""


@dataclass(frozen=True)
class Holder:
    """Process that holds a lock, and whether the file system keeps the lock."""

    host: str
    process: int
    locked: bool = True

    def __str__(self) -> str:
        there = f" on {self.host}" if self.host != platform.node() else ""
        return f"process {self.process}{there}" if self.process else "another process"

    def may_be_alive(self) -> bool:
        return self.host != platform.node() or psutil.pid_exists(self.process)


_held: dict[Path, tuple[os.stat_result, FileLock | None]] = {}
"""Folder -> file locked by this process, and its lock (None if the file system has no locks)."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_held.clear)  # filelock closes the child's descriptors


def take(folder: Path) -> Holder | None:
    """Hold the folder's lock until `release` or the end of this process.

    Returns:
        The other process that holds it, or None where this process holds it now.
    """
    if holds(folder):
        return None
    release(folder)  # of a folder that was removed and made again
    path = folder / NAME
    recorded = _recorded(path)
    try:
        lock = _lock(path)
    except Timeout:
        return _recorded(path) or Holder(platform.node(), 0)
    if recorded is not None and not recorded.locked and recorded.may_be_alive():
        if lock is not None:
            lock.release()
        return recorded
    record = {"host": platform.node(), "process": os.getpid(), "locked": lock is not None}
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    _held[folder.resolve()] = path.stat(), lock
    return None


def release(folder: Path) -> None:
    """Release the lock, if this process holds it."""
    mine = holds(folder)
    _, lock = _held.pop(folder.resolve(), (None, None))
    if mine:
        with suppress(OSError):
            (folder / NAME).unlink()
    if lock is not None:
        lock.release()


def holds(folder: Path) -> bool:
    """Tell whether this process holds the folder's lock, and the folder was not replaced."""
    try:
        file, _ = _held[folder.resolve()]
        return os.path.samestat(file, (folder / NAME).stat())
    except (KeyError, OSError):
        return False


def holder_of(folder: Path) -> Holder | None:
    """Process that holds the folder's lock now.

    Changes nothing and works in a read-only folder: ``filelock`` would make the file, and write.
    """
    if holds(folder):
        return Holder(platform.node(), os.getpid())
    path = folder / NAME
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        return None
    try:
        free, recorded = _is_free(handle), _recorded(path)
    finally:
        os.close(handle)
    if free is False:
        return recorded or Holder(platform.node(), 0)
    by_record = recorded is not None and not recorded.locked and recorded.may_be_alive()
    return recorded if by_record else None


@contextmanager
def held(folder: Path, what: str) -> Iterator[None]:
    """Hold the lock of a folder with several runs; ``what`` names it in the refusal."""
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
    """Exclude other processes for a moment; no effect without locks."""
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


def _lock(path: Path) -> FileLock | None:
    """Lock a file; None if the file system has no locks.

    Raises:
        Timeout: Another process holds it.
    """
    if fcntl is None:  # a file locked on Windows cannot be read
        return None
    # a soft lock would outlive a killed process
    lock = FileLock(path, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire(timeout=PATIENCE, poll_interval=0.02)
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        return None
    return lock


def _is_free(handle: int) -> bool | None:
    """Tell whether the lock is free; None if the file system has no locks."""
    if fcntl is None:
        return None
    try:
        # shared: NFS gives an exclusive lock to a writer only
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _recorded(path: Path) -> Holder | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Holder(str(found["host"]), int(found["process"]), bool(found["locked"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # no record, or one of an older align
