"""Print lines without anything that a terminal would interpret.

File names, model names, data and error texts come from elsewhere. An escape sequence in one of them
could recolour, retitle or overwrite the terminal, so it is shown as text instead.
"""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

LONGEST_ERROR = 600
"""Longest error line, in characters; the middle of a longer one is cut."""
LONGEST_REASON = 200
"""Longest message of another library inside such a line."""

# C0 and C1 control characters with ESC, CSI, BEL and DEL; Unicode's two line separators; marks of
# reading direction (an override can show a name backwards); lone surrogates, which no stream can
# encode. Newline and tab are kept.
_OBEYED = (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, *range(0x202A, 0x202F))
_OBEYED += (*range(0x2066, 0x206A), *range(0xD800, 0xE000))
# \u001b rather than \x1b, so that JSON stays valid
_SHOWN = {code: f"\\u{code:04x}" for code in _OBEYED if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    r"""Show control characters and bidirectional overrides as ``\\u001b``."""
    return text.translate(_SHOWN)


def one_line(text: str) -> str:
    """Make text `printable`, with every run of white space, newlines included, as one space."""
    return printable(" ".join(text.split()))


def reason_in_line(error: BaseException, longest: int = LONGEST_REASON) -> str:
    """Return an error's message as one line of bounded length, or its type if it has none."""
    return bounded(one_line(str(error)), longest) or type(error).__name__


def say(text: str) -> None:
    """Print one or several lines on stdout at once."""
    _print(printable(text), sys.stdout)


def complain(line: str) -> None:
    """Print one line of bounded length on stderr, after the program's name."""
    _print(f"align: {bounded(one_line(line))}", sys.stderr)


def bounded(line: str, longest: int = LONGEST_ERROR) -> str:
    """Shorten a line to ``longest`` characters; its beginning and end are kept."""
    if len(line) <= longest:
        return line
    left_out = len(line) - longest + 40
    head = (longest - 40) * 2 // 3
    return f"{line[:head]} [... {left_out} characters ...] {line[head + left_out :]}"


def say_traceback() -> None:
    """Print the traceback of the current exception on stderr."""
    _print(printable(traceback.format_exc().rstrip()), sys.stderr)


def _print(text: str, stream: TextIO) -> None:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    with terminal_may_be_gone():
        # a terminal without UTF-8 gets escapes, not an error
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)


@contextmanager
def terminal_may_be_gone() -> Iterator[None]:
    """Ignore a closed terminal: a run must save its state, not die of a printed line."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise
