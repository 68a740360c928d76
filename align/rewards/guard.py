"""Run a user's function so that it ends in its result or in one line.

A function shares the process with the training run. It may end the process, change a default such
as torch's dtype, or close stdout; a run must not end as if it had finished because of that, nor
continue with another dtype. Changes are reverted and reported once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty, Queue
from typing import Any
from weakref import WeakSet

import torch

from align.base.console import one_line
from align.base.progress import warn
from align.types import AlignError

LONGEST_REASON = 300
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
# functions that end or replace the process at once, skipping every `finally`
EXITS = ("_exit", "abort", "execv", "execve")

_told: set[tuple[str, str]] = set()


def guarded(
    name: str, call: Callable[[], Any], timeout: float | None = None, *, rows: int = 0
) -> Any:
    """Return the result of ``call``; whatever it raises becomes an AlignError about ``name``.

    It runs in a thread of its own, so that a call that hangs ends the run with a line, and so that
    torch's per-thread state (gradients off, a default device) ends with it. A thread that hangs
    cannot be stopped: it ends with the process.

    Args:
        name: Start of a message, such as ``reward function my_rewards:brevity``.
        call: Takes no arguments.
        timeout: Seconds; None waits for ever.
        rows: Number of responses to score, for the message.

    Raises:
        AlignError: It raised, tried to end the process, or took more than ``timeout`` seconds.
    """
    done: Queue[tuple[Any, BaseException | None]] = Queue()

    def run() -> None:
        try:
            _here.process = os.getpid()
            done.put((call(), None))
        except BaseException as error:  # SystemExit must not end the run as if it had finished
            done.put((None, error))

    with put_right(name), _no_exit():
        thread = threading.Thread(target=run, daemon=True)
        _threads.add(thread)
        thread.start()
        try:
            result, error = done.get(timeout=timeout)
        except Empty:
            raise AlignError(
                f"{name}: no answer within {timeout:g} s for {rows} responses; mend it, or raise "
                "reward.timeout (seconds)"
            ) from None
    if error is not None:
        raise AlignError(
            f"{name}: raised {reason(error)}; mend the function, or run with --debug to see where"
        ) from error
    return result


@contextmanager
def put_right(name: str) -> Iterator[None]:
    """Revert what the code inside changed of the process; report each kind of change once."""
    before = {what: _read(read) for what, (read, _) in STATE.items()}
    streams = _Streams()
    try:
        yield
    finally:
        changed = ["stdout or stderr"] if streams.put_back() else []
        for what, (read, write) in STATE.items():
            if before[what] is not None and _read(read) != before[what]:
                write(before[what])
                changed.append(what)
        new = [what for what in changed if (name, what) not in _told]
        _told.update((name, what) for what in new)
        if new:
            warn(f"{name}: changed {', '.join(new)}; it was put back")


@contextmanager
def importing(name: str) -> Iterator[None]:
    """Guard code that runs when a module is imported, in this thread."""
    with put_right(name), _no_exit():
        yield


def reason(error: BaseException) -> str:
    """Describe an exception, kind and text, on one line of bounded length."""
    if isinstance(error, _Exited):
        return f"{error} (it would have ended the run)"
    try:
        text = str(error)
    except Exception:  # its class's own __str__ fails
        text = ""
    text = one_line(text)
    kind = type(error).__name__
    short = text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]}…"
    return f"{kind}: {short}" if short else kind


def _set_device(device: torch.device) -> None:
    torch.set_default_device(None if device.type == "cpu" else device)


def _handlers() -> dict[str, Any]:
    found = {name: signal.getsignal(getattr(signal, name, 0)) for name in SIGNALS if _has(name)}
    return {name: handler for name, handler in found.items() if handler is not None}


def _has(name: str) -> bool:
    return hasattr(signal, name)


def _set_handlers(handlers: dict[str, Any]) -> None:
    for name, handler in handlers.items():
        signal.signal(getattr(signal, name), handler)


class _Seed:
    """The state of torch's random numbers; two are equal unless manual_seed was called between."""

    def __init__(self) -> None:
        self.seed, self.state = torch.initial_seed(), torch.get_rng_state()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Seed) and self.seed == other.seed

    def put_back(self) -> None:
        torch.default_generator.manual_seed(self.seed)
        torch.set_rng_state(self.state)


STATE: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "the working directory": (os.getcwd, os.chdir),
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch's default device": (torch.get_default_device, _set_device),
    "torch's seed": (_Seed, _Seed.put_back),
    "torch's threads": (torch.get_num_threads, torch.set_num_threads),
    "whether torch records gradients": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch's deterministic mode": (
        torch.get_deterministic_debug_mode,
        torch.set_deterministic_debug_mode,
    ),
    "torch's precision of products": (
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
    ),
    "handlers of signals": (_handlers, _set_handlers),
}
"""Name of a change -> its getter and setter."""


def _read(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except OSError:  # the working directory is gone
        return None


class _Streams:
    """stdout and stderr with copies of their file descriptors."""

    def __init__(self) -> None:
        self.objects = {name: getattr(sys, name) for name in ("stdout", "stderr")}
        self.copies: dict[int, int] = {}
        for handle in (1, 2):
            try:
                self.copies[handle] = os.dup(handle)
            except OSError:  # closed before: not the function's doing
                continue

    def put_back(self) -> bool:
        """Revert both streams; return whether anything had changed."""
        changed = False
        for handle, copy in self.copies.items():
            if not _same_file(handle, copy):
                os.dup2(copy, handle)
                changed = True
            os.close(copy)
        for number, (name, stream) in enumerate(self.objects.items(), start=1):
            if getattr(stream, "closed", False):
                encoding = getattr(stream, "encoding", None) or "utf-8"
                stream = open(number, "w", encoding=encoding, buffering=1, closefd=False)  # noqa: SIM115
            if getattr(sys, name) is not stream:
                setattr(sys, name, stream)
                changed = True
        return changed


def _same_file(handle: int, copy: int) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.fstat(copy))
    except OSError:
        return False


class _Exited(BaseException):
    """A call of ``os._exit`` or one of its relatives that was intercepted."""


_inside: Counter[int] = Counter()
"""Process id -> its calls in progress; a forked child has none of its own."""
_lock = threading.Lock()
_threads: WeakSet[threading.Thread] = WeakSet()
"""Threads of functions; one that hangs outlives its call."""
_here = threading.local()
"""``process`` is set in a function's own thread, where exits stay intercepted: it may hang and
outlive its call, while the rest of the process may exit normally again."""


@contextmanager
def _no_exit() -> Iterator[None]:
    """Turn ``os._exit`` of this process into an exception; its children are not affected."""
    process = os.getpid()
    with _lock:
        _intercept()
        _inside[process] += 1
    try:
        yield
    finally:
        with _lock:
            _inside[process] -= 1


def _intercept() -> None:
    for name in EXITS:
        real = getattr(os, name)
        if not hasattr(real, "intercepted"):
            _set_exit(name, _replacement(name, real))


def put_back_exits() -> None:
    """Undo the interception, unless a function is running or hangs: it might still exit."""
    with _lock:
        if _inside[os.getpid()] > 0 or any(thread.is_alive() for thread in _threads):
            return
        for name in EXITS:
            _set_exit(name, getattr(getattr(os, name), "intercepted", getattr(os, name)))


def _set_exit(name: str, function: Any) -> None:
    for module in (os, sys.modules.get("posix")):
        if module is not None:
            setattr(module, name, function)


def _replacement(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def replaced(*arguments: Any, **named: Any) -> Any:
        process = os.getpid()
        if _inside[process] > 0 or getattr(_here, "process", None) == process:
            raise _Exited(f"os.{name}({', '.join(map(repr, arguments))})"[:LONGEST_REASON])
        return real(*arguments, **named)

    replaced.intercepted = real  # type: ignore[attr-defined]
    return replaced
