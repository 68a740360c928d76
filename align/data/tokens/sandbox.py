"""Bounds on rendering a chat template, which is code that came with somebody else's model.

``transformers`` renders in Jinja's immutable sandbox, which keeps a template from files and from
Python, but not from looping for hours or from making a text of ten gigabytes. So each template
renders conversations made up for the purpose in a child process first, whose processor time and
memory the system bounds. Later renderings are bounded less firmly:

- in the main thread a signal's handler stops them between two steps of the template;
- in any thread, and inside one long call, `watchdog` kills the whole run after a minute;
- memory is bounded in the main thread only.
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
from types import FrameType
from typing import Any

from align.data.tokens.watchdog import watched

CPU_SECONDS = 2
"""Processor time of one rendering, and of all that a new template is tried on."""
MEMORY = 2**29
"""Bytes of address space that a rendering may take beyond what the process has."""
TEMPLATE_CHARACTERS = 1_000_000
OWN_CHARACTERS = 200_000
PER_CHARACTER = 20
"""A rendered conversation has at most ``OWN_CHARACTERS`` and this many for each of its turns'."""

_WALL_SECONDS = 60.0  # of the trial, on a machine that gives it no processor
_PASSED = "passed"

Turns = Sequence[Mapping[str, Any]]
Render = Callable[[Turns, bool], str]
"""Turns, and whether the assistant's next turn is opened -> the template's text."""


class Unbounded(Exception):
    """A rendering that went past a bound; the text says which."""


class Untried(Exception):
    """A template about whose cost nothing is known, by no fault of its own; the text says why."""


TIME = f"it takes more than {CPU_SECONDS} s of processor time"
SPACE = f"it takes more than {MEMORY >> 20} MiB of memory"
LENGTH = "it writes far more text than it is given"


def render_bounded(template: str, render: Render, turns: Turns, open_turn: bool) -> str:
    """Render turns with a template that has passed its trial.

    Raises:
        Unbounded: The template, or this rendering of it, goes past a bound.
        Untried: The processes that bound it cannot be started here.
    """
    problem = trial(template, render)
    if problem:
        raise Unbounded(problem)
    try:
        watch = watched()
    except OSError as error:
        raise Untried(str(error)) from error
    try:
        with watch, _limited():
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
    """Find what is wrong with a template's cost, once for each template; "" where nothing is.

    Raises:
        Untried: The child process cannot be started, or fails before it has rendered anything.
    """
    if template not in _found:
        too_long = len(template) > TEMPLATE_CHARACTERS
        _found[template] = (
            f"it has more than {TEMPLATE_CHARACTERS:,} characters" if too_long else _tried(render)
        )
    return _found[template]


def _tried(render: Render) -> str:
    try:
        reader, writer = os.pipe()
    except OSError as error:
        raise Untried(str(error)) from error
    try:
        status = _wait(_started(render, writer))
        os.set_blocking(reader, False)
        try:
            found = os.read(reader, 1000).decode()
        except BlockingIOError:  # the child has ended without a word
            found = ""
    finally:
        os.close(reader)
        os.close(writer)
    if found == _PASSED:
        return ""
    if found in (SPACE, LENGTH):
        return found
    if found:
        raise Untried(found)
    if status is None:
        return f"it ends the process that tries it, or {TIME.removeprefix('it ')}"
    if not os.WIFSIGNALED(status):
        raise Untried(f"the child process ended with exit status {os.WEXITSTATUS(status)}")
    number = os.WTERMSIG(status)
    slow = number in (signal.SIGXCPU, signal.SIGKILL)
    return TIME if slow else f"it ends the process with signal {number}"


def _started(render: Render, writer: int) -> int:
    """Process id of a child that writes `_PASSED`, or what is wrong, into the pipe."""
    try:
        with warnings.catch_warnings():
            # threads of torch may run: the child renders, and touches none of what they hold
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
    except OSError as error:
        raise Untried(str(error)) from error
    if child == 0:
        try:
            try:
                found = _render_trials(render)
            except BaseException as error:  # before the first rendering: nothing was tried
                found = f"{type(error).__name__}: {error}"[:200]
            os.write(writer, found.encode("utf-8", "replace"))
        finally:
            os._exit(0)  # without the parent's exit handlers and unwritten output
    return child


def _wait(child: int) -> int | None:
    """Exit status of the child, killed after `_WALL_SECONDS`; None where SIGCHLD is ignored."""
    end, pause = time.monotonic() + _WALL_SECONDS, 0.001
    while True:
        try:
            done, status = os.waitpid(child, os.WNOHANG)
            if not done and time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
                done, status = os.waitpid(child, 0)
        except ChildProcessError:  # some launchers ignore SIGCHLD: the system keeps no status
            return None
        if done:
            return status
        time.sleep(pause)
        pause = min(2 * pause, 0.02)


def _render_trials(render: Render) -> str:
    """Render all trials in the child: `_PASSED`, or the bound that was passed."""
    for number in (signal.SIGXCPU, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # a run's own handlers save checkpoints
    _lower(resource.RLIMIT_CPU, CPU_SECONDS, CPU_SECONDS + 1)
    _lower(resource.RLIMIT_CORE, 0, 0)
    held = _virtual_memory()
    if held:
        _lower(resource.RLIMIT_AS, held + MEMORY, held + MEMORY)
    for turns in _trial_conversations():
        for open_turn in (False, True):
            try:
                text = render(turns, open_turn)
            except MemoryError:
                return SPACE
            except Exception:  # a template may refuse turns: real rows that it refuses say so
                continue
            if len(text) > _longest(turns):
                return LENGTH
    return _PASSED


def _lower(kind: int, soft: int, hard: int) -> None:
    """Set a limit, or keep the present one where it is lower."""
    limits = zip((soft, hard), resource.getrlimit(kind), strict=True)
    lowest = [new if now == resource.RLIM_INFINITY else min(new, now) for new, now in limits]
    resource.setrlimit(kind, (lowest[0], lowest[1]))


def _trial_conversations() -> Iterator[list[dict[str, Any]]]:
    user = {"role": "user", "content": "What is ice?"}
    assistant = {"role": "assistant", "content": "<think>\nEasy.\n</think>\n\nFrozen water."}
    system = {"role": "system", "content": "Be short."}
    yield [user]
    yield [user, assistant]
    yield [system, user, assistant, user]
    yield [user, assistant] * 12
    long = {"role": "user", "content": "What is ice, and what is snow? " * 200}
    yield [system, long, assistant, long]
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    tool = {"name": "weather", "description": "The weather.", "parameters": parameters}
    yield [{**user, "tools": [{"type": "function", "function": tool}]}, assistant]


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

    Handlers of signals run in the main thread only, and other threads allocate while a model
    trains. So rows that a stream's own thread renders have the watchdog's bound alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    # installing a handler takes a tenth of the time that a rendering takes, so it stays
    if signal.getsignal(signal.SIGVTALRM) is not _stop:
        signal.signal(signal.SIGVTALRM, _stop)
    _started_at[0] = time.thread_time()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    held = _virtual_memory()
    # processor time: none passes while the machine sleeps, or gives it to others
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
    if held and soft == resource.RLIM_INFINITY:
        _lower(resource.RLIMIT_AS, held + MEMORY, hard)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


_started_at = [0.0]
"""Processor time of the main thread at which its present rendering began."""


def _stop(number: int, frame: FrameType | None) -> None:
    # the timer counts all threads of the process, and those of OpenMP may spin
    left = CPU_SECONDS - (time.thread_time() - _started_at[0])
    if left > 0.01:
        signal.setitimer(signal.ITIMER_VIRTUAL, left)
        return
    raise Unbounded(TIME)
