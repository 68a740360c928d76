"""Locks on folders: held for a process's life, and by no clock and no process number."""

from __future__ import annotations

import errno
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from align.base import locks
from align.run.files import close, status_of, write_manifest
from align.run.folder import Run
from align.types import AlignError

HOLD = """
import pathlib, subprocess, sys, time, os
from align.base import locks
assert locks.take(pathlib.Path(sys.argv[1])) is None
{more}
print("held", flush=True)
time.sleep(60)
"""


@contextmanager
def holder(folder: Path, more: str = "") -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(more=more), str(folder)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("held")
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_lock_ends_with_its_process_however_that_ends(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        found = locks.holder_of(tmp_path)
        assert found == locks.Holder(platform.node(), process.pid)
        assert locks.take(tmp_path) == found
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (tmp_path / ".running").exists()
        assert locks.holder_of(tmp_path) is None
        assert locks.take(tmp_path) is None
    locks.release(tmp_path)
    assert not (tmp_path / ".running").exists()


def test_no_clock_and_no_number_is_compared(tmp_path: Path) -> None:
    """What the record says does not matter where the lock is held, or is not."""
    with holder(tmp_path):
        (tmp_path / ".running").write_text('["elsewhere", 1, 1.0]')
        assert locks.take(tmp_path) is not None
        (tmp_path / ".running").write_text("")
        assert str(locks.take(tmp_path)) == "another process"
    record = {"host": platform.node(), "process": os.getppid(), "locked": True}
    (tmp_path / ".running").write_text(json.dumps(record))
    assert locks.take(tmp_path) is None
    locks.release(tmp_path)


def test_a_forked_child_does_not_hold_the_lock_of_a_parent_that_died(tmp_path: Path) -> None:
    fork = (
        "ends = os.pipe()\nchild = os.fork()\n"
        "if child == 0: os.write(ends[1], b'.'); time.sleep(60)\n"
        "os.read(ends[0], 1)\nprint('held', child)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(more=fork), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    child = int(process.stdout.readline().split()[1])
    try:
        assert locks.holder_of(tmp_path) is not None
        process.kill()
        process.wait()
        os.kill(child, 0)  # it is alive
        assert locks.holder_of(tmp_path) is None
    finally:
        os.kill(child, signal.SIGKILL)
        process.stdout.close()


def test_asking_does_not_refuse_a_run_that_starts_meanwhile(tmp_path: Path) -> None:
    asking = (
        "locks.release(pathlib.Path(sys.argv[1]))\n"
        "handle = os.open(sys.argv[1] + '/.running', os.O_CREAT | os.O_RDONLY)\n"
        "import fcntl; fcntl.flock(handle, fcntl.LOCK_SH)\nprint('held', flush=True)\n"
        "time.sleep(0.2)\nos.close(handle)"
    )
    with holder(tmp_path, asking):
        assert locks.take(tmp_path) is None
    locks.release(tmp_path)


def test_a_folder_that_was_removed_and_made_again_is_taken_anew(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    assert locks.take(folder) is None
    (folder / ".running").unlink()
    assert not locks.holds(folder)
    assert locks.take(folder) is None
    assert locks.holds(folder)
    locks.release(folder)


def test_a_file_system_without_locks_goes_by_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks.fcntl, "flock", unsupported)
    assert locks.take(tmp_path) is None
    assert json.loads((tmp_path / ".running").read_text())["locked"] is False
    locks.release(tmp_path)
    elsewhere = {"host": "elsewhere", "process": 1, "locked": False}
    (tmp_path / ".running").write_text(json.dumps(elsewhere))
    found = locks.take(tmp_path)
    assert found is not None
    line = locks.refusal(tmp_path, found)
    assert "process 1 on elsewhere is running in it" in line
    assert f"or remove {tmp_path / '.running'} if it has ended" in line
    assert locks.holder_of(tmp_path) == found
    dead = {"host": platform.node(), "process": 2**22 + 1, "locked": False}
    (tmp_path / ".running").write_text(json.dumps(dead))
    assert locks.take(tmp_path) is None
    locks.release(tmp_path)


def test_a_run_and_a_dead_one_are_told_apart(tmp_path: Path) -> None:
    write_manifest(tmp_path, {"stage": "sft", "status": "running"})
    manifest = {"status": "running"}
    with holder(tmp_path):
        assert status_of(tmp_path, manifest) == "running"
    assert status_of(tmp_path, manifest) == "died"


def test_a_run_that_fails_gives_its_folder_back(tmp_path: Path) -> None:
    run = Run("sft", str(tmp_path), config_yaml="seed: 3\n", seed=3)
    run.begin()
    assert locks.holds(tmp_path)
    close(tmp_path, "failed", AlignError("no"))
    assert not locks.holds(tmp_path)
    assert json.loads((tmp_path / "manifest.json").read_text())["status"] == "failed"


def test_a_folder_of_several_runs_is_held_too(tmp_path: Path) -> None:
    with holder(tmp_path), pytest.raises(AlignError) as caught, locks.held(tmp_path, "sweep"):
        pass
    assert str(caught.value).startswith(f"sweep: {tmp_path}: process ")
    started = time.monotonic()
    with locks.held(tmp_path, "sweep"), locks.held(tmp_path, "sweep"):
        assert locks.holds(tmp_path)
    assert not locks.holds(tmp_path)
    assert time.monotonic() - started < locks.PATIENCE
