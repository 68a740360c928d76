"""The rows of a run: read, split, tokenised once into the token cache, opened from there.

Or streamed: tokenised as steps need them (``streaming.py``), held-out rows alone from the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from align.base.progress import say
from align.config.sections import DataConfig, TrainOptions
from align.data.batches import Batches, EpochBatches
from align.data.formats.fields import Kind
from align.data.formats.unread import not_read
from align.data.held_out import refuse_shared
from align.data.loader import SIDES, LoadedTokens, load
from align.data.order import EpochOrder, epoch_order
from align.data.stream import TokenStream
from align.data.tokens.groups import PromptExamples
from align.stages.common import Session
from align.stages.streaming import HeldOut, open_stream, say_dropped
from align.types import AlignError, PromptExample, SourceReport, TokenGroup


@dataclass(frozen=True)
class Split:
    """Rows of one side of the split, tokenised; ``examples[i]`` made ``groups[i]``.

    ``examples`` are there for prompts only: nothing else is needed once it is tokens. ``order`` is
    that in which an epoch goes through them. What is streamed is in neither of them.
    """

    groups: Sequence[TokenGroup]
    examples: Sequence[PromptExample]
    order: EpochOrder
    stream: TokenStream | None = None

    def batches(self, size: int) -> Batches:
        """Minibatches of ``size`` groups; of a stream as large as it was opened for."""
        return self.stream or EpochBatches(self.groups, self.order, size)


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
    tokens = _load(session, data, kind, seed)
    facts, groups = tokens.facts, tokens.groups
    reports = {side: tokens.reports(side) for side in SIDES}
    session.run.describe_data(**reports)
    manifest = {
        "train_rows": facts["rows"]["train"],
        "test_rows": facts["rows"]["test"],
        "train_tokens": facts["tokens"]["train"],
        "dropped_when_tokenised": facts["dropped"],
        "test_rows_trained_on": facts["shared"],
    }
    session.run.describe(**manifest)
    _require_for_each_process(session, len(groups["train"]), len(groups["test"]))
    if session.run.is_main:
        every = [report for side in SIDES for report in reports[side]]
        unread = [name for report in every for name in report.unread]
        remarks = not_read(unread, (report.noted for report in every))
        _tell(reports["train"], facts["dropped"]["train"], manifest, remarks)
    session.run.trace_rows(groups["train"].rows)
    train_rows, test_rows = (
        Split(
            groups[side],
            PromptExamples(groups[side]) if kind == "prompt" else (),
            epoch_order(data.order, groups[side].num_tokens(), seed),
        )
        for side in SIDES
    )
    return train_rows, test_rows


def _load(session: Session, data: DataConfig, kind: Kind, seed: int) -> LoadedTokens:
    """Let the main process make the tokens, which the others then find."""
    with session.accelerator.main_process_first():
        return load(data, kind, session.tokenizer, seed=seed, shown=session.run.is_main)


def _streamed(
    session: Session, data: DataConfig, kind: Kind, seed: int, train: TrainOptions
) -> tuple[Split, Split]:
    """A stream to train on; held out are the rows of ``data.test``, or some of its beginning."""
    held_out = None
    if data.test:
        alone = replace(data, train=(), streaming=False)
        tokens = _load(session, alone, kind, seed)
        parts = (tokens.facts[name]["test"] for name in ("reports", "rows", "dropped"))
        held_out = HeldOut(tokens.groups["test"], *parts)
    stream, test = open_stream(session, data, kind, seed, train, held_out)
    _require_for_each_process(session, stream.num_rows, len(test))
    in_order = epoch_order("given", np.arange(len(test)), seed)
    return Split((), (), in_order, stream), Split(test, (), in_order)


def _require_for_each_process(session: Session, num_train: int, num_test: int) -> None:
    world = session.accelerator.num_processes
    if min(num_train, num_test or world) < world:
        raise AlignError(f"data: {world} processes need at least as many rows on each side")


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
    say_dropped(dropped, (report.dropped for report in reports))
