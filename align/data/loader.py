"""The one loader: sources -> token groups of both sides of a run, made once and then opened.

Rows are read, mapped to examples, checked, split by prompt and tokenised into an entry of the token
cache, which a second run with the same rows, tokenizer, options and code opens at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from align.base.progress import Progress, say
from align.config.sections import DataConfig, DataSource
from align.data.examples import held_out_places, load_examples, with_columns
from align.data.formats.columns import Example
from align.data.formats.fields import Kind
from align.data.held_out import ADVICE, num_shared
from align.data.sources import content_of
from align.data.subset import picked
from align.data.tokens.cache import (
    Damaged,
    cache_folder,
    code_hash,
    new_entry,
    remove_damaged,
    tokenizer_hash,
    write_arrow,
)
from align.data.tokens.groups import SCHEMA, TokenGroups, open_entry
from align.data.tokens.text_ids import Tokenizer
from align.data.tokens.tokenise import Tally, batches_of
from align.types import AlignError, SourceReport

SIDES = ("train", "test")
OF_STEPS = ("order", "streaming", "streaming_window")
"""Options of a run's steps, which change nothing of its rows."""

Sides: TypeAlias = dict[str, Sequence[Example]]


@dataclass(frozen=True)
class LoadedTokens:
    """Token groups of both sides, and what became of the rows.

    ``facts``: ``reports`` of every file, and ``rows``, ``tokens`` and ``dropped`` (when tokenised,
    by reason), each by side; ``shared``, held-out rows that are training rows too.
    """

    groups: Mapping[str, TokenGroups]
    facts: Mapping[str, Any]

    def reports(self, side: str) -> tuple[SourceReport, ...]:
        """Return what became of the rows of every file of a side."""
        return tuple(SourceReport(**report) for report in self.facts["reports"][side])


def load(
    data: DataConfig, kind: Kind, tokenizer: Tokenizer, *, seed: int, shown: bool = False
) -> LoadedTokens:
    """Open the tokens of a run's rows, or make them.

    Args:
        kind: What rows are read as: ``sft``, ``preference`` or ``prompt``.
        seed: Picks rows where fewer are used, and the side of a prompt.
        shown: Show the progress of tokenising.

    Raises:
        AlignError: A bad row under ``on_bad_row=stop``, a source without a usable row, a held-out
            set that is training data, or a disk that cannot be written.
    """
    folder = cache_folder() / _key(data, kind, tokenizer, seed)
    if folder.exists():
        try:
            return _open_whole(folder)
        except Damaged as error:
            say(f"  token cache {folder}: damaged ({error}), so it is made again")
            remove_damaged(folder, partial(_open_whole, folder))
    facts: dict[str, Any] = {}
    with new_entry(folder, facts) as entry:
        examples, facts["reports"] = _read(data, kind, seed, entry.parent)
        # a split by prompt has none
        facts["shared"] = _shared(data.test, examples) if data.test and data.train else 0
        facts |= _tokenise(examples, data, tokenizer, entry, shown)
    try:
        return _open_whole(folder)
    except Damaged as error:
        raise AlignError(
            f"token cache {folder}: {error}; it cannot be replaced: remove it, or set ALIGN_CACHE "
            "to another folder"
        ) from error


def _key(data: DataConfig, kind: str, tokenizer: Tokenizer, seed: int) -> str:
    """A hash of everything that decides what the tokens are; sources by their content."""
    content = {
        side: [(asdict(source), content_of(source)) for source in getattr(data, side)]
        for side in SIDES
    }
    options = {name: value for name, value in asdict(data).items() if name not in OF_STEPS}
    parts = [code_hash(), tokenizer_hash(tokenizer), options, content, kind, seed]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _open_whole(folder: Path) -> LoadedTokens:
    """Open the cache's entry, which has to say of itself what a run is told."""
    facts, groups = open_entry(folder, SIDES)
    lacking = [name for name in ("reports", "rows", "tokens", "dropped") if name not in facts]
    if lacking:
        raise Damaged(f"facts.json: has no {lacking[0]}")
    return LoadedTokens(groups, facts)


def _read(
    data: DataConfig, kind: Kind, seed: int, folder: Path
) -> tuple[Sides, dict[str, list[dict[str, Any]]]]:
    """The examples of both sides, kept in ``folder``, and what became of every file's rows."""

    def read(side: str) -> tuple[Any, np.ndarray, list[dict[str, Any]]]:
        rows = folder / side
        rows.mkdir()
        loaded = load_examples(
            with_columns(getattr(data, side), data.columns),
            kind=kind,
            on_bad_row=data.on_bad_row,
            seed=seed,
            folder=rows,
        )
        return loaded.examples, loaded.places, [asdict(report) for report in loaded.reports]

    train, places, reports = read("train")
    numbers = np.arange(len(train))
    if data.test:
        test, _, test_reports = read("test")
        sides = [(train, numbers), (test, np.arange(len(test)))]
    else:
        is_test = held_out_places(places, data.test_fraction)
        sides, test_reports = [(train, numbers[~is_test]), (train, numbers[is_test])], []
    limits = (data.max_train_rows, data.max_test_rows)
    examples: Sides = {
        side: every.select(rows[picked(len(rows), limit, seed)])
        for side, (every, rows), limit in zip(SIDES, sides, limits, strict=True)
    }
    return examples, {"train": reports, "test": test_reports}


def _shared(test: Sequence[DataSource], examples: Sides) -> int:
    """Count held-out rows that are training rows; refuse them where all are."""
    shared = num_shared(examples["train"], examples["test"])
    if shared and shared == len(examples["test"]):
        paths = ", ".join(source.path for source in test)
        raise AlignError(
            f"data.test: {paths}: all {shared} rows are training data too, word for word: {ADVICE}"
        )
    return shared


def _tokenise(
    examples: Sides, data: DataConfig, tokenizer: Tokenizer, entry: Path, shown: bool
) -> dict[str, Any]:
    """Write the tokens of both sides; how many there are of what, and what was dropped."""
    tallies = {side: Tally() for side in SIDES}
    groups: dict[str, int] = {}
    for side, tally in tallies.items():
        rows = batches_of(
            tokenizer,
            examples[side],
            tally,
            max_tokens=data.max_tokens,
            on_bad_row=data.on_bad_row,
            loss_on=data.loss_on,
        )
        batches = _shown(rows, len(examples[side]), shown)
        groups[side] = write_arrow(entry / f"{side}.arrow", SCHEMA, batches)
    return {
        "groups": groups,
        "rows": {side: tally.rows for side, tally in tallies.items()},
        "tokens": {side: tally.tokens for side, tally in tallies.items()},
        "dropped": {side: dict(tally.dropped) for side, tally in tallies.items()},
    }


def _shown(batches: Iterator[pa.RecordBatch], rows: int, shown: bool) -> Iterator[pa.RecordBatch]:
    with Progress(rows, "tokenise", unit="row", shown=shown) as bar:
        for batch in batches:
            yield batch
            bar.advance(steps=batch.num_rows)
