"""Read files through one guard, and write them atomically.

A file that cannot be read, or has the wrong content, is reported in one line with its name and the
reason. A written file appears complete or not at all; a full or failed disk is one line with the
bytes needed and free.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from align.types import AlignError

RESUME = "free some space, then resume with resume=auto"
AGAIN = "free some space, then run the command again"
UNTOUCHED = "what was there before is untouched"


class Unreadable(ValueError):
    """Reason why a file cannot be used, without its name."""


def load_text(path: Path) -> str:
    """Read a regular UTF-8 file; a byte-order mark is dropped.

    Raises:
        Unreadable: It is missing, a folder, a pipe or a device, forbidden, or not UTF-8.
    """
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise Unreadable(os.strerror(errno.EISDIR))
        if not stat.S_ISREG(mode):  # reading a pipe would wait for ever
            raise Unreadable("a pipe or a device, not a file")
        with open(path, "rb") as file:
            content = file.read()
    except FileNotFoundError as error:
        broken = os.path.islink(path)
        raise Unreadable("a link to a missing file" if broken else "no such file") from error
    except OSError as error:
        raise Unreadable(error.strerror or str(error)) from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = f"byte {error.start}: not UTF-8 ({error.reason})"
        raise Unreadable(f"{place}; save it as UTF-8") from error


def parse_object(text: str) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        Unreadable: The text is empty, is not JSON, or is another JSON value.
    """
    if not text.strip():
        raise Unreadable("empty")
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise Unreadable("JSON that is nested too deeply") from error
    except ValueError as error:
        raise Unreadable(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise Unreadable(f"wanted a JSON object {{...}}, got {_kind(value)}")
    return value


def load_json(path: Path) -> dict[str, Any]:
    """Load a file's JSON object; raises `Unreadable`."""
    return parse_object(load_text(path))


def load_yaml(path: Path) -> dict[str, Any]:
    """Load a file's YAML mapping; raises `Unreadable`."""
    try:
        value = yaml.safe_load(load_text(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}: " if mark else ""
        raise Unreadable(f"not YAML: {place}{getattr(error, 'problem', error)}") from error
    except RecursionError as error:
        raise Unreadable("YAML that is nested too deeply") from error
    except ValueError as error:  # an invalid date, a number of thousands of digits
        raise error if isinstance(error, Unreadable) else Unreadable(str(error)) from error
    if not isinstance(value, dict):
        raise Unreadable(f"wanted a mapping `key: value`, got {_kind(value)}")
    return value


def read_json(path: Path, remedy: str = "") -> dict[str, Any]:
    """Load a file's JSON object, or raise one line that names the file."""
    with reading(path, remedy):
        return load_json(path)


def read_yaml(path: Path, remedy: str = "") -> dict[str, Any]:
    """Load a file's YAML mapping, or raise one line that names the file."""
    with reading(path, remedy):
        return load_yaml(path)


@contextmanager
def reading(place: Path | str, remedy: str = "") -> Iterator[None]:
    """Turn errors over broken content into one line about ``place``.

    It wraps code that uses a file which may be damaged: a key is missing, or a list is where an
    object should be. Lines that are clear already pass.
    """
    try:
        yield
    except AlignError:
        raise
    except Unreadable as error:
        raise AlignError(f"{place}: cannot be read: {error}{_behind(remedy)}") from error
    except BROKEN as error:
        raise AlignError(
            f"{place}: cannot be read: {type(error).__name__}: {reason(error)}{_behind(remedy)}"
        ) from error


BROKEN = (
    OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError,
    RecursionError, yaml.YAMLError,
)  # fmt: skip
"""Errors raised by reading a damaged file, or by using its content."""


def reason(error: BaseException) -> str:
    """Return an error's message without the system's error number."""
    name = getattr(error, "filename", None)
    said = str(getattr(error, "strerror", None) or error)
    return f"{name}: {said}" if name and str(name) not in said else said


def read_logged(path: Path) -> list[dict[str, Any]]:
    """Read a JSONL file written by a run; a last line cut short is skipped."""
    if not os.path.lexists(path):
        return []
    rows = []
    with reading(path):
        # not splitlines, which also splits at U+2028
        *lines, _cut_short = load_text(path).split("\n")
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    rows.append(parse_object(line))
                except Unreadable as error:
                    raise AlignError(f"{path}:{number}: {error}") from error
    return rows


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read ``metrics.jsonl``: rows of a step and numbers."""
    rows = read_logged(path)
    for number, row in enumerate(rows, start=1):
        wrong = [name for name, value in row.items() if not _is_number(value)]
        if wrong or "step" not in row:
            name = wrong[0] if wrong else "step"
            found = _kind(row[name]) if name in row else "nothing"
            raise AlignError(f"{path}: row {number}: {name[:60]}: wanted a number, got {found}")
    return rows


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and float(value) is not None
    except OverflowError:  # an integer of hundreds of digits
        return False


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", type(None): "null", bool: "a boolean"}
    return names.get(type(value), "a number")


def _behind(remedy: str) -> str:
    return f"; {remedy}" if remedy else ""


@contextmanager
def writing(
    path: Path, kept: str = UNTOUCHED, *, again: str = RESUME, needs: int = 0
) -> Iterator[None]:
    """Turn a full or failed disk into one line about ``path``.

    Args:
        kept: Reassurance about existing data.
        again: How to continue.
        needs: Bytes to be written, if known.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise AlignError(
            f"{path}: cannot be written: {reason_on_disk(error)}{_room(path, error, needs)}; "
            f"{kept}: {again}"
        ) from error


def reason_on_disk(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def _room(path: Path, error: Exception, needs: int) -> str:
    """Return the bytes needed and free, if the disk or a quota is full."""
    full = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
    if getattr(error, "errno", None) not in full and "No space left" not in str(error):
        return ""
    found = free_in(Path(os.path.abspath(path)).parent)
    if found is None:
        return ""
    need = f"about {in_words(needs)} needed, " if needs else ""
    return f" ({need}{in_words(found[0])} free in {found[1]})"


def free_in(path: Path) -> tuple[int, Path] | None:
    """Return the free bytes where ``path`` is or would be, and the folder asked."""
    folder = next((p for p in (path, *path.parents) if p.is_dir()), None)
    with suppress(OSError):
        return (shutil.disk_usage(folder).free, folder) if folder else None
    return None


def in_words(size: float) -> str:
    """Format bytes in the largest unit that gives a number of at least 1."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def write_whole(
    path: Path, content: str | bytes | Iterable[str], *, new: bool = False, again: str = AGAIN
) -> None:
    """Replace a file atomically, in pieces if given: a crash leaves the old content or the new.

    A link is followed, and a special file (``/dev/stdout``) is written to directly.

    Args:
        new: Refuse to replace a file.
    """
    require_new(path, new)
    place = Path(os.path.realpath(path))
    pieces = [content] if isinstance(content, str | bytes) else content
    needs = len(content) if isinstance(content, str | bytes) else 0
    with writing(path, again=again, needs=needs):
        if place.exists() and not place.is_file():
            _write(place, pieces)
            return
        partial = place.with_name(f".{place.name[:200]}.{os.getpid()}.partial")
        try:
            _write(partial, pieces)
            if place.exists():
                shutil.copymode(place, partial)
            fsync(partial)
            require_new(path, new)  # another process may have written it meanwhile
            move_into_place(partial, place)
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


def _write(path: Path, pieces: Iterable[str | bytes]) -> None:
    with path.open("wb") as file:
        for piece in pieces:
            # a lone surrogate becomes \udXXX, as in JSON
            data = piece.encode("utf-8", "backslashreplace") if isinstance(piece, str) else piece
            file.write(data)


def require_new(path: Path, new: bool = True) -> None:
    if new and os.path.lexists(path) and (path.is_file() or not path.exists()):
        raise AlignError(f"{path}: exists already; name another file, or remove it")


def require_writable(path: Path, what: str = "", *, new: bool = False) -> None:
    """Refuse a file that cannot be written, before work is spent on its content.

    Args:
        what: The option that names it, for the line, such as ``--output``.
        new: Refuse an existing file.
    """
    named = f"{what} {path}".strip()
    require_new(path, new)
    parent = path.parent
    try:
        if path.is_dir():
            raise AlignError(f"{named}: is a folder; name a file in it")
        if path.exists() and not path.is_file():
            return
        if not parent.is_dir():
            wrong = "is a file" if parent.exists() else "does not exist; make it first"
            raise AlignError(f"{named}: the folder {parent} {wrong}")
        place = Path(os.path.realpath(path))
        handle, probe = tempfile.mkstemp(prefix=".align-", dir=place.parent)
        os.close(handle)
        os.unlink(probe)
    except OSError as error:
        raise AlignError(f"{named}: cannot be written: {reason_on_disk(error)}") from error


def move_into_place(partial: Path, place: Path) -> None:
    """Rename, and force the rename to disk."""
    os.replace(partial, place)
    fsync(place.parent)


def fsync(path: Path) -> None:
    """Force a file, or the names in a folder, to disk; Windows cannot sync folders."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
