"""Examples on disk between reading and tokenising, so that a data set never lies in memory.

They are appended while the files are read and made again when they are asked for, in any order and
by forked processes too. The file has no name: nothing is left of it, however a run ends.
"""

from __future__ import annotations

import json
import os
import tempfile
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeAlias, TypeVar

from align.data.formats.rankings import Rated
from align.types import AlignError, PreferencePair, PromptExample, SFTExample

Record: TypeAlias = SFTExample | PreferencePair | PromptExample | Rated
R = TypeVar("R")

_KINDS: tuple[type[Any], ...] = (SFTExample, PreferencePair, PromptExample, Rated)


@contextmanager
def writing_cache(folder: Path) -> Iterator[None]:
    """A disk that is full, or gone, is one line; to stand around what writes, and nothing else."""
    try:
        yield
    except OSError as error:
        raise AlignError(
            f"token cache {folder}: cannot be written: {error.strerror or error}; set ALIGN_CACHE "
            "to a folder with room"
        ) from error


class Store(Protocol):
    """Where a loader puts what it has read: a ``list``, or a `Spool`."""

    def append(self, record: Any, /) -> None: ...
    def __getitem__(self, index: int, /) -> Any: ...
    def __len__(self) -> int: ...


class Spool:
    """Records in a temporary file of ``folder``; in memory are eight bytes of each."""

    def __init__(self, folder: Path) -> None:
        with writing_cache(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed on leaving)
        self._folder = folder
        self._ends = array("q", [0])
        self._pending = False

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(OSError):  # a full disk, which was told when it filled
            self._file.close()

    def append(self, record: Record, /) -> None:
        values = [_KINDS.index(type(record)), vars(record)]
        # surrogates are kept as they are: only what a model reads has been checked for them
        line = json.dumps(values, ensure_ascii=False).encode("utf-8", "surrogatepass")
        with writing_cache(self._folder):
            self._file.write(line)
        self._ends.append(self._ends[-1] + len(line))
        self._pending = True

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int, /) -> Record:
        self.flush()
        start, stop = self._ends[index], self._ends[index + 1]
        line = self._read(start, stop - start)
        kind, values = json.loads(line.decode("utf-8", "surrogatepass"))
        record: Record = restored(_KINDS[kind], values)
        return record

    def _read(self, start: int, count: int) -> bytes:
        if hasattr(os, "pread"):  # leaves the position, which forked processes share, as it is
            return os.pread(self._file.fileno(), count, start)
        self._file.seek(start)  # Windows, where there is no fork
        line = self._file.read(count)
        self._file.seek(0, os.SEEK_END)
        return line

    def flush(self) -> None:
        """To be done before a fork: each process would write what lies in the buffer."""
        if self._pending:
            with writing_cache(self._folder):
                self._file.flush()
            self._pending = False


def restored(kind: type[R], values: Mapping[str, Any]) -> R:
    """A record from its fields as JSON has them, where tuples have become lists."""
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
