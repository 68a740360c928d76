"""A stage's stream of training rows, its held-out rows, and what the manifest says of both.

Manifest and log tell what was read so far: they are brought up to date with every window.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.base.progress import say
from align.config.sections import DataConfig, DataSource, TrainOptions
from align.data.examples import with_columns
from align.data.formats.fields import Kind
from align.data.formats.unread import not_read
from align.data.sources import find_files, hash_of_given, name_of
from align.data.stream import TokenStream, Window, WindowReader
from align.data.stream_counts import Counts
from align.data.subset import pick
from align.run.folder import Run
from align.stages.common import Session
from align.types import AlignError, TokenGroup


@dataclass(frozen=True)
class HeldOut:
    """Held-out rows that do not come from the stream, and what the manifest says of them."""

    groups: Sequence[TokenGroup]
    reports: Sequence[Mapping[str, Any]]
    rows: int
    dropped: Mapping[str, int]


def open_stream(
    session: Session,
    data: DataConfig,
    kind: Kind,
    seed: int,
    train: TrainOptions,
    held_out: HeldOut | None,
) -> tuple[TokenStream, Sequence[TokenGroup]]:
    """The groups of all steps, and those held out.

    Without ``held_out`` a share of the prompts is never trained on; what is measured is the rows of
    these prompts in the first window.
    """
    if train.max_steps is None:
        raise AlignError("train.max_steps: is missing, and data.streaming needs it")
    sources = with_columns(data.train, data.columns)
    reader = WindowReader(
        sources,
        session.tokenizer,
        kind=kind,
        size=data.streaming_window,
        seed=seed,
        shuffled=data.order == "shuffled",
        test_fraction=0.0 if held_out else data.test_fraction,
        max_tokens=data.max_tokens,
        on_bad_row=data.on_bad_row,
        loss_on=data.loss_on,
    )
    num_rows = train.max_steps * train.minibatch
    stream = TokenStream(reader, size=train.minibatch, num_rows=num_rows)
    first = stream.windows()[0]
    if held_out is None:
        groups = pick(first.held_out, data.max_test_rows, seed)
        held_out = HeldOut(groups, [], len(groups), first.dropped_held_out)
    places = [place for source in sources for place in _places(source)]
    session.run.describe(data={"train": places, "test": list(held_out.reports)})
    if session.run.is_main:
        sources_read = first.counts.sources
        unread = (name for counts in sources_read for name in counts.unread)
        remarks = not_read(unread, (counts.noted.reasons for counts in sources_read))
        say(
            f"  data: streamed; {first.counts.rows} rows in the first window "
            f"({first.counts.tokens} tokens), {held_out.rows} more held out{remarks}"
        )
        _say_dropped(first.counts)
    stream.each_window(_Teller(session.run, held_out))
    return stream, held_out.groups


def _places(source: DataSource) -> list[dict[str, Any]]:
    """Describe a streamed source without reading it: a file's name and size."""
    files = find_files(source)
    if not files:
        return [{"path": name_of(source), "sha256": hash_of_given(source, streamed=True)}]
    return [{"path": str(file), "bytes": Path(file).stat().st_size} for file in files]


class _Teller:
    """Puts every window that is reached into the manifest, and says where the rows begin again."""

    def __init__(self, run: Run, held_out: HeldOut) -> None:
        self._run, self._held_out = run, held_out
        self._reached, self._begun_again = -1, False

    def __call__(self, window: Window) -> None:
        if window.start <= self._reached:
            return  # read again
        self._reached = window.start
        counts = window.counts
        self._run.describe(
            train_rows=counts.rows,
            train_tokens=counts.tokens,
            test_rows=self._held_out.rows,
            dropped_when_tokenised={
                "train": dict(counts.dropped),
                "test": dict(self._held_out.dropped),
            },
            stream={
                "windows": window.mark["number"] + 1,
                "whole_passes": window.passes,
                "held_out": counts.held_out,
                "sources": [source.report() for source in counts.sources],
            },
        )
        if window.passes and not self._begun_again and self._run.is_main:
            self._begun_again = True
            say(
                f"  data: all {counts.rows} rows of the stream were trained on once; they begin "
                "again, shuffled anew inside their windows"
            )
            _say_dropped(counts)


def _say_dropped(counts: Counts) -> None:
    say_dropped(counts.dropped, (source.bad.reasons for source in counts.sources))


def say_dropped(tokenised: Mapping[str, int], read: Iterable[Mapping[str, int]]) -> None:
    """Print how many rows were dropped, by reason: when tokenised, and of each source when read."""
    reasons = Counter(tokenised)
    for of_source in read:
        reasons.update(of_source)
    for reason, count in reasons.items():
        say(f"  dropped {count} rows: {reason}")
