"""Read files of judgements as comparisons and rankings.

A comparison is ``{"prompt", "a", "b", "winner": "a" | "b" | "tie"}``, in any case, with optional
``annotator`` and the models' names ``model_a`` and ``model_b``; ``align label`` writes such rows.
An arena's columns (``response_a``, ``response_b``, ...) are found by ``comparison_of``. A ranking
is ``{"prompt", "ranking": [best, ..., worst]}``, with optional ``annotator``. Without ``prompt``
the texts are the names of the ranked things (models, players).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from align.config.sections import DataSource
from align.data.formats.comparisons import JUDGEMENT, comparison_of, verdict_of
from align.data.formats.fields import Fields
from align.data.formats.unread import unread_columns
from align.data.sources import BadRow, Row, read_source
from align.feedback.ranking import Comparison
from align.types import AlignError, Text


@dataclass(frozen=True)
class Judgement:
    """One annotator's judgement of items, best first; ``is_tie``: the two are equal."""

    where: str
    prompt: Text | None
    items: tuple[str, ...]
    is_tie: bool = False
    annotator: str = ""
    # names of the items' models, in their order
    models: tuple[str, ...] = ()

    def comparisons(self, names: Sequence[str]) -> Iterator[tuple[str, str, float]]:
        """Yield every pair of ``names``, one for each item, with the first one's outcome."""
        for first, second in combinations(names, 2):
            yield first, second, 0.5 if self.is_tie else 1.0


def read_judgements(files: Sequence[str]) -> list[Judgement]:
    """Read all judgements of the files.

    Raises:
        AlignError: A bad row, with file, line, field and reason.
    """
    found = []
    for file in files:
        for judgement in judgements_of(file):
            if isinstance(judgement, BadRow):
                raise AlignError(str(judgement))
            found.append(judgement)
    if not found:
        raise AlignError(f"{', '.join(files)}: no judgement in it; give a file with rows")
    return found


def judgements_of(file: str) -> Iterator[Judgement | BadRow]:
    """Yield the judgement of each row of the file, or its `BadRow`."""
    for row in read_source(DataSource(path=file)):
        try:
            yield row if isinstance(row, BadRow) else _whole(row)
        except BadRow as error:
            yield error


def _whole(row: Row) -> Judgement:
    """Parse a row, and refuse columns that have a meaning but were not read."""
    values = {name: value for name, value in row.values.items() if value is not None}
    fields = Fields(values, row.where, "preference")
    judgement = _judgement(row, fields)
    unread_columns(fields)
    return judgement


def _judgement(row: Row, fields: Fields) -> Judgement:
    prompt = fields.text("prompt") if "prompt" in fields else None
    annotator = fields.string("annotator") if "annotator" in fields else ""
    if "ranking" in fields:
        items = _strings(fields, "ranking")
        if len(items) < 2 or len(set(items)) < len(items):
            fields.bad("ranking", "not a list of at least two different items")
        models = _strings(fields, "models") if "models" in fields else ()
        if models and len(models) != len(items):
            fields.bad("models", f"{len(models)} names for {len(items)} items")
        return Judgement(row.where, prompt, items, annotator=annotator, models=models)
    is_ours = JUDGEMENT.a in fields and JUDGEMENT.b in fields
    found = JUDGEMENT if is_ours else comparison_of(row.values) or JUDGEMENT
    for name in (found.verdict, found.a, found.b):
        if name not in fields:
            there = ", ".join(map(str, fields.values)) or "none"
            wanted = "a judgement has a, b, winner (or response_a, response_b, winner), or ranking"
            fields.bad(name, "missing", f"{wanted}; there: {there}")
    winner = verdict_of(fields, found)
    items = (fields.string(found.a), fields.string(found.b))
    models = ()
    if "model_a" in fields and "model_b" in fields:
        models = (fields.string("model_a"), fields.string("model_b"))
    if items[0] == items[1] and not models:
        advice = "nothing can be learnt from it; remove the row"
        fields.bad(found.b, f"the same as {found.a}", advice)
    if winner == "b":
        items, models = items[::-1], models[::-1]
    return Judgement(row.where, prompt, items, winner == "tie", annotator, models)


def _strings(fields: Fields, name: str) -> tuple[str, ...]:
    value: Any = fields.get(name)
    if not isinstance(value, Sequence) or isinstance(value, str):
        fields.bad(name, "not a list")
    return tuple(fields.string(name, item) for item in value)


@dataclass(frozen=True)
class Field:
    """Named items and every comparison of them, by annotator; ties are 0.5."""

    names: tuple[str, ...]
    comparisons: dict[str, list[Comparison]]
    rankings: list[tuple[int, ...]]

    def all(self) -> list[Comparison]:
        return [c for cs in self.comparisons.values() for c in cs]


def field_of(judgements: Iterable[tuple[Judgement, Sequence[str]]]) -> Field:
    """Number the names in order of appearance, and collect their comparisons."""
    numbers: dict[str, int] = {}
    comparisons: dict[str, list[Comparison]] = defaultdict(list)
    rankings = []
    for judgement, names in judgements:
        ids = [numbers.setdefault(name, len(numbers)) for name in names]
        if len(set(ids)) < len(ids):  # a model against itself has no outcome
            continue
        for a, b, outcome in judgement.comparisons(names):
            comparisons[judgement.annotator].append((numbers[a], numbers[b], outcome))
        if not judgement.is_tie:
            rankings.append(tuple(ids))
    return Field(tuple(numbers), dict(comparisons), rankings)


def labels(judgements: Sequence[Judgement]) -> dict[tuple[str, str, str], dict[str, str]]:
    """Map (prompt, item, item) to annotator -> winner or ``tie``; the last judgement counts."""
    found: dict[tuple[str, str, str], dict[str, str]] = defaultdict(dict)
    for judgement in judgements:
        for first, second in combinations(judgement.items, 2):
            low, high = sorted((first, second))
            said = "tie" if judgement.is_tie else ("low" if first == low else "high")
            found[str(judgement.prompt), low, high][judgement.annotator] = said
    return dict(found)
