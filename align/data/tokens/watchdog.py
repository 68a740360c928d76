"""Watchdog process of renderings: kills a run that one rendering of a chat template keeps busy.

A signal's handler runs between two steps of Python, in the main thread. It cannot stop a template
that is inside one long C call, and none of a stream's thread. Such a call keeps the interpreter's
lock as well, so that no thread of the run could stop it. This file is therefore run as a program
of its own, with the standard library only. It never imports the package.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import mmap
import os
import select
import signal
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator

HANG_SECONDS = 60.0
"""Wall time of one rendering after which the run is killed; ordinary ones take milliseconds."""

_SLOTS = 512  # threads that render at some time, of one process
_NUMBER = struct.Struct("=Q")
_TICKS = 20  # looks in `HANG_SECONDS`


class _Watch:
    """A watchdog and what it reads: a number for each thread, odd while the thread renders."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._free = itertools.count()
        self._local = threading.local()
        with tempfile.TemporaryFile() as file:
            file.truncate(_SLOTS * _NUMBER.size)
            self._numbers = mmap.mmap(file.fileno(), _SLOTS * _NUMBER.size)
            fd = str(file.fileno())
            command = [sys.executable, "-I", "-S", __file__, fd, str(self.pid), str(HANG_SECONDS)]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=[file.fileno()]
            )
        atexit.register(self.stop)

    def stop(self) -> None:
        """End the watchdog; a forked copy of the process leaves it alone."""
        if self.pid == os.getpid():
            self._process.kill()
            self._process.wait()

    @contextlib.contextmanager
    def rendering(self) -> Iterator[None]:
        if not hasattr(self._local, "at"):
            slot = next(self._free)
            if slot >= _SLOTS:
                raise OSError(f"more than {_SLOTS} threads render")
            self._local.at, self._local.number = slot * _NUMBER.size, 0
        local = self._local
        _NUMBER.pack_into(self._numbers, local.at, local.number + 1)
        try:
            yield
        finally:
            local.number += 2
            _NUMBER.pack_into(self._numbers, local.at, local.number)


_watch: _Watch | None = None
_starting = threading.Lock()


def watched() -> contextlib.AbstractContextManager[None]:
    """A context in which the process is killed once it has lasted `HANG_SECONDS`, in any thread.

    Raises:
        OSError: The watchdog cannot be started.
    """
    global _watch
    if _watch is None:
        with _starting:
            if _watch is None:
                _watch = _Watch()
    return _watch.rendering()


def _forget() -> None:
    """Leave the parent's watchdog to the parent, in a process just forked from it."""
    global _watch, _starting
    if _watch is not None:
        _watch._process.returncode = 0  # no child of this process: nothing to wait for
    _watch = None
    _starting = threading.Lock()  # another thread of the parent may have held it


os.register_at_fork(after_in_child=_forget)


# ---------------------------------------------------------------- the program


def main(fd: int, parent: int, seconds: float) -> None:
    """Kill ``parent`` when a number stays odd and the same for ``seconds``; end when it ends.

    Looks are counted, not time: while the machine sleeps or the run is stopped (Ctrl-Z), there are
    none.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the run decides what they mean, and ends this
    numbers = mmap.mmap(fd, _SLOTS * _NUMBER.size, prot=mmap.PROT_READ)
    before: list[int] = []
    looks = [0] * _SLOTS
    while os.getppid() == parent:
        if select.select([0], [], [], seconds / _TICKS)[0]:
            return  # nothing is ever written there: the run has ended
        now = [n for (n,) in _NUMBER.iter_unpack(numbers)]
        for k, number in enumerate(now):
            same = bool(before) and number % 2 == 1 and number == before[k]
            looks[k] = looks[k] + 1 if same else 0
        if max(looks) >= _TICKS and os.getppid() == parent:
            line = (
                f"align: the run is ended: its chat template has rendered one conversation for "
                f"more than {seconds:g} s; look at chat_template.jinja beside the tokenizer, and "
                f"write or take another\n"
            )
            with contextlib.suppress(OSError):
                os.write(2, line.encode())
            os.kill(parent, signal.SIGKILL)
            return
        before = now


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
