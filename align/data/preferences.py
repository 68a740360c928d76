"""The one loader: sources -> examples, bad rows stopped at or counted, prompts split honestly."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, TypeVar

from align.data.columns import Example, read_row
from align.data.fields import NEEDED, Kind, check_names
from align.data.formats import BadRow, Row, file_sha256, find_files, read_file, read_hub
from align.data.naming import KIND_NAMES, flags, overrides
from align.data.rankings import Rated, pairs_of
from align.types import AlignError, DataSource, SFTExample, SourceReport, Text

OnBadRow: TypeAlias = Literal["stop", "skip"]
AnyExample = TypeVar("AnyExample", bound=Example)

_NUM_SHOWN = 5  # bad rows that a report tells in full


@dataclass(frozen=True)
class Loaded:
    """Examples of all sources in order, and what became of every file's rows."""

    examples: tuple[Example, ...]
    reports: tuple[SourceReport, ...]


@dataclass(frozen=True)
class _Unit:
    """What a weight keeps or leaves out as a whole: a row, or all rated rows of one prompt."""

    examples: tuple[Example, ...]
    num_rows: int = 1


def with_columns(
    sources: Sequence[DataSource], columns: Mapping[str, str]
) -> tuple[DataSource, ...]:
    """The sources with ``columns`` for all of them; what a source says itself comes first."""
    return tuple(replace(s, columns={**columns, **s.columns}) for s in sources)


def load_examples(
    sources: Sequence[DataSource], *, kind: Kind, on_bad_row: OnBadRow = "stop", seed: int = 0
) -> Loaded:
    """Read every row of every source.

    Args:
        sources: Files, folders, hub data sets; ``weight`` says how many copies of each are used.
        kind: What rows are read as: ``sft``, ``preference`` or ``prompt``.
        on_bad_row: ``stop`` at the first bad row, or ``skip`` it and count it by reason.
        seed: Picks the rows of a source whose weight has a fraction.

    Raises:
        AlignError: A bad row (``stop``), a file without one good row, a source that is not there.
    """
    examples: list[Example] = []
    reports: list[SourceReport] = []
    for source in sources:
        check_names(source.columns)
        if source.weight <= 0:
            raise AlignError(f"{source.path}: weight is {source.weight}, must be above 0")
        for path, sha256, rows in _open(source):
            kept, bad, columns = _read(rows, source, kind, on_bad_row)
            if not kept:
                raise AlignError(_no_row(path, bad, kind, columns))
            used = _weighted(kept, source.weight, f"{seed} {path}")
            if not used:
                raise AlignError(
                    f"{path}: a weight of {source.weight} leaves none of its {len(kept)} rows; "
                    "raise it, or leave the source out"
                )
            num_kept = sum(unit.num_rows for unit in kept)
            num_used = min(num_kept, sum(unit.num_rows for unit in used))
            dropped = Counter(f"{b.field}: {b.reason}" for b in bad)
            if num_used < num_kept:
                dropped[f"left out by weight {source.weight}"] = num_kept - num_used
            examples += [example for unit in used for example in unit.examples]
            reports.append(
                SourceReport(
                    path=path,
                    sha256=sha256,
                    rows_read=num_kept + len(bad),
                    rows_kept=num_used,
                    dropped=dict(dropped),
                    first_dropped=tuple(str(b) for b in bad[:_NUM_SHOWN]),
                )
            )
    return Loaded(tuple(examples), tuple(reports))


def split_by_prompt(
    examples: Sequence[AnyExample], *, test_fraction: float, seed: int
) -> tuple[tuple[AnyExample, ...], tuple[AnyExample, ...]]:
    """(train, test), decided by a hash of each prompt.

    Rows of one prompt never fall on both sides, and a prompt stays on its side when rows are added
    or reordered. The fraction holds for prompts, on average.
    """
    train: list[AnyExample] = []
    test: list[AnyExample] = []
    for example in examples:
        digest = hashlib.sha256(f"{seed} {prompt_key(example)}".encode()).digest()
        is_test = int.from_bytes(digest[:8], "big") < test_fraction * 2**64
        (test if is_test else train).append(example)
    return tuple(train), tuple(test)


def prompt_key(example: Example) -> str:
    """What makes two rows rows of one prompt.

    The prompt itself; of a whole conversation its first user turn; of plain text all of it.
    """
    if not isinstance(example, SFTExample):
        return _text_key(example.prompt)
    if example.messages is not None:
        users = [m for m in example.messages if m["role"] == "user"]
        return _text_key((users or list(example.messages))[0]["content"])
    return _text_key(example.prompt if example.prompt is not None else example.text or "")


def _text_key(text: Text) -> str:
    if isinstance(text, str):
        return text.strip()
    if len(text) == 1:  # the same question, as a string or as a turn
        return text[0]["content"].strip()
    return "\n\n".join(f"{m['role']}: {m['content'].strip()}" for m in text)


def _open(source: DataSource) -> Iterator[tuple[str, str | None, Iterator[Row | BadRow]]]:
    """(path, sha256, rows) of each file of a source."""
    files = find_files(source)
    if not files:
        yield f"{source.path}/{source.split}", None, read_hub(source)
    for file in files:
        yield str(file), file_sha256(file), read_file(file)


def _read(
    rows: Iterator[Row | BadRow], source: DataSource, kind: Kind, on_bad_row: OnBadRow
) -> tuple[list[_Unit], list[BadRow], list[str]]:
    """What is used, what is not, and the file's columns.

    To stop takes a row that can be used, before the bad one or after it: leaving bad rows out is no
    way out for a file that has no other.
    """
    kept: list[_Unit] = []
    bad: list[BadRow] = []
    rated: dict[str, list[Rated]] = {}  # by prompt, in the order in which prompts turn up
    columns: dict[str, None] = {}  # in their order
    for row in rows:
        try:
            if isinstance(row, BadRow):
                raise row
            columns |= dict.fromkeys(map(str, row.values))
            found = read_row(row, kind, columns=source.columns, source=source.path)
            if isinstance(found, Rated):
                rated.setdefault(_text_key(found.prompt), []).append(found)
            else:
                kept.append(_Unit(found))
        except BadRow as error:
            bad.append(error)
        if bad and (kept or rated) and on_bad_row == "stop":
            raise AlignError(f"{bad[0]}; or set data.on_bad_row=skip")
    for same_prompt in rated.values():
        pairs = pairs_of(same_prompt)
        if pairs:
            kept.append(_Unit(pairs, len(same_prompt)))
        else:  # as good as any row; there is nothing to compare it with
            advice = "a pair needs two scores of one prompt"
            reason = "nothing rated otherwise to compare with"
            bad += [BadRow(row.id, "score", reason, advice) for row in same_prompt]
    return kept, bad, list(columns)


def _no_row(path: str, bad: Sequence[BadRow], kind: Kind, columns: Sequence[str]) -> str:
    if not bad:
        return f"{path}: no row in it; give a file with rows"
    # a name of `data.columns` that is wrong says so itself
    if flags(kind, columns) and all(b.reason == "missing" for b in bad):
        return (
            f"{path}: none of {len(bad)} rows has the columns of {KIND_NAMES[kind]}: "
            f"{NEEDED[kind]}; its columns: {', '.join(columns) or 'none'}; say which is which: "
            f"{overrides(kind, columns)} (`align data`: --columns {flags(kind, columns)})"
        )
    return f"{path}: none of {len(bad)} rows can be used; the first: {bad[0]}"


def _weighted(kept: list[_Unit], weight: float, seed: str) -> list[_Unit]:
    """``weight`` copies of the units, a fraction of a copy picked by seed, order kept."""

    def copied(unit: _Unit, copy: int) -> _Unit:
        if copy == 1:
            return unit
        examples = tuple(replace(e, id=f"{e.id}#{copy}") for e in unit.examples)
        return replace(unit, examples=examples)

    whole = int(weight)
    used = [copied(unit, copy) for copy in range(1, whole + 1) for unit in kept]
    num_extra = round((weight - whole) * len(kept))
    extra = sorted(random.Random(seed).sample(range(len(kept)), num_extra))
    return used + [copied(kept[i], whole + 1) for i in extra]
