"""Held-out rows that are training rows too: refused where all are, counted where some are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from align.config.sections import DataSource
from align.data.formats.columns import Example
from align.data.readers.splits import split_parts
from align.data.sources import choice_of, file_sha256, find_parts
from align.types import AlignError

ADVICE = (
    "what is measured on them says nothing; leave data.test out, so that data.test_fraction is "
    "held out, or give slices that do not meet (split: 'train[:90%]' and 'train[90%:]')"
)


def notes_of(sources: Sequence[DataSource]) -> list[str]:
    """One line for each local source of which something is not read, or may be cut off."""
    notes = []
    for source in sources:
        choice = choice_of(source)
        if choice is None:
            continue
        notes += [choice.note] if choice.note else []
        notes += [
            f"{file}: its last line has no line break at its end; if the file was cut off there, "
            "so is that row"
            for file in choice.files
            if file.name.endswith((".csv", ".tsv")) and not _ends_in_line_break(file)
        ]
    return list(dict.fromkeys(notes))


def _ends_in_line_break(path: Path) -> bool:
    with path.open("rb") as stream:
        size = stream.seek(0, 2)
        stream.seek(max(size - 1, 0))
        return stream.read(1) in (b"\n", b"\r", b"")


def refuse_shared(train: Sequence[DataSource], test: Sequence[DataSource]) -> None:
    """Refuse a held-out source that has rows of a training source: one file, or one content.

    Raises:
        AlignError: With both sources.
    """
    for held_out in test:
        for source in train:
            if _share_rows(source, held_out):
                of = "" if source.path == held_out.path else f" ({source.path})"
                raise AlignError(
                    f"data.test: {held_out.path} [{held_out.split}] is training data too{of}: "
                    f"{ADVICE}"
                )


def _share_rows(source: DataSource, held_out: DataSource) -> bool:
    trained, tested = find_parts(source), find_parts(held_out)
    if not trained and not tested:
        is_same = (source.path, source.name) == (held_out.path, held_out.name)
        return is_same and _slices_meet(source, held_out)
    return any(a.overlaps(b) and _same_content(a.path, b.path) for a in trained for b in tested)


def _same_content(a: Path, b: Path) -> bool:
    if a.samefile(b):
        return True
    return a.stat().st_size == b.stat().st_size and file_sha256(a) == file_sha256(b)


def _slices_meet(a: DataSource, b: DataSource) -> bool:
    """Tell whether two splits of a hub data set meet, as far as it shows without their lengths."""
    for split, piece in split_parts(a):
        for other, its_piece in split_parts(b):
            if split != other:
                continue
            ranges = _range(piece), _range(its_piece)
            if piece == its_piece or not piece or not its_piece:
                return True
            if ranges[0] and ranges[1] and ranges[0][0] == ranges[1][0]:
                (_, start, stop), (_, its_start, its_stop) = ranges[0], ranges[1]
                if max(start, its_start) < min(stop, its_stop):
                    return True
    return False


def _range(piece: str) -> tuple[str, int, int] | None:
    """(unit, start, stop) of ``[a:b]``, counted from the end as if a split had no end."""
    found = re.fullmatch(r"\[(-?\d*)(%?):(-?\d*)(%?)\]", piece)
    if not found:
        return None
    unit = found[2] or found[4]
    length = 100 if unit else 10**15
    start, stop = int(found[1] or 0), int(found[3]) if found[3] else length
    return unit, start + length * (start < 0), stop + length * (stop < 0)


def num_shared(train: Sequence[Example], test: Sequence[Example]) -> int:
    """Count held-out rows that are training rows, word for word, whatever files they are in."""
    tested = [_key(example) for example in test]
    wanted = set(tested)
    found = {key for key in map(_key, train) if key in wanted}
    return sum(key in found for key in tested)


def _key(example: Example) -> int:
    own = ("id", "source")  # where the row is from
    said = [(f.name, getattr(example, f.name)) for f in fields(example) if f.name not in own]
    return hash(repr(said))
