"""Token groups as rows of a ``datasets.Dataset``: written in batches, read by index.

A group is made when it is asked for and its arrays are views of the mapped file, so the rows of a
large data set never lie in memory.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import compute

from align.base.files import BROKEN, load_json, reason
from align.data.records import restored
from align.data.subset import Lazy
from align.data.tokens.cache import FACTS, Damaged, sums_of
from align.types import PromptExample, TokenGroup, TokenSequence

PER_BATCH = 1024
"""Groups of one Arrow batch: what is held while writing."""

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("margin", pa.float64()),
        # prefix and continuations behind one another, and how long each of them is
        ("tokens", pa.large_list(pa.int32())),
        ("lengths", pa.list_(pa.int32())),
        # tokens of the prefix and the longest continuation
        ("longest", pa.int32()),
        # of the continuations' tokens; null where every one counts
        ("mask", pa.large_list(pa.bool_())),
        # of a prompt: what a reward is told, as JSON
        ("example", pa.large_string()),
    ]
)


def to_batches(
    groups: Sequence[TokenGroup], prompts: Sequence[PromptExample | None]
) -> Iterator[pa.RecordBatch]:
    """Arrow batches of the groups; ``prompts[i]`` is the prompt that group i is made of, if any."""
    rows: list[dict[str, Any]] = []
    for group, prompt in zip(groups, prompts, strict=True):
        arrays = [group.prefix_ids, *(c.input_ids for c in group.continuations)]
        masks = [c.loss_mask for c in group.continuations]
        counted = all(mask.all() for mask in masks)
        lengths = [len(array) for array in arrays]
        rows.append(
            {
                "id": group.id,
                "margin": group.margin,
                "tokens": np.concatenate(arrays),
                "lengths": lengths,
                "longest": lengths[0] + max(lengths[1:], default=0),
                "mask": None if counted else np.concatenate(masks),
                "example": json.dumps(asdict(prompt)) if prompt else None,
            }
        )
        if len(rows) == PER_BATCH:
            yield pa.RecordBatch.from_pylist(rows, SCHEMA)
            rows = []
    if rows:
        yield pa.RecordBatch.from_pylist(rows, SCHEMA)


class TokenGroups(Lazy[TokenGroup]):
    """The groups of one Arrow file.

    Raises:
        ValueError, pa.ArrowException: It is no such file.
    """

    def __init__(self, path: Path) -> None:
        from datasets import Dataset

        self.dataset = Dataset.from_file(str(path))
        self._table = self.dataset.data
        if self._table.schema != SCHEMA:
            raise ValueError(f"{path}: other columns than expected")
        # a row is found in its batch: the data set's own indexing takes three times as long
        batches = self._table.to_batches()
        self._batches = [dict(zip(SCHEMA.names, b.columns, strict=True)) for b in batches]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in batches)]).tolist()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _item(self, index: int) -> TokenGroup:
        batch, row = self._find(index)
        every, lengths = _values(batch["tokens"], row), _values(batch["lengths"], row)
        stops = np.cumsum(lengths)
        prefix, *pieces = np.split(every, stops[:-1])
        counted = np.ones(len(every) - len(prefix), dtype=bool)
        mask = batch["mask"][row]
        if mask.is_valid:
            counted = mask.values.to_numpy(zero_copy_only=False)
        masks = np.split(counted, stops[1:-1] - stops[0])
        sequences = [
            TokenSequence(piece, own) for piece, own in zip(pieces, masks, strict=bool(pieces))
        ]
        name, margin = batch["id"][row].as_py(), batch["margin"][row].as_py()
        return TokenGroup(prefix, tuple(sequences), name, margin, index % len(self))

    def example(self, index: int) -> PromptExample:
        """The prompt that the group was made of."""
        batch, row = self._find(index)
        return restored(PromptExample, json.loads(batch["example"][row].as_py()))

    def num_continuations(self) -> np.ndarray:
        """Continuations of each group, int64."""
        return self._num_values("lengths") - 1

    def num_tokens(self) -> np.ndarray:
        """Tokens of each group, a shared prompt once, int64."""
        return self._num_values("tokens")

    def rows(self) -> Iterator[tuple[str, int]]:
        """(id, tokens) of each group; the id says in which file and line it stands."""
        ids = (name for chunk in self._table.column("id").chunks for name in chunk.to_pylist())
        return zip(ids, self.num_tokens().tolist(), strict=True)

    def update(self, digest: Any) -> None:
        """Add all token ids, and where each sequence ends, to a hash."""
        for name in ("lengths", "tokens"):
            for chunk in self._table.column(name).chunks:
                digest.update(chunk.flatten().to_numpy().data)

    def longest_sequence(self) -> int:
        """Tokens of the longest prefix with its longest continuation."""
        return compute.max(self._table.column("longest")).as_py() or 0

    def _find(self, index: int) -> tuple[dict[str, Any], int]:
        """(columns of the batch that a group is in, its row there)."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        number = bisect_right(self._starts, index) - 1
        return self._batches[number], index - self._starts[number]

    def _num_values(self, name: str) -> np.ndarray:
        counts = compute.list_value_length(self._table.column(name))
        return counts.to_numpy().astype(np.int64)


class PromptExamples(Lazy[PromptExample]):
    """The prompts that the groups were made of."""

    def __init__(self, groups: TokenGroups) -> None:
        self._groups = groups

    def __len__(self) -> int:
        return len(self._groups)

    def _item(self, index: int) -> PromptExample:
        return self._groups.example(index)


def open_entry(folder: Path, sides: Iterable[str]) -> tuple[dict[str, Any], dict[str, TokenGroups]]:
    """(facts, groups by side) of an entry of the token cache.

    Raises:
        Damaged: Something is missing, cut short, changed or is no Arrow file.
    """
    paths = {side: folder / f"{side}.arrow" for side in sides}
    try:
        facts = load_json(folder / FACTS)
        for name, found in sums_of(paths.values()).items():
            if found != facts["sha256"][name]:
                raise Damaged(f"{name}: its content has changed since it was saved (sha256)")
        files = {side: TokenGroups(path) for side, path in paths.items()}
        counts = {side: len(groups) for side, groups in files.items()}
        if counts != facts["groups"]:
            raise Damaged(f"{counts} groups, not {facts['groups']}")
    except (*BROKEN, pa.ArrowException) as error:
        raise Damaged(reason(error)) from error
    return facts, files


def _values(column: Any, row: int) -> np.ndarray:
    """One row of a list column, without a copy."""
    start, stop = column.offsets[row].as_py(), column.offsets[row + 1].as_py()
    return column.values.to_numpy(zero_copy_only=True)[start:stop]
