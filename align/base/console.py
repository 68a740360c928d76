"""Every line that this package prints, with nothing in it that a terminal would obey.

File names, model names, data and the text of errors come from elsewhere. An escape sequence in one
of them could recolour, retitle or overwrite the terminal, so it is shown as text instead.
"""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

LONGEST_ERROR = 600
"""Characters of an error line; the middle of a longer one is left out."""

# C0 and C1 control characters with ESC, CSI, BEL and DEL; Unicode's two line separators; the marks
# that turn the reading direction (an override can show a name backwards); lone surrogates, which
# no stream can encode. Newline and tab stay.
_OBEYED = (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, *range(0x202A, 0x202F))
_OBEYED += (*range(0x2066, 0x206A), *range(0xD800, 0xE000))
# \u001b rather than \x1b: what is JSON stays JSON
_SHOWN = {code: f"\\u{code:04x}" for code in _OBEYED if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """``text`` with control characters and bidirectional overrides shown as ``\\u001b``."""
    return text.translate(_SHOWN)


def one_line(text: str) -> str:
    """`printable` text with every run of white space, newlines included, as one space."""
    return printable(" ".join(text.split()))


def say(text: str) -> None:
    """Print a line, or several, on stdout at once."""
    _print(printable(text), sys.stdout)


def complain(line: str) -> None:
    """Print one line of bounded length on stderr behind the program's name."""
    _print(f"align: {bounded(one_line(line))}", sys.stderr)


def bounded(line: str, longest: int = LONGEST_ERROR) -> str:
    """A line of at most ``longest`` characters: its beginning and its end say the most."""
    if len(line) <= longest:
        return line
    left_out = len(line) - longest + 40
    head = (longest - 40) * 2 // 3
    return f"{line[:head]} [... {left_out} characters ...] {line[head + left_out :]}"


def say_traceback() -> None:
    """Print the traceback of the exception that is being handled, on stderr."""
    _print(printable(traceback.format_exc().rstrip()), sys.stderr)


def _print(text: str, stream: TextIO) -> None:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    with terminal_may_be_gone():
        # a terminal that knows no UTF-8 gets escapes, not an error
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)


@contextmanager
def terminal_may_be_gone() -> Iterator[None]:
    """Go on without a terminal that was closed: a run has to save then, not to die of a line."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise
