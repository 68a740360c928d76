"""Entries of the token cache: token groups in Arrow files that ``datasets`` maps into memory.

An entry is a folder named by the hash of all that decides its content: the rows' files, the
tokenizer, the options, the code that makes rows into tokens, and the libraries under it. A second
run opens it at once. An entry is written beside its place and renamed into it, so runs may race;
one that is damaged is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa

from align import types
from align.base.hashing import sha256_of
from align.base.locks import waiting_for
from align.data.tokens.text_ids import Tokenizer
from align.types import AlignError

LIBRARIES = ("transformers", "tokenizers", "jinja2", "datasets", "pyarrow", "numpy")
"""Libraries that render, tokenise, read, and draw the rows that are picked."""

FACTS = "facts.json"
PARTIAL = ".partial"
"""End of the name of a folder in which an entry is being made."""
ABANDONED_SECONDS = 24 * 3600.0
"""A folder of that kind to which nothing was written for so long is nobody's."""


class Damaged(AlignError):
    """A cache entry that cannot be read."""


def cache_folder() -> Path:
    """``$ALIGN_CACHE``, or ``align`` in the user's cache directory."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "align"
    return Path(os.environ.get("ALIGN_CACHE") or default) / "tokens"


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """Hash all that a tokenizer does: its vocabulary and rules, special tokens, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: Any = sorted(tokenizer.get_vocab().items())
    else:  # without what its last call has set
        rules = {**json.loads(backend.to_str()), "padding": None, "truncation": None}
    options = {k: str(v) for k, v in sorted(tokenizer.init_kwargs.items()) if k != "name_or_path"}
    parts = [type(tokenizer).__name__, rules, options, tokenizer.chat_template]
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    return hashlib.sha256(json.dumps([*parts, special], default=str).encode()).hexdigest()


@cache
def code_hash(*more: str) -> str:
    """Hash the source of `align.data`, of the records and of ``more``, and `LIBRARIES`' versions.

    Rows that other code made are not to be trusted.
    """
    digest = hashlib.sha256()
    package = sorted(Path(__file__).parents[1].rglob("*.py"))
    for path in [*package, Path(types.__file__), *map(Path, more)]:
        digest.update(path.read_bytes())
    for name in LIBRARIES:
        digest.update(f"{name} {version(name)}\n".encode())
    return digest.hexdigest()


@contextmanager
def writing_cache() -> Iterator[None]:
    """Answer a disk that is full, or gone, with one line; put around what writes, nothing else."""
    try:
        yield
    except OSError as error:
        raise AlignError(
            f"token cache {cache_folder()}: cannot be written: {error.strerror or error}; set "
            "ALIGN_CACHE to a folder with room"
        ) from error


def write_arrow(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> int:
    """Write a file that ``datasets.Dataset.from_file`` maps into memory; return its rows.

    An error of what makes the batches stays what it is.
    """
    rows = 0
    with writing_cache():
        writer = pa.ipc.new_stream(str(path), schema)
    try:
        for batch in batches:
            with writing_cache():
                writer.write_batch(batch)
            rows += batch.num_rows
    finally:
        with writing_cache():
            writer.close()
    return rows


@contextmanager
def new_entry(folder: Path, facts: dict[str, Any]) -> Iterator[Path]:
    """Yield a folder to fill, and put it in the entry's place with the ``facts`` of that time.

    The sums of its Arrow files are added to the facts.

    What is written beside it is removed. Another run may have put its own entry there meanwhile: it
    holds the same, so it stays.

    Raises:
        AlignError: The disk cannot be written.
    """
    with writing_cache():
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder.parent)
        # a name that no process of another container has; inside it a folder that others may read
        outer = tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=PARTIAL, dir=folder.parent)
        partial = Path(outer) / "entry"
        partial.mkdir()
    try:
        yield partial
        with writing_cache():
            found = {**facts, "sha256": sums_of(sorted(partial.glob("*.arrow")))}
            (partial / FACTS).write_text(json.dumps(found), encoding="utf-8")
            _put_in_place(partial, folder)
    finally:
        shutil.rmtree(outer, ignore_errors=True)


def sums_of(files: Iterable[Path]) -> dict[str, str]:
    """SHA-256 sums of files by name."""
    return {file.name: sha256_of(file).hexdigest() for file in files}


def remove_damaged(folder: Path, open_whole: Callable[[], object]) -> None:
    """Make room for a new entry, unless another run has put a whole one in its place meanwhile."""
    with waiting_for(folder.parent):
        try:
            open_whole()
        except Damaged:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(cache: Path) -> None:
    """Remove what runs have left that were killed while they wrote."""
    for outer in cache.glob(f"*{PARTIAL}"):
        times = [_changed(path) for path in (outer, *outer.rglob("*"))]
        if max(times) < time.time() - ABANDONED_SECONDS:
            shutil.rmtree(outer, ignore_errors=True)


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # put into its place meanwhile, or of another user
        return time.time()


def _put_in_place(partial: Path, folder: Path) -> None:
    try:
        partial.rename(folder)
    except OSError:
        if not (folder / FACTS).is_file():
            raise
