"""The rows of a run: read, split, tokenised once into the token cache, opened from there.

Or streamed: tokenised as steps need them (``streaming.py``), held-out rows alone from the cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from align.base.progress import Progress, say
from align.config.keys import DataConfig
from align.config.options import TrainOptions
from align.data.formats.unread import not_read
from align.data.held_out import ADVICE, num_shared, refuse_shared
from align.data.loader import Example, held_out, load_examples, with_columns
from align.data.order import EpochOrder, as_it_comes, epoch_order
from align.data.readers.spool import Spool
from align.data.sources import content_of
from align.data.subset import Subset, picked
from align.data.tokens.cache import (
    Damaged,
    ExampleFile,
    GroupFile,
    cache_folder,
    code_hash,
    open_entry,
    remove_damaged,
    tokenizer_hash,
    write_entry,
)
from align.data.tokens.tokenise import Tally, batches_of
from align.stages.common import Session
from align.stages.streaming import HeldOut, open_stream
from align.types import AlignError, DataSource, PromptExample, SourceReport, TokenGroup

Kind = Literal["sft", "preference", "prompt"]
SIDES = ("train", "test")


@dataclass(frozen=True)
class Split:
    """Rows of one side of the split, tokenised; ``examples[i]`` made ``groups[i]``.

    ``examples`` are there for prompts only: nothing else is needed once it is tokens. ``order`` is
    that in which an epoch goes through them.
    """

    groups: Sequence[TokenGroup]
    examples: Sequence[PromptExample]
    order: EpochOrder


def load_data(
    session: Session,
    data: DataConfig,
    kind: Kind,
    *,
    seed: int,
    train: TrainOptions | None = None,
) -> tuple[Split, Split]:
    """Training and held-out rows, with what was read and dropped in the manifest.

    Args:
        train: How much a run takes of a stream; for stages that may have one.
    """
    if not data.train:
        raise AlignError("data.train: no data given; name a file, a folder or a hub data set")
    refuse_shared(data.train, data.test)
    if data.streaming:
        if train is None:
            raise AlignError("data.streaming: is for sft, rm and dpo; here all rows are read first")
        return _streamed(session, data, kind, seed, train)
    # the others then find what the first has made
    with session.accelerator.main_process_first():
        facts, groups = _tokenised(session, data, kind, seed)
    reports = {side: [SourceReport(**r) for r in facts["reports"][side]] for side in SIDES}
    session.run.describe_data(**reports)
    manifest = {
        "train_rows": facts["rows"]["train"],
        "test_rows": facts["rows"]["test"],
        "train_tokens": facts["tokens"]["train"],
        "dropped_when_tokenised": facts["dropped"],
        "test_rows_trained_on": facts["shared"],
    }
    session.run.describe(**manifest)
    _require_for_each_process(session, groups["train"], groups["test"])
    if session.run.is_main:
        every = [report for side in SIDES for report in reports[side]]
        unread = [name for report in every for name in report.unread]
        remarks = not_read(unread, (report.noted for report in every))
        _tell(reports["train"], facts["dropped"]["train"], manifest, remarks)
    session.run.trace_rows(groups["train"].rows)
    train_rows, test_rows = (
        Split(
            groups[side],
            ExampleFile(groups[side]) if kind == "prompt" else (),
            epoch_order(data.order, groups[side].num_tokens(), seed),
        )
        for side in SIDES
    )
    return train_rows, test_rows


def _streamed(
    session: Session, data: DataConfig, kind: Kind, seed: int, train: TrainOptions
) -> tuple[Split, Split]:
    """A stream to train on; held out are the rows of ``data.test``, or some of its beginning."""
    held_out = None
    if data.test:
        alone = replace(data, train=(), streaming=False)
        with session.accelerator.main_process_first():
            facts, files = _tokenised(session, alone, kind, seed)
        parts = (facts[name]["test"] for name in ("reports", "rows", "dropped"))
        held_out = HeldOut(files["test"], *parts)
    stream, test = open_stream(session, data, kind, seed, train, held_out)
    _require_for_each_process(session, stream, test)
    return (
        Split(stream, (), as_it_comes(len(stream))),
        Split(test, (), as_it_comes(len(test))),
    )


def _require_for_each_process(
    session: Session, train: Sequence[TokenGroup], test: Sequence[TokenGroup]
) -> None:
    world = session.accelerator.num_processes
    if min(len(train), len(test) or world) < world:
        raise AlignError(f"data: {world} processes need at least as many rows on each side")


def _tokenised(
    session: Session, data: DataConfig, kind: Kind, seed: int
) -> tuple[dict[str, Any], dict[str, GroupFile]]:
    """From the cache, or made and put there."""
    folder = cache_folder() / _key(session, data, kind, seed)
    if folder.exists():
        try:
            return _open_whole(folder)
        except Damaged as error:
            say(f"  token cache {folder}: damaged ({error}), so it is made again")
            remove_damaged(folder, partial(_open_whole, folder))

    def make(write: Any) -> dict[str, Any]:
        with Spool(folder.parent) as spool:
            read, reports = _read(data, kind, seed, spool)
            # a split by prompt has none
            shared = _shared(data.test, read) if data.test and data.train else 0
            facts = {"reports": reports, "shared": shared}
            return {**facts, **_tokenise(session, data, read, write)}

    write_entry(folder, make)
    try:
        return _open_whole(folder)
    except Damaged as error:
        raise AlignError(
            f"token cache {folder}: {error}; it cannot be replaced: remove it, or set ALIGN_CACHE "
            "to another folder"
        ) from error


def _shared(test: Sequence[DataSource], read: dict[str, Sequence[Example]]) -> int:
    """How many held-out rows are training rows; refused where all are."""
    shared = num_shared(read["train"], read["test"])
    if shared and shared == len(read["test"]):
        paths = ", ".join(source.path for source in test)
        raise AlignError(
            f"data.test: {paths}: all {shared} rows are training data too, word for word: {ADVICE}"
        )
    return shared


def _open_whole(folder: Path) -> tuple[dict[str, Any], dict[str, GroupFile]]:
    """The cache's entry, which has to say of itself what a run is told."""
    facts, groups = open_entry(folder, SIDES)
    lacking = [name for name in ("reports", "rows", "tokens", "dropped") if name not in facts]
    if lacking:
        raise Damaged(f"facts.json: has no {lacking[0]}")
    return facts, groups


def _tokenise(
    session: Session, data: DataConfig, read: dict[str, Sequence[Example]], write: Any
) -> dict[str, Any]:
    """Write the tokens of both sides; how many there are of what, and what was dropped."""
    tallies = {side: Tally() for side in SIDES}
    for side, tally in tallies.items():
        rows = batches_of(
            session.tokenizer,
            read[side],
            tally,
            max_tokens=data.max_tokens,
            on_bad_row=data.on_bad_row,
            loss_on=data.loss_on,
        )
        write(side, _shown(rows, len(read[side]), session.run.is_main))
    return {
        "rows": {side: tally.rows for side, tally in tallies.items()},
        "tokens": {side: tally.tokens for side, tally in tallies.items()},
        "dropped": {side: dict(tally.dropped) for side, tally in tallies.items()},
    }


def _key(session: Session, data: DataConfig, kind: Kind, seed: int) -> str:
    """A hash of everything that decides what the tokens are; sources by their content."""
    content = {
        side: [(asdict(source), content_of(source)) for source in getattr(data, side)]
        for side in SIDES
    }
    options = asdict(data)
    for key in ("order", "streaming", "streaming_window"):  # of steps, not of what is kept
        del options[key]
    parts = [code_hash(__file__), tokenizer_hash(session.tokenizer), options, content, kind, seed]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _read(
    data: DataConfig, kind: Kind, seed: int, spool: Spool
) -> tuple[dict[str, Sequence[Example]], dict[str, list[dict[str, Any]]]]:
    """The examples of both sides, and what became of every file's rows."""
    train, reports = _read_side(data.train, data, kind, seed, spool)
    numbers = np.arange(len(train))
    if data.test:
        test, test_reports = _read_side(data.test, data, kind, seed, spool)
        sides = [(train, numbers), (test, np.arange(len(test)))]
    else:
        is_test = held_out(train, test_fraction=data.test_fraction, seed=seed)
        sides, test_reports = [(train, numbers[~is_test]), (train, numbers[is_test])], []
    limits = (data.max_train_rows, data.max_test_rows)
    read: dict[str, Sequence[Example]] = {
        side: Subset(examples, rows[picked(len(rows), limit, seed)])
        for side, (examples, rows), limit in zip(SIDES, sides, limits, strict=True)
    }
    spool.flush()
    return read, {"train": reports, "test": test_reports}


def _read_side(
    sources: Sequence[DataSource], data: DataConfig, kind: Kind, seed: int, spool: Spool
) -> tuple[Sequence[Example], list[dict[str, Any]]]:
    named = with_columns(sources, data.columns)
    loaded = load_examples(named, kind=kind, on_bad_row=data.on_bad_row, seed=seed, spool=spool)
    return loaded.examples, [asdict(report) for report in loaded.reports]


def _shown(batches: Iterator[pa.RecordBatch], rows: int, shown: bool) -> Iterator[pa.RecordBatch]:
    with Progress(rows, "tokenise", unit="row", shown=shown) as bar:
        for batch in batches:
            yield batch
            bar.advance(steps=batch.num_rows)


def _tell(
    reports: Sequence[SourceReport],
    dropped: dict[str, int],
    facts: dict[str, Any],
    remarks: str,
) -> None:
    say(
        f"  data: {facts['train_rows']} rows ({facts['train_tokens']} tokens), "
        f"{facts['test_rows']} more held out{remarks}"
    )
    if facts["test_rows_trained_on"]:
        say(
            f"  {facts['test_rows_trained_on']} held-out rows are training rows too, word for "
            "word: what is measured on them says little"
        )
    reasons = dict(dropped)
    for report in reports:
        for reason, count in report.dropped.items():
            reasons[reason] = reasons.get(reason, 0) + count
    for reason, count in reasons.items():
        say(f"  dropped {count} rows: {reason}")
