"""Token groups on disk, in Arrow files that are mapped into memory: tokenised once, read lazily.

A cache entry is a folder named by the hash of all that decides its content: the rows' files, the
tokenizer, the options, the code that makes rows into tokens, and the libraries under it. A second
run opens it at once, and a group is made when it is asked for, so the rows of a large data set
never lie in memory. An entry is written beside its place and renamed into it, so runs may race; one
that is damaged is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from align import types
from align.base.files import BROKEN, load_json, reason
from align.base.locks import waiting_for
from align.data.readers.spool import restored, writing_cache
from align.data.subset import Lazy
from align.data.tokens.template import Tokenizer
from align.types import AlignError, PromptExample, TokenGroup, TokenSequence

PER_BATCH = 1024
"""Groups of one Arrow batch: what is held while writing."""

LIBRARIES = ("transformers", "tokenizers", "jinja2", "datasets", "pyarrow", "numpy")
"""They render, tokenise, read, and draw the rows that are picked."""

PARTIAL = ".partial"
"""What the name of a folder ends with in which an entry is being made."""
ABANDONED_SECONDS = 24 * 3600.0
"""A folder of that kind to which nothing was written for so long is nobody's."""

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("margin", pa.float64()),
        # prefix and continuations behind one another, and how long each of them is
        ("tokens", pa.large_list(pa.int32())),
        ("lengths", pa.list_(pa.int32())),
        # of the continuations' tokens; null where every one counts
        ("mask", pa.large_list(pa.bool_())),
        # of a prompt: what a reward is told, as JSON
        ("example", pa.large_string()),
    ]
)


def cache_folder() -> Path:
    """``$ALIGN_CACHE``, or ``align`` in the user's cache directory."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "align"
    return Path(os.environ.get("ALIGN_CACHE") or default) / "tokens"


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """Of all that a tokenizer does: its vocabulary and rules, special tokens, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
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


# ---------------------------------------------------------------- one entry


class Damaged(AlignError):
    """A cache entry that cannot be read."""


def open_entry(folder: Path, sides: Iterable[str]) -> tuple[dict[str, Any], dict[str, GroupFile]]:
    """(facts, groups by side) of an entry.

    Raises:
        Damaged: Something is missing, cut short or is no Arrow file.
    """
    try:
        facts = load_json(folder / "facts.json")
        files = {side: GroupFile(folder / f"{side}.arrow") for side in sides}
        counts = {side: len(groups) for side, groups in files.items()}
        if counts != facts["groups"]:
            raise Damaged(f"{counts} groups, not {facts['groups']}")
    except (*BROKEN, pa.ArrowException) as error:
        raise Damaged(reason(error)) from error
    return facts, files


def remove_damaged(folder: Path, open_whole: Callable[[], object]) -> None:
    """Make room for a new entry, unless another run has put a whole one in its place meanwhile."""
    with waiting_for(folder.parent):
        try:
            open_whole()
        except Damaged:
            shutil.rmtree(folder, ignore_errors=True)


def write_entry(
    folder: Path, make: Callable[[Callable[[str, Iterable[pa.RecordBatch]], int]], dict[str, Any]]
) -> None:
    """Let ``make`` write its sides and give its facts, and put the whole in place at once.

    Another run may have put its own there meanwhile: it holds the same, so it stays.

    Raises:
        AlignError: The disk cannot be written.
    """
    with writing_cache(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder.parent)
        # a name that no process of another container has; inside it a folder that others may read
        outer = tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=PARTIAL, dir=folder.parent)
        partial = Path(outer) / "entry"
        partial.mkdir()
    counts: dict[str, int] = {}

    def write(side: str, batches: Iterable[pa.RecordBatch]) -> int:
        counts[side] = _write_file(partial / f"{side}.arrow", batches, folder.parent)
        return counts[side]

    try:
        facts = {**make(write), "groups": counts}
        with writing_cache(folder.parent):
            (partial / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
            _put_in_place(partial, folder)
    finally:
        shutil.rmtree(outer, ignore_errors=True)


def _remove_abandoned(cache: Path) -> None:
    """What runs have left that were killed while they wrote."""
    for outer in cache.glob(f"*{PARTIAL}"):
        times = [_changed(path) for path in (outer, *outer.rglob("*"))]
        if max(times) < time.time() - ABANDONED_SECONDS:
            shutil.rmtree(outer, ignore_errors=True)


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # put into its place meanwhile, or of another user
        return time.time()


def _write_file(path: Path, batches: Iterable[pa.RecordBatch], cache: Path) -> int:
    """How many rows were written; an error of what makes the batches stays what it is."""
    rows = 0
    with writing_cache(cache):
        file = pa.ipc.new_file(str(path), SCHEMA)
    try:
        for batch in batches:
            with writing_cache(cache):
                file.write_batch(batch)
            rows += batch.num_rows
    finally:
        with writing_cache(cache):
            file.close()
    return rows


def _put_in_place(partial: Path, folder: Path) -> None:
    try:
        partial.rename(folder)
    except OSError:
        if not (folder / "facts.json").is_file():
            raise


def to_batches(
    groups: Sequence[TokenGroup], prompts: Sequence[PromptExample | None]
) -> Iterator[pa.RecordBatch]:
    """Arrow batches of the groups; ``prompts[i]`` is the prompt that group i is made of, if any."""
    rows: list[dict[str, Any]] = []
    for group, prompt in zip(groups, prompts, strict=True):
        arrays = [group.prefix_ids, *(c.input_ids for c in group.continuations)]
        masks = [c.loss_mask for c in group.continuations]
        counted = all(mask.all() for mask in masks)
        rows.append(
            {
                "id": group.id,
                "margin": group.margin,
                "tokens": np.concatenate(arrays),
                "lengths": [len(array) for array in arrays],
                "mask": None if counted else np.concatenate(masks),
                "example": json.dumps(asdict(prompt)) if prompt else None,
            }
        )
        if len(rows) == PER_BATCH:
            yield pa.RecordBatch.from_pylist(rows, SCHEMA)
            rows = []
    if rows:
        yield pa.RecordBatch.from_pylist(rows, SCHEMA)


class GroupFile(Lazy[TokenGroup]):
    """The groups of one Arrow file; their arrays are views of the mapped file."""

    def __init__(self, path: Path) -> None:
        self._source = pa.memory_map(str(path))
        reader = pa.ipc.open_file(self._source)
        if reader.schema != SCHEMA:
            raise ValueError(f"{path}: other columns than expected")
        self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._starts = np.cumsum([0, *(b.num_rows for b in self._batches)]).tolist()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _item(self, index: int) -> TokenGroup:
        batch, row = self._find(index)
        ids, margin, tokens, lengths, mask, _ = (batch.column(i) for i in range(len(SCHEMA)))
        every = _values(tokens, row)
        stops = np.cumsum(_values(lengths, row))
        prefix, *pieces = np.split(every, stops[:-1])
        counted = np.ones(len(every) - len(prefix), dtype=bool)
        if mask[row].is_valid:
            counted = mask[row].values.to_numpy(zero_copy_only=False)
        masks = np.split(counted, stops[1:-1] - stops[0])
        sequences = [
            TokenSequence(piece, own) for piece, own in zip(pieces, masks, strict=bool(pieces))
        ]
        return TokenGroup(prefix, tuple(sequences), ids[row].as_py(), margin[row].as_py())

    def example(self, index: int) -> PromptExample:
        """The prompt that the group was made of."""
        batch, row = self._find(index)
        return restored(PromptExample, json.loads(batch.column("example")[row].as_py()))

    def num_continuations(self) -> np.ndarray:
        """Of each group, int64."""
        parts = [np.diff(b.column("lengths").offsets.to_numpy()) - 1 for b in self._batches]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def num_tokens(self) -> np.ndarray:
        """Of each group, a shared prompt once, int64."""
        parts = [np.diff(b.column("tokens").offsets.to_numpy()) for b in self._batches]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def rows(self) -> Iterator[tuple[str, int]]:
        """(id, tokens) of each group; the id says in which file and line it stands."""
        ids = (name for b in self._batches for name in b.column("id").to_pylist())
        return zip(ids, self.num_tokens().tolist(), strict=True)

    def update(self, digest: Any) -> None:
        """Add all token ids, and where each sequence ends, to a hash."""
        for name in ("lengths", "tokens"):
            for batch in self._batches:
                column = batch.column(name)
                start, stop = column.offsets[0].as_py(), column.offsets[-1].as_py()
                digest.update(column.values.to_numpy()[start:stop].data)

    def longest_sequence(self) -> int:
        """Tokens of the longest prefix with its longest continuation, read a batch at a time."""
        longest = 0
        for batch in self._batches:
            lengths = batch.column("lengths")
            starts, values = lengths.offsets.to_numpy(), lengths.values.to_numpy()
            answers = values.copy()
            answers[starts[:-1]] = 0  # the prefix itself
            most = values[starts[:-1]] + np.maximum.reduceat(answers, starts[:-1])
            longest = max(longest, int(most.max(initial=0)))
        return longest

    def _find(self, index: int) -> tuple[pa.RecordBatch, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        number = bisect_right(self._starts, index) - 1
        return self._batches[number], index - self._starts[number]


class ExampleFile(Lazy[PromptExample]):
    """The prompts of the groups of one file."""

    def __init__(self, groups: GroupFile) -> None:
        self._groups = groups

    def __len__(self) -> int:
        return len(self._groups)

    def _item(self, index: int) -> PromptExample:
        return self._groups.example(index)


def _values(column: Any, row: int) -> np.ndarray:
    """One row of a list column, without a copy."""
    start, stop = column.offsets[row].as_py(), column.offsets[row + 1].as_py()
    return column.values.to_numpy(zero_copy_only=True)[start:stop]
