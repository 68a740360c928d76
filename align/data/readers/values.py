"""Values of rows in memory as Python values, and as lines of JSON that say all of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

_MICROSECOND = timedelta(microseconds=1)
_TAGGED: dict[type, tuple[Callable[[Any], str], Callable[[str], Any]]] = {
    bytes: (bytes.hex, bytes.fromhex),
    datetime: (datetime.isoformat, datetime.fromisoformat),
    date: (date.isoformat, date.fromisoformat),
    time: (time.isoformat, time.fromisoformat),
    timedelta: (lambda v: str(v // _MICROSECOND), lambda v: timedelta(microseconds=int(v))),
    Decimal: (str, Decimal),
}
"""Kinds of values that JSON lacks -> how they are written and read."""
_TAG = "\0"
_EXACT = {str, int, float, bool, type(None)}
_PLAIN = (str, int, float, *_TAGGED)


class NotPlainError(Exception):
    """A value that is neither text, a number, a date, nor a list or mapping of these."""


def plain(value: Any) -> Any:
    """The value with lists for arrays, tensors and series, and numbers for NumPy's.

    Raises:
        NotPlainError: Its message says of what kind the value is.
    """
    if type(value) in _EXACT:
        return value
    if hasattr(value, "dtype") and hasattr(value, "tolist"):
        dates = getattr(value.dtype, "kind", "") == "M"  # as text: they may be finer than Python's
        listed = (value.astype(str) if dates else value).tolist()
        if hasattr(listed, "dtype"):  # a number that Python has not
            raise NotPlainError(f"is a {type(value).__name__}")
        return plain(listed)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise NotPlainError(f"has a key that is a {type(key).__name__}, not text")
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    is_no_time = isinstance(value, date | timedelta) and value != value  # pandas' NaT
    if isinstance(value, _PLAIN) and not is_no_time:
        return value
    raise NotPlainError(f"is a {type(value).__name__}")


def to_line(value: Any) -> bytes:
    """One line of JSON that `from_line` reads back as an equal value."""
    return json.dumps(value, default=_tagged).encode() + b"\n"


def _tagged(value: Any) -> dict[str, list[str]]:
    for kind, (write, _) in _TAGGED.items():
        if isinstance(value, kind):
            return {_TAG: [kind.__name__, write(value)]}
    raise TypeError(f"is a {type(value).__name__}")


def from_line(line: bytes) -> Any:
    return json.loads(line, object_hook=_untagged)


_READ = {kind.__name__: read for kind, (_, read) in _TAGGED.items()}


def _untagged(value: dict[str, Any]) -> Any:
    if value.keys() != {_TAG}:
        return value
    kind, text = value[_TAG]
    return _READ[kind](text)
