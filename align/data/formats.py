"""Files and hub data sets -> rows that know where they stand. What rows mean is ``columns.py``'s.

A row that cannot be read does not end the reading: it comes out as a ``BadRow``, so that the
caller may stop or skip. A file that cannot be read at all is an error.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import IO, Any, cast

from align.hub import require_on_the_hub
from align.made_by import made_by
from align.nearest import nearest_path
from align.types import AlignError, DataSource

SUFFIXES = (
    ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet",
    ".arrow",
)  # fmt: skip
WRAPPERS = ("data", "rows", "examples", "train", "items", "samples", "instances", "records")
"""Names under which somebody puts all rows of a JSON file."""
BATCH = 1024
"""Rows of a file in Arrow's formats that are Python values at a time."""


@dataclass(frozen=True)
class Row:
    """A row as the file has it; ``where`` is ``path:line``, or ``path:row N`` without lines."""

    values: Mapping[str, Any]
    where: str


class BadRow(Exception):
    """A row that cannot be used: ``field`` and ``reason`` are few, so that they can be counted."""

    def __init__(self, where: str, field: str, reason: str, advice: str) -> None:
        super().__init__(f"{where}: {field}: {reason}; {advice}")
        self.where, self.field, self.reason, self.advice = where, field, reason, advice


def read_source(source: DataSource) -> Iterator[Row | BadRow]:
    """All rows of a source, in the order of its files."""
    files = find_files(source)
    if not files:
        yield from read_hub(source)
    for file in files:
        yield from read_file(file)


def find_files(source: DataSource) -> list[Path]:
    """The local files of a source, sorted; empty means a hub data set.

    Raises:
        AlignError: There is no such file or folder, and it cannot be the name of a hub data set.
    """
    path = Path(source.path).expanduser()
    if path.is_dir():
        return _files_of_folder(path, source.split)
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise AlignError(
                f"{path}: not a data file by its name; allowed: {', '.join(SUFFIXES)}; rename it"
            )
        return [path]
    is_hub_name = re.fullmatch(r"[\w.-]+/[\w.-]+", source.path) and not path.parent.is_dir()
    if is_hub_name and not path.name.endswith(SUFFIXES):
        return []
    raise AlignError(f"{source.path}: no such file or folder; {_what_there_is(path)}")


def read_file(path: Path) -> Iterator[Row | BadRow]:
    """Rows of one local file."""
    kind = next(s for s in SUFFIXES if path.name.endswith(s)).removesuffix(".gz")
    try:
        if kind in (".parquet", ".arrow"):
            rows = _read_parquet(path) if kind == ".parquet" else _read_arrow(path)
            yield from _numbered(rows, str(path))
            return
        with _open(path) as stream:
            if stream.read(2) in (b"\xff\xfe", b"\xfe\xff"):
                raise AlignError(f"{path}: is UTF-16, not UTF-8; save it as UTF-8")
            stream.seek(0)
            if kind in (".csv", ".tsv"):
                yield from _read_csv(stream, path, "," if kind == ".csv" else "\t")
            elif kind == ".json":
                yield from _read_json(stream, path)
            else:
                yield from _read_lines(stream, path)
    except (OSError, EOFError, csv.Error, zlib.error, _Unreadable) as error:
        raise AlignError(f"{path}: cannot be read: {_one_line(error)}; fetch it again") from error


def read_hub(source: DataSource) -> Iterator[Row | BadRow]:
    """Rows of a data set from the hub or its cache."""
    yield from _numbered(_load_hub(source), f"{source.path}/{source.split}")


def open_hub_stream(source: DataSource) -> Any:
    """The ``datasets.IterableDataset`` of a hub data set: nothing of it is put on the disk."""
    return _load_hub(source, streaming=True)


def stream_hub(dataset: Any, source: DataSource, *, done: int = 0) -> Iterator[Row]:
    """What `open_hub_stream` opened, row by row; ``done`` rows of it were read before."""
    path = f"{source.path}/{source.split}"
    rows = iter(dataset)
    for number in count(done + 1):
        try:
            values = next(rows, None)
        except Exception as error:  # of the network, of the files, of the library
            raise AlignError(
                f"{path}:row {number}: cannot be read: {_one_line(error)}; try again (a run with "
                "checkpoints: resume=auto), or without data.streaming"
            ) from error
        if values is None:
            return
        yield Row(values, f"{path}:row {number}")


def _load_hub(source: DataSource, **options: Any) -> Any:
    import datasets

    kept = Path(datasets.config.HF_DATASETS_CACHE) / source.path.replace("/", "___")
    if not kept.exists():
        require_on_the_hub(source.path, "dataset", "README.md")
    try:
        return datasets.load_dataset(source.path, source.name, split=source.split, **options)
    except Exception as error:  # the library raises a dozen kinds, all of them the user's matter
        raise AlignError(
            f"{source.path}: no such file, and not loaded from the hub ({_one_line(error)}); "
            f"{_what_there_is(Path(source.path))}"
        ) from error


def content_of(source: DataSource) -> list[tuple[str, str]]:
    """(name, hash of the content) of every file of a source, or of a hub data set."""
    files = [(str(file), file_sha256(file)) for file in find_files(source)]
    # `datasets` keeps a hash of what it has loaded
    return files or [(f"{source.path}/{source.split}", str(_load_hub(source)._fingerprint))]


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _what_there_is(path: Path) -> str:
    """What to do about a missing path: what makes it, the likeliest existing one, what there is."""
    remedy = made_by(str(path))
    if remedy:
        return f"{remedy}; or give data of your own"

    def may_hold_data(found: Path) -> bool:
        return found.is_dir() or found.name.endswith(SUFFIXES)

    near = nearest_path(path, wanted=may_hold_data)
    if near:
        return f"did you mean {near}?"
    parent = next(p for p in path.parents if p.is_dir())
    names = sorted(p.name for p in parent.iterdir() if may_hold_data(p))
    there = ", ".join([name for name in names if not name.startswith(".")][:5]) or "no data files"
    return f"{parent.resolve()} has {there}; correct the path"


def _files_of_folder(folder: Path, split: str) -> list[Path]:
    if (folder / "dataset_dict.json").is_file() and (folder / split).is_dir():
        folder = folder / split
    saved = (folder / "dataset_info.json").is_file()  # written by datasets.save_to_disk
    suffixes = (".arrow",) if saved else SUFFIXES
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name.endswith(suffixes))
    files = [p for p in files if not p.name.startswith(".")]
    if not files:
        inside = sorted(p.name for p in folder.iterdir() if p.is_dir())
        hint = f"its folders: {', '.join(inside[:5])}" if inside else "name another folder"
        raise AlignError(f"{folder}: no data file in it ({', '.join(SUFFIXES)}); {hint}")
    return files


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _read_lines(stream: IO[bytes], path: Path) -> Iterator[Row | BadRow]:
    """One JSON object a line; blank lines are no rows."""
    for number, raw in enumerate(stream, start=1):
        where = f"{path}:{number}"
        if number == 1 and raw.strip() == b"[":
            raise _one_list(path)
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            if line.strip():
                # without its end, which json would blame where a row breaks off inside a string
                value = json.loads(line.rstrip("\r\n"))
                if number == 1 and _holds_rows(value):
                    raise _one_list(path)
                yield _object(value, where)
        except UnicodeDecodeError as error:
            yield _not_utf8(where, f"byte 0x{raw[error.start]:02x} at column {error.start + 1}")
        except json.JSONDecodeError as error:
            advice = f"{_at(error)}: mend the line"
            yield BadRow(where, "row", "malformed JSON", advice)
        except AlignError:
            raise
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, nesting
            yield BadRow(where, "row", "malformed JSON", f"{_one_line(error)}: mend the line")


def _one_list(path: Path) -> AlignError:
    return AlignError(f"{path}: is one JSON list, not an object a line; call it .json")


def _read_json(stream: IO[bytes], path: Path) -> Iterator[Row | BadRow]:
    """A JSON array of objects; a file that holds one object a line is read as such."""
    is_array = _first_byte(stream) == b"["
    stream.seek(0)
    if not is_array:
        _refuse_wrapped(stream, path)
        yield from _read_lines(stream, path)
        return
    raw = stream.read()
    try:
        values = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        byte = f"0x{raw[error.start]:02x}"
        raise AlignError(f"{path}:{line}: not UTF-8 (byte {byte}); save it as UTF-8") from error
    except json.JSONDecodeError as error:
        raise AlignError(
            f"{path}:{error.lineno}: malformed JSON: {_at(error)}; "
            "mend the line (an array is read as a whole, so on_bad_row cannot skip it)"
        ) from error
    except (ValueError, RecursionError) as error:
        raise AlignError(f"{path}: malformed JSON: {_one_line(error)}; mend it") from error
    for number, value in enumerate(values, start=1):
        yield _object(value, f"{path}:row {number}")


def _refuse_wrapped(stream: IO[bytes], path: Path) -> None:
    """One object around the rows, ``{"data": [...]}``, would be read as one row, or as broken."""
    first = stream.readline().strip()
    # a line that is an object of its own is the first of many; a wrapped file is read whole
    if first.endswith(b"}") and stream.readline().strip():
        stream.seek(0)
        return
    stream.seek(0)
    try:
        whole = json.loads(stream.read())
    except (ValueError, RecursionError):
        whole = None  # lines, or broken: the reader of lines says where
    stream.seek(0)
    for name in WRAPPERS if isinstance(whole, dict) else ():
        if _holds_rows(whole.get(name)):
            raise AlignError(
                f"{path}: is one object, whose {name!r} holds the rows; save that list as the file"
            )


def _holds_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _first_byte(stream: IO[bytes]) -> bytes:
    """The first that is neither a byte order mark nor white space, if any."""
    text = stream.read(3).removeprefix(b"\xef\xbb\xbf").lstrip()
    while not text:
        block = stream.read(1 << 16)
        if not block:
            break
        text = block.lstrip()
    return text[:1]


def _read_csv(stream: IO[bytes], path: Path, separator: str) -> Iterator[Row | BadRow]:
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    csv.field_size_limit(2**31 - 1)
    # strict: else a cell that begins with a stray quote would swallow the lines up to the next one
    reader = csv.reader(text, delimiter=separator, strict=True)
    header = next(reader, [])
    other = next((s for s in ";\t," if len(header) == 1 and s in header[0]), None)
    if other:
        named = {"\t": "tabs", ";": "semicolons", ",": "commas"}
        raise AlignError(
            f"{path}:1: its cells are separated by {named[other]}, not by {named[separator]}; save "
            "it with commas (.csv) or tabs (.tsv)"
        )
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise AlignError(f"{path}:1: two columns are called {twice!r}; rename one of them")
    start = reader.line_num + 1
    for cells in _cells(reader, path):
        where, start = f"{path}:{start}", reader.line_num + 1
        if not cells:
            continue
        if len(cells) != len(header):
            advice = f"it has {len(cells)} cells and the header {len(header)}: quote the commas"
            yield BadRow(where, "row", "wrong number of cells", advice)
        elif any("\udc80" <= c <= "\udcff" for c in "".join(cells)):
            yield _not_utf8(where, "a byte that no character has")
        else:
            yield Row(dict(zip(header, cells, strict=True)), where)


def _cells(reader: Any, path: Path) -> Iterator[list[str]]:
    try:
        yield from reader
    except csv.Error as error:
        raise AlignError(
            f"{path}:{reader.line_num}: {error}: a cell that begins with a quote ends with one; "
            "write quotes inside it twice, and quote a cell that begins with one"
        ) from error


def _read_parquet(path: Path) -> Iterator[Mapping[str, Any]]:
    from pyarrow import parquet

    with _arrow_errors():
        file = parquet.ParquetFile(path)
        for group in range(file.num_row_groups):  # asked for all of them, it keeps what it has read
            for batch in file.iter_batches(BATCH, row_groups=[group]):
                yield from _values(batch)


def _read_arrow(path: Path) -> Iterator[Mapping[str, Any]]:
    """Both of Arrow's formats: the stream, which ``datasets`` writes, and the file."""
    import pyarrow

    with _arrow_errors(), pyarrow.memory_map(str(path)) as stream:
        try:
            batches: Iterable[Any] = pyarrow.ipc.open_stream(stream)
        except pyarrow.ArrowInvalid:
            reader = pyarrow.ipc.open_file(stream)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        for batch in batches:
            # a broken offset would read memory that is not the file's
            batch.validate(full=True)
            yield from _values(batch)


def _values(batch: Any) -> Iterator[Mapping[str, Any]]:
    """A few rows at a time: a file may be one batch, and Python's values are larger."""
    for start in range(0, batch.num_rows, BATCH):
        yield from batch.slice(start, BATCH).to_pylist()


class _Unreadable(Exception):
    """A file in Arrow's formats whose bytes are no rows."""


@contextmanager
def _arrow_errors() -> Iterator[None]:
    """Arrow raises its own errors, and Python's where a value has no Python form."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, ValueError, OverflowError, TypeError) as error:
        raise _Unreadable(_one_line(error)) from error


def _numbered(rows: Iterable[Mapping[str, Any]], path: str) -> Iterator[Row]:
    for number, values in enumerate(rows, start=1):
        yield Row(values, f"{path}:row {number}")


def _object(value: Any, where: str) -> Row | BadRow:
    if isinstance(value, dict):
        return Row(value, where)
    kind = type(value).__name__
    return BadRow(where, "row", "not a JSON object", f"it is a {kind}: give {{...}} with columns")


def _not_utf8(where: str, detail: str) -> BadRow:
    return BadRow(where, "row", "not UTF-8", f"{detail}: save the file as UTF-8")


def _at(error: json.JSONDecodeError) -> str:
    return f"{error.msg.removesuffix(' at')} at column {error.colno}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
