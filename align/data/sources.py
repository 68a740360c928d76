"""Files, hub data sets and objects in memory -> rows with their place. What they mean: ``formats``.

A row that cannot be read does not end the reading: it comes out as a ``BadRow``, so that the
caller may stop or skip; so does one that is too long (`rows.MAX_CHARS`), before it is decoded. A
file that cannot be read at all is an error.
"""

from __future__ import annotations

import csv
import gzip
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count, islice
from pathlib import Path
from typing import IO, Any, cast

from align.base.console import reason_in_line
from align.base.files import Unreadable
from align.base.hashing import sha256_of
from align.base.how_to_make import how_to_make
from align.base.hub import require_on_the_hub
from align.base.suggest import suggest_path
from align.config.sections import DataSource
from align.data.readers.arrow_files import read_arrow, read_parquet
from align.data.readers.csv_files import read_csv
from align.data.readers.json_files import read_json, read_lines
from align.data.readers.objects import hash_of, is_given, open_given, open_whole, read_given
from align.data.readers.rows import (
    BadRow,
    Row,
    numbered,
    too_long,
    unless_too_long,
)
from align.data.readers.splits import SUFFIXES, Choice, choose
from align.types import AlignError

__all__ = [
    "BadRow",
    "FilePart",
    "Row",
    "choice_of",
    "content_of",
    "file_sha256",
    "find_files",
    "find_parts",
    "hash_of_given",
    "name_of",
    "open_stream",
    "read_file",
    "read_set",
    "read_source",
    "stream_rows",
]


@dataclass(frozen=True)
class FilePart:
    """Rows ``start`` to ``stop`` of a file, bad ones counted; None = to its end."""

    path: Path
    start: int = 0
    stop: int | None = None

    def rows(self, *, done: int = 0) -> Iterator[Row | BadRow]:
        """Yield its rows, but for the first ``done`` of them."""
        return islice(read_file(self.path), self.start + done, self.stop)

    def overlaps(self, other: FilePart) -> bool:
        """Tell whether both have a row in common, if they are of one file."""
        ends = [part.stop for part in (self, other) if part.stop is not None]
        return max(self.start, other.start) < min(ends, default=float("inf"))


def read_source(source: DataSource) -> Iterator[Row | BadRow]:
    """All rows of a source, in the order of its files."""
    parts = find_parts(source)
    if not parts:
        yield from read_set(source)
    for part in parts:
        yield from part.rows()


def choice_of(source: DataSource) -> Choice | None:
    """Choose what a source reads of a local file or folder.

    None means that it is no file: a hub data set, or rows in memory.

    Raises:
        AlignError: There is no such file or folder, and it cannot be the name of a hub data set;
            or its split selects nothing.
    """
    if is_given(source):
        return None
    path = Path(source.path).expanduser()
    if path.is_file() and not path.name.endswith(SUFFIXES):
        raise _no_data_file(path)
    if path.is_dir() or path.is_file():
        return choose(source, path)
    is_hub_name = re.fullmatch(r"[\w.-]+/[\w.-]+", source.path) and not path.parent.is_dir()
    if is_hub_name and not path.name.endswith(SUFFIXES):
        return None
    advice = as_a_list(source.path) or _what_there_is(path)
    raise AlignError(f"{source.path}: no such file or folder; {advice}")


def as_a_list(path: str) -> str:
    """Say how to give several sources, where the path is several with commas between them."""
    paths = [part.strip() for part in path.split(",")]
    if len(paths) < 2 or not any(Path(part).expanduser().exists() for part in paths if part):
        return ""
    return f"several sources are a list: 'data=[{','.join(paths)}]'"


def _no_data_file(path: Path) -> AlignError:
    return AlignError(
        f"{path}: not a data file by its name; allowed: {', '.join(SUFFIXES)}; rename it"
    )


def find_files(source: DataSource) -> list[Path]:
    """The local files of a source that are read, each once; empty means that it has none.

    Raises:
        AlignError: As `choice_of`.
    """
    choice = choice_of(source)
    return [] if choice is None else choice.files


def find_parts(source: DataSource) -> list[FilePart]:
    """Parts of local files that a source reads, in order; empty means that it has none.

    Raises:
        AlignError: As `choice_of`; or a slice has no row.
    """
    choice = choice_of(source)
    parts: list[FilePart] = []
    for split, piece in () if choice is None else choice.parts:
        files = choice.splits[split] if choice else ()
        parts += _sliced(files, piece, source) if piece else [FilePart(file) for file in files]
    if choice is not None and not parts:
        raise AlignError(f"{source.path}: split={source.split} selects no row of it")
    return parts


def _sliced(files: Sequence[Path], piece: str, source: DataSource) -> list[FilePart]:
    """Rows that ``[a:b]`` selects of files that follow each other."""
    plain = re.fullmatch(r"\[(\d*):(\d*)\]", piece)
    if plain and len(files) == 1:  # no need to count its rows
        start, stop = int(plain[1] or 0), int(plain[2]) if plain[2] else None
        return [FilePart(files[0], start, stop)] if stop is None or start < stop else []
    from datasets import ReadInstruction

    counts = [_num_rows(file, file_sha256(file)) for file in files]
    try:
        (rows,) = ReadInstruction.from_spec(f"train{piece}").to_absolute({"train": sum(counts)})
    except (ValueError, AssertionError) as error:
        raise AlignError(
            f"{source.path}: split={source.split}: {reason_in_line(error)}; wanted a slice such as "
            "train[:100] or train[10%:20%]"
        ) from error
    parts, before = [], 0
    for file, num in zip(files, counts, strict=True):
        start, stop = max(rows.from_ - before, 0), min(rows.to - before, num)
        if start < stop:
            parts.append(FilePart(file, start, stop))
        before += num
    return parts


@lru_cache(maxsize=256)
def _num_rows(path: Path, _sha256: str) -> int:
    """Count rows once for each content: a file's time and size may stay where its content does not.

    The path says how the content is read.
    """
    return sum(1 for _ in read_file(path))


def read_file(path: Path) -> Iterator[Row | BadRow]:
    """Rows of one local file."""
    suffix = next((s for s in SUFFIXES if path.name.endswith(s)), None)
    if suffix is None:
        raise _no_data_file(path)
    kind = suffix.removesuffix(".gz")
    try:
        if kind in (".parquet", ".arrow"):
            rows = read_parquet(path) if kind == ".parquet" else read_arrow(path)
            yield from numbered(rows, str(path))
            return
        with _open(path) as stream:
            if stream.read(2) in (b"\xff\xfe", b"\xfe\xff"):
                raise AlignError(f"{path}: is UTF-16, not UTF-8; save it as UTF-8")
            stream.seek(0)
            if kind in (".csv", ".tsv"):
                yield from read_csv(stream, path, "," if kind == ".csv" else "\t")
            elif kind == ".json":
                yield from read_json(stream, path)
            else:
                yield from read_lines(stream, path)
    except (OSError, EOFError, csv.Error, zlib.error, Unreadable) as error:
        raise AlignError(
            f"{path}: cannot be read: {reason_in_line(error)}; fetch it again"
        ) from error


def name_of(source: DataSource) -> str:
    """Name of a source that has no local files, as reports show it."""
    return source.path[1:-1] if is_given(source) else f"{source.path}/{source.split}"


def hash_of_given(source: DataSource, *, streamed: bool = False) -> str | None:
    """Hash of rows in memory, by which a resumed run knows them; None for a hub data set.

    Rows of an unknown number are not gone through twice where they are ``streamed``.
    """
    if not is_given(source):
        return None
    rows = open_given(source) if streamed else open_whole(source)
    return None if streamed and not hasattr(rows, "__len__") else hash_of(rows, source)


def read_set(source: DataSource) -> Iterator[Row | BadRow]:
    """Rows of a data set that has no local files: from the hub, its cache, or memory."""
    if is_given(source):
        return read_given(open_whole(source), source)
    return numbered(map(unless_too_long, _load_hub(source)), name_of(source))


def open_stream(source: DataSource) -> Any:
    """Open what `stream_rows` reads: of a hub data set, nothing is put on the disk."""
    return open_given(source) if is_given(source) else _load_hub(source, streaming=True)


def stream_rows(dataset: Any, source: DataSource, *, done: int = 0) -> Iterator[Row | BadRow]:
    """Rows of what `open_stream` opened; ``done`` rows of it were read before."""
    if is_given(source):
        return read_given(dataset, source, done=done)
    return _stream_hub(dataset, name_of(source), done)


def _stream_hub(dataset: Any, path: str, done: int) -> Iterator[Row | BadRow]:
    rows = iter(dataset)
    for number in count(done + 1):
        try:
            values = next(rows, None)
        except Exception as error:  # of the network, of the files, of the library
            raise AlignError(
                f"{path}:row {number}: cannot be read: {reason_in_line(error)}; try again (a run "
                "with checkpoints: resume=auto), or without data.streaming"
            ) from error
        if values is None:
            return
        where = f"{path}:row {number}"
        yield too_long(where) if unless_too_long(values) is None else Row(values, where)


def _load_hub(source: DataSource, **options: Any) -> Any:
    import datasets

    kept = Path(datasets.config.HF_DATASETS_CACHE) / source.path.replace("/", "___")
    if not kept.exists():
        require_on_the_hub(source.path, "dataset", "README.md")
    try:
        return datasets.load_dataset(source.path, source.name, split=source.split, **options)
    except Exception as error:  # the library raises a dozen kinds, all of them the user's matter
        raise AlignError(
            f"{source.path}: no such file, and not loaded from the hub ({reason_in_line(error)}); "
            f"{_what_there_is(Path(source.path))}"
        ) from error


def content_of(source: DataSource) -> list[tuple[str, str]]:
    """(name, hash of the content) of every file of a source, or of the data set that it is."""
    if is_given(source):
        return [(name_of(source), str(hash_of_given(source)))]
    files = [(str(file), file_sha256(file)) for file in find_files(source)]
    # `datasets` keeps a hash of what it has loaded
    return files or [(name_of(source), str(_load_hub(source)._fingerprint))]


def file_sha256(path: Path) -> str:
    return str(sha256_of(path).hexdigest())


def _what_there_is(path: Path) -> str:
    """Advice on a missing path: what makes it, the likeliest existing one, what there is."""
    remedy = how_to_make(str(path))
    if remedy:
        return f"{remedy}; or give data of your own"

    def may_hold_data(found: Path) -> bool:
        return found.is_dir() or found.name.endswith(SUFFIXES)

    near = suggest_path(path, wanted=may_hold_data)
    if near:
        return f"did you mean {near}?"
    parent = next(p for p in path.parents if p.is_dir())
    names = sorted(p.name for p in parent.iterdir() if may_hold_data(p))
    there = ", ".join([name for name in names if not name.startswith(".")][:5]) or "no data files"
    return f"{parent.resolve()} has {there}; correct the path"


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path)) if path.suffix == ".gz" else path.open("rb")
