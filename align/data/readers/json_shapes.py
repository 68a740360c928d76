"""Shapes of a JSON file that is not one object on each line, told by its first value."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from align.data.readers.rows import MAX_CHARS
from align.types import AlignError

WRAPPERS = ("data", "rows", "examples", "train", "items", "samples", "instances", "records")
"""Names under which somebody puts all rows of a JSON file."""
LISTS = ("responses", "references", "ranking", "models", "summaries", "history", "tags")
"""Columns that hold a list of texts in one row."""
TEXTS = {"prompt", "messages", "text", "instruction", "chosen", "conversations", "completion"}
"""Columns of which a row has one at least."""
RECORDS = 'one object on each line (pandas: to_json(path, orient="records", lines=True))'


def refuse_shape(stream: IO[bytes], path: Path, *, listed: bool) -> None:
    """Raise an ``AlignError`` that says what the file is and how to write it, if it is not lines.

    Args:
        listed: The file is called ``.json``.
    """
    first, over_lines, alone = _first_value(stream)
    stream.seek(0)
    if (over_lines and isinstance(first, list)) or _holds_rows(first):
        raise AlignError(f"{path}: is one JSON list, not an object a line; call it .json")
    if not isinstance(first, dict):
        return
    wrapper = next((name for name in WRAPPERS if _holds_rows(first.get(name))), None)
    if alone and wrapper and (listed or over_lines):
        raise AlignError(
            f"{path}: is one object, whose {wrapper!r} holds the rows; save that list as the file"
        )
    shape = _shape(first) if alone else ""
    if shape:
        raise AlignError(f"{path}: is one object with {shape}; write {RECORDS}")
    if over_lines:
        raise AlignError(f"{path}: an object goes over several lines; write {RECORDS}")


def _shape(value: Mapping[str, Any]) -> str:
    """Tell how an object holds many rows, if it does: what pandas' ``to_json`` calls its orient."""
    inner = list(value.values())
    if "columns" in value and _all(value.get("data"), list):
        return "its rows as lists apart from the columns' names"
    if _are_columns(value):
        return "a list for each column (column-oriented)"
    if not inner or not all(isinstance(v, dict) and v for v in inner):
        return ""
    if all(str(key).isdecimal() for key in value):
        return "a row under each of its keys"
    same_keys = all(v.keys() == inner[0].keys() for v in inner)
    if same_keys and all(str(key).isdecimal() for key in inner[0]):
        return "an object of row numbers for each column (column-oriented, as pandas' default)"
    if same_keys and TEXTS & inner[0].keys():
        return "a row under each of its keys"
    return ""


def _are_columns(value: Mapping[str, Any]) -> bool:
    """Lists of one length, of which at least one is a column of texts or of conversations.

    A row may hold lists too: of turns, or under one of `LISTS`.
    """
    lists = list(value.values())
    if not _all(lists, list) or len({len(v) for v in lists}) != 1:
        return False
    if any(_is_turn(item) for column in lists for item in column):
        return False
    return any(
        name not in LISTS and (_all(column, str) or _all(column, list))
        for name, column in value.items()
    )


def _is_turn(item: Any) -> bool:
    return isinstance(item, dict) and bool({"role", "from"} & item.keys())


def _all(value: Any, kind: type) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, kind) for v in value)


def _holds_rows(value: Any) -> bool:
    return _all(value, dict)


def _first_value(stream: IO[bytes]) -> tuple[Any, bool, bool]:
    """(the first value, whether it goes over several lines, whether nothing follows it).

    The value is None where it is broken, or longer than a row may be: the reader of lines says so.
    """
    raw = stream.readline(MAX_CHARS)
    while raw and not raw.removeprefix(b"\xef\xbb\xbf").strip():
        raw = stream.readline(MAX_CHARS)
    if len(raw) == MAX_CHARS and raw[-1:] != b"\n":
        return _by_its_beginning(raw[:1000].decode("utf-8-sig", "replace")), False, True
    try:
        alone = not stream.readline(MAX_CHARS).strip()
        return json.loads(raw.decode("utf-8-sig")), False, alone
    except (ValueError, RecursionError):
        pass
    # a line that is no value alone may be the beginning of one
    stream.seek(0)
    text = stream.read(MAX_CHARS).decode("utf-8-sig", "replace").lstrip()
    try:
        # not strict: a text with a line break in it, which JSON writes as \n
        value, end = json.JSONDecoder(strict=False).raw_decode(text)
    except (ValueError, RecursionError):
        opening = text.split("\n", 1)[0].strip()
        shapes: dict[str, Any] = {"{": {}, "[": [], "[{": []}
        return shapes.get(opening if len(opening) == 1 else opening[:2]), True, False
    return value, "\n" in text[:end], not text[end:].strip()


def _by_its_beginning(text: str) -> Any:
    """A small value of the shape that a long line begins with; None for a row."""
    name = r'\s*"([^"\\]*)"\s*:\s*'
    found = re.match(rf'\{{{name}(?:(\[\s*["\[])|(\[\s*\{{)|\{{{name})', text)
    if not found:
        return [{}] if re.match(r"\[\s*\{", text) else None
    key, texts, objects, inner = found.groups()
    if texts:
        return {key: [""]}
    if objects:
        return {key: [{}]} if key in WRAPPERS else None
    return {key: {inner: ""}} if inner.isdecimal() or key.isdecimal() else None
