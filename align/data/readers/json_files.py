"""JSON files -> rows: one object on each line, or one list of objects, read one at a time.

Other shapes (objects over several lines, a list for each column, rows inside an object) are told
apart by the first value of the file and refused: what is meant is a guess.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

from align.base.console import reason_in_line
from align.base.files import Unreadable
from align.data.readers.json_shapes import refuse_shape
from align.data.readers.rows import (
    MAX_CHARS,
    BadRow,
    Row,
    not_utf8,
    object_row,
    too_long,
)
from align.types import AlignError

PIECE = 1 << 16
"""Bytes at a time of a list, or of a line that is skipped."""
LIMIT = 4 * MAX_CHARS
"""Bytes of a line that is decoded: UTF-8 takes four a character at most."""
MEND = "mend the line"
SPACE = re.compile(r"\s+")


def read_lines(stream: IO[bytes], path: Path, *, listed: bool = False) -> Iterator[Row | BadRow]:
    """Rows of a file with one JSON object on each line; blank lines are no rows.

    Args:
        listed: The file is called ``.json``, which may hold one object that is no row.
    """
    refuse_shape(stream, path, listed=listed)
    decoder = _Decoder()
    for number, raw in enumerate(_lines(stream), start=1):
        where = f"{path}:{number}"
        if raw is None:
            yield too_long(where)
            continue
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            if len(line) > MAX_CHARS:
                yield too_long(where)
            elif line.strip():
                # without its end, which json would blame where a row breaks off inside a string
                value = decoder.decode(line.rstrip("\r\n"))
                yield decoder.key_twice(where) or object_row(value, where)
        except UnicodeDecodeError as error:
            yield not_utf8(where, f"byte 0x{raw[error.start]:02x} at column {error.start + 1}")
        except json.JSONDecodeError as error:
            yield BadRow(where, "row", "malformed JSON", f"{_at(error)}: {_remedy(line)}")
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, nesting
            yield BadRow(where, "row", "malformed JSON", f"{reason_in_line(error)}: {MEND}")


class _Decoder(json.JSONDecoder):
    """Notes the keys that an object has twice: of their values, json keeps the last alone."""

    def __init__(self) -> None:
        self.twice: list[str] = []
        super().__init__(object_pairs_hook=self._object)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            names = [name for name, _ in pairs]
            self.twice.append(next(name for name in names if names.count(name) > 1))
        return values

    def key_twice(self, where: str) -> BadRow | None:
        """The value decoded last as a bad row, if an object of it has a key twice."""
        if not self.twice:
            return None
        name, self.twice = self.twice[0], []
        return BadRow(where, "row", f"has the key {name!r} twice", "rename or remove one of them")


def _lines(stream: IO[bytes]) -> Iterator[bytes | None]:
    """Lines with their ends; None for one that is longer than `LIMIT`, of which nothing is kept."""
    for line in iter(partial(stream.readline, LIMIT + 1), b""):
        if len(line) <= LIMIT:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(PIECE)
        yield None


def _remedy(line: str) -> str:
    if re.match(r"\s*\{\s*'", line):
        return "it is written as Python prints an object; write it with json.dumps"
    return MEND


def read_json(stream: IO[bytes], path: Path) -> Iterator[Row | BadRow]:
    """Rows of a JSON list of objects; a file that holds one object a line is read as such."""
    is_list = _first_byte(stream) == b"["
    stream.seek(0)
    if is_list:
        yield from _read_list(_Text(stream, path))
    else:
        yield from read_lines(stream, path, listed=True)


def _first_byte(stream: IO[bytes]) -> bytes:
    """The first that is neither a byte order mark nor white space, if any."""
    text = stream.read(3).removeprefix(codecs.BOM_UTF8).lstrip()
    while not text:
        block = stream.read(PIECE)
        if not block:
            break
        text = block.lstrip()
    return text[:1]


# ---------------------------------------------------------------- one list, item by item


class _Text:
    """A file's text, of which a piece is held; what was gone through is forgotten with it.

    ``at`` is the place in ``rest`` where it goes on: cutting at every row would copy the piece as
    often. ``line`` and ``column`` are those of this place, from 1.
    """

    def __init__(self, stream: IO[bytes], path: Path) -> None:
        self.path = path
        self.rest, self.at = "", 0
        self.line, self.column = 1, 1
        self.values = _Decoder()
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()

    def more(self) -> bool:
        """Read on; False at the end of the file."""
        self.rest, self.at = self.rest[self.at :], 0
        raw = self._stream.read(max(PIECE, len(self.rest)))  # twice as much each time
        try:
            self.rest += self._decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            bad = error.object
            line = self.line + self.rest.count("\n") + bad.count(b"\n", 0, error.start)
            byte = f"0x{bad[error.start]:02x}" if error.start < len(bad) else "the last"
            raise AlignError(
                f"{self.path}:{line}: not UTF-8 (byte {byte}); save it as UTF-8"
            ) from error
        return bool(raw)

    def skip(self, count: int) -> None:
        gone = self.at, self.at + count
        newlines = self.rest.count("\n", *gone)
        self.line += newlines
        self.column = gone[1] - self.rest.rfind("\n", *gone) if newlines else self.column + count
        self.at = gone[1]

    def next_sign(self) -> str:
        """The next character that is no white space, "" at the end; it stays there."""
        while True:
            space = SPACE.match(self.rest, self.at)
            self.skip(space.end() - self.at if space else 0)
            if self.at < len(self.rest) or not self.more():
                return self.rest[self.at : self.at + 1]

    def error(self, message: str, position: int = 0) -> AlignError:
        self.skip(position)
        return AlignError(
            f"{self.path}:{self.line}: malformed JSON: {message} at column {self.column}; {MEND} "
            "(what follows in a list cannot be told apart, so on_bad_row cannot skip it)"
        )


def _read_list(text: _Text) -> Iterator[Row | BadRow]:
    text.next_sign()
    text.skip(1)  # [
    number = 0
    if text.next_sign() == "]":
        text.skip(1)
    else:
        while True:
            number += 1
            where = f"{text.path}:row {number}"
            text.next_sign()
            found = _item(text)
            if found is None:
                _skip_item(text)
                yield too_long(where)
            else:
                row = _row_of_list(found[0], text.path, where, number)
                yield text.values.key_twice(where) or row
            sign = text.next_sign()
            if sign not in (",", "]"):
                raise text.error("Expecting ',' delimiter")
            text.skip(1)
            if sign == "]":
                break
    if text.next_sign():
        raise text.error("Extra data")


def _row_of_list(value: Any, path: Path, where: str, number: int) -> Row | BadRow:
    if number == 1 and isinstance(value, list | str):
        kind = "lists" if isinstance(value, list) else "texts"
        raise AlignError(
            f"{path}: is a list of {kind}, whose columns have no names; write a list of objects, "
            f'such as {{"prompt": ...}} (pandas: to_json(path, orient="records", lines=True))'
        )
    return object_row(value, where)


def _item(text: _Text) -> tuple[Any] | None:
    """The value at the text's beginning, which is gone through; None if it is too long."""
    while True:
        try:
            text.values.twice = []  # of a piece that broke off
            value, end = text.values.raw_decode(text.rest, text.at)
            size = end - text.at
            # a number may go on behind what was read
            if end < len(text.rest) or not text.more():
                if size > MAX_CHARS:
                    return None
                text.skip(size)
                return (value,)
        except json.JSONDecodeError as error:
            # else it is wrong whatever follows
            may_go_on = error.msg.startswith("Unterminated") or error.pos + 10 > len(text.rest)
            if may_go_on and len(text.rest) - text.at > MAX_CHARS:
                return None
            position = error.pos - text.at
            if not (may_go_on and text.more()):
                raise text.error(error.msg.removesuffix(" at"), position) from error
        except (ValueError, RecursionError) as error:
            raise AlignError(
                f"{text.path}: malformed JSON: {reason_in_line(error)}; mend it"
            ) from error


def _skip_item(text: _Text) -> None:
    """Go behind a value that is too long to keep, by its brackets and quotes."""
    signs = re.compile(r'["\[\]{}]')
    end_of_string = re.compile(r'(?:[^"\\]++|\\.)*+(")?', re.DOTALL)
    depth, quoted = 0, False
    while True:
        at = text.at
        while at < len(text.rest):
            if quoted:
                found = end_of_string.match(text.rest, at)
                assert found is not None  # it matches the empty string
                at = found.end()
                if found[1] is None:
                    break  # at a backslash, or at the end: what follows is not read yet
                quoted = False
            else:
                sign = signs.search(text.rest, at)
                if sign is None:
                    at = len(text.rest)
                    break
                at = sign.end()
                if sign[0] == '"':
                    quoted = True
                    continue
                depth += 1 if sign[0] in "[{" else -1
            if depth == 0 and not quoted:
                text.skip(at - text.at)
                return
        text.skip(at - text.at)
        if not text.more():
            raise Unreadable("it ends inside an item of its list")


def _at(error: json.JSONDecodeError) -> str:
    return f"{error.msg.removesuffix(' at')} at column {error.colno}"
