"""Bounds on rendering a chat template, which is code that came with somebody else's model.

``transformers`` renders in Jinja's immutable sandbox, which keeps a template from files and from
Python, but not from looping for hours or from making a text of ten gigabytes. So each template
renders conversations made up for the purpose in a child process first, whose processor time and
memory the system bounds, and every later rendering has the same bounds in this process.
"""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from types import FrameType
from typing import Any

CPU_SECONDS = 2
"""Processor time of one rendering, and of all that a new template is tried on."""
MEMORY = 2**29
"""Bytes of address space that a rendering may take beyond what the process has."""
TEMPLATE_CHARACTERS = 1_000_000
OWN_CHARACTERS = 200_000
PER_CHARACTER = 20
"""A rendered conversation has at most ``OWN_CHARACTERS`` and this many for each of its turns'."""

_WALL_SECONDS = 60.0  # of the trial, on a machine that gives it no processor
_OUT_OF_MEMORY, _TOO_LONG = 81, 82

Turns = Sequence[Mapping[str, Any]]
Render = Callable[[Turns, bool], str]
"""Turns, and whether the assistant's next turn is opened -> the template's text."""


class Unbounded(Exception):
    """A rendering that went past a bound; the text says which."""


TIME = f"it takes more than {CPU_SECONDS} s of processor time"
SPACE = f"it takes more than {MEMORY >> 20} MiB of memory"
LENGTH = "it writes far more text than it is given"


def render_bounded(template: str, render: Render, turns: Turns, open_turn: bool) -> str:
    """Render turns with a template that has passed its trial.

    Raises:
        Unbounded: The template, or this rendering of it, goes past a bound.
    """
    problem = trial(template, render)
    if problem:
        raise Unbounded(problem)
    try:
        with _limited():
            text = render(turns, open_turn)
    except MemoryError as error:
        raise Unbounded(SPACE) from error
    if len(text) > _longest(turns):
        raise Unbounded(LENGTH)
    return text


def _longest(turns: Turns) -> int:
    return OWN_CHARACTERS + PER_CHARACTER * sum(len(str(v)) for t in turns for v in t.values())


# ---------------------------------------------------------------- the trial of a new template

_found: dict[str, str] = {}


def trial(template: str, render: Render) -> str:
    """What is wrong with a template's cost, or nothing; found once for each template."""
    if template not in _found:
        too_long = len(template) > TEMPLATE_CHARACTERS
        _found[template] = (
            f"it has more than {TEMPLATE_CHARACTERS:,} characters" if too_long else _tried(render)
        )
    return _found[template]


def _tried(render: Render) -> str:
    with warnings.catch_warnings():
        # threads of torch may run: the child renders, and touches none of what they hold
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        code = 1
        try:
            code = _render_trials(render)
        finally:
            os._exit(code)  # without the parent's exit handlers and unwritten output
    status = _wait(child)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        slow = number in (signal.SIGXCPU, signal.SIGKILL)
        return TIME if slow else f"it ends the process with signal {number}"
    return {_OUT_OF_MEMORY: SPACE, _TOO_LONG: LENGTH}.get(os.WEXITSTATUS(status), "")


def _wait(child: int) -> int:
    """Exit status of the child, killed after `_WALL_SECONDS`."""
    end, pause = time.monotonic() + _WALL_SECONDS, 0.001
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            return os.waitpid(child, 0)[1]
        time.sleep(pause)
        pause = min(2 * pause, 0.02)


def _render_trials(render: Render) -> int:
    """Exit code of the child."""
    for number in (signal.SIGXCPU, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # a run's own handlers save checkpoints
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    held = _virtual_memory()
    if held:
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
    for turns in _trial_conversations():
        for open_turn in (False, True):
            try:
                text = render(turns, open_turn)
            except MemoryError:
                return _OUT_OF_MEMORY
            except Exception:  # a template may refuse turns: real rows that it refuses say so
                continue
            if len(text) > _longest(turns):
                return _TOO_LONG
    return 0


def _trial_conversations() -> Iterator[list[dict[str, str]]]:
    user = {"role": "user", "content": "What is ice?"}
    assistant = {"role": "assistant", "content": "<think>\nEasy.\n</think>\n\nFrozen water."}
    system = {"role": "system", "content": "Be short."}
    yield [user]
    yield [user, assistant]
    yield [system, user, assistant, user]
    yield [user, assistant] * 12
    long = {"role": "user", "content": "What is ice, and what is snow? " * 200}
    yield [system, long, assistant, long]


_statm: tuple[int, int] = (0, -1)
"""A process and its open file of ``/proc/self/statm``, which a child would read its parent's in."""


def _virtual_memory() -> int:
    """Bytes of the process's address space; 0 where the system does not say."""
    global _statm
    try:
        if _statm[0] != os.getpid():
            _statm = (os.getpid(), os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC))
        return int(os.pread(_statm[1], 64, 0).split()[0]) * resource.getpagesize()
    except (OSError, ValueError):
        return 0


# ---------------------------------------------------------------- every later rendering


@contextmanager
def _limited() -> Iterator[None]:
    """Raise `Unbounded` in what takes more than `CPU_SECONDS`, MemoryError beyond `MEMORY`.

    Signals reach the main thread only, and other threads allocate while a model trains. So rows
    that a stream's own thread renders have the trial's bound alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    _install_stop()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    held = _virtual_memory()
    # processor time: none passes while the machine sleeps, or gives it to others
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
    if held and soft == resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, hard))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@cache
def _install_stop() -> None:
    """Once, because installing a handler takes a tenth of the time that a rendering takes."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Unbounded(TIME)

    signal.signal(signal.SIGVTALRM, stop)
