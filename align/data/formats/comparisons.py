"""Two answers side by side and which of them won: ``response_a``, ``response_b``, ``winner``.

The columns of an arena's votes have many names. They are read where only one reading is possible:
one pair of columns, and a verdict whose whole text names a side or a tie. A number says which side
is meant only where it is a number of the columns (``response_0``). Any other number beside such
columns shows that the numbers count otherwise (from 0, -1 and 1, on a scale), so the rows before it
would be misread too: it refuses the whole file, whether or not bad rows are skipped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeAlias

from align.data.formats.fields import Fields
from align.data.readers.rows import Ambiguous

Side: TypeAlias = Literal["a", "b", "tie"]

_TEXTS = frozenset((
    "response", "answer", "completion", "output", "reply", "summary", "conversation",
    "generation", "candidate",
))  # fmt: skip
_WHOSE = frozenset(("model", "assistant"))
_SIDES = (("a", "b"), ("0", "1"), ("1", "2"))
VERDICTS = (
    "winner", "preference", "preferred", "verdict", "better", "better_response_id", "choice",
    "label",
)  # fmt: skip
"""Names of the column that says who won; the first that is there counts."""
_TIES = frozenset((
    "tie", "ties", "tied", "draw", "equal", "same", "both", "neither",
    "bothbad", "bothgood", "tie(bothbad)", "tie(bothgood)",
))  # fmt: skip
_PLACES = (("a", "left", "first"), ("b", "right", "second"))
_LONGEST_VERDICT = 64
"""Characters; a longer text names no side."""


@dataclass(frozen=True)
class Comparison:
    """Names of the columns; ``sides`` are the words that tell ``a`` and ``b`` apart in them."""

    a: str
    b: str
    verdict: str
    sides: tuple[str, str]


JUDGEMENT = Comparison("a", "b", "winner", ("a", "b"))
"""The columns that `align label` writes."""


def comparison_of(columns: Iterable[str]) -> Comparison | None:
    """The comparison that the columns hold; None where there is none, or more than one."""
    return _comparison(tuple(map(str, columns)))


def side_by_side(columns: Iterable[str]) -> tuple[str, str] | None:
    """Names of two columns that hold an answer each, whether or not a column says who won."""
    found = _answers(tuple(map(str, columns)))
    return (found[0], found[1]) if found else None


@lru_cache(maxsize=256)
def _comparison(columns: tuple[str, ...]) -> Comparison | None:
    answers = _answers(columns)
    verdict = next((name for name in VERDICTS if name in columns), None)
    return Comparison(answers[0], answers[1], verdict, answers[2]) if answers and verdict else None


@lru_cache(maxsize=256)
def _answers(columns: tuple[str, ...]) -> tuple[str, str, tuple[str, str]] | None:
    named = {tuple(_words(column)): column for column in columns}
    found = []
    for words, column in named.items():
        for a, b in _SIDES:
            others = {word for word in words if word != a}
            other = named.get(tuple(b if word == a else word for word in words))
            is_answer = others & _TEXTS and others <= _TEXTS | _WHOSE and words.count(a) == 1
            if is_answer and other is not None:
                found.append((column, other, (a, b)))
    return found[0] if len(found) == 1 else None


def _words(name: str) -> list[str]:
    return re.findall(r"[^\W\d_]+|\d+", name.lower())


def verdict_of(fields: Fields, found: Comparison) -> Side:
    """Name the side that won.

    Raises:
        Ambiguous: A number that is none of the numbers of the columns.
        BadRow: The verdict is neither side nor a tie.
    """
    value = fields.get(found.verdict)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of numbers in which one is missing
    is_word = isinstance(value, str | int) and not isinstance(value, bool)
    said = _joined(str(value)) if is_word else ""
    if said in _TIES:
        return "tie"
    if said in _names_of(found.sides[0], 0):
        return "a"
    if said in _names_of(found.sides[1], 1):
        return "b"
    a, b = found.sides
    reason, hint = f"not one of {a}, {b}, tie", f"it is {value!r:.40}"
    if not _is_number(value, said):
        fields.bad(found.verdict, reason, hint)
    hint += ": which of the answers a number means is not said"
    if a.isdigit():
        advice = (
            f"{hint}; write {found.a}, {found.b} or tie there, or name a column that says it: "
            "data.columns.winner=NAME (data.on_bad_row=skip does not help: the other numbers may "
            "mean the other answer)"
        )
        raise Ambiguous(fields.where, found.verdict, reason, advice)
    return fields.bad(found.verdict, reason, f"{hint}; write {a}, {b} or tie there")


def _joined(text: str) -> str:
    """Text in lower case without white space and underscores, and without hyphens in words."""
    if len(text) > _LONGEST_VERDICT:
        return ""
    return re.sub(r"[\s_]+|(?<=\w)-(?=\w)", "", text.lower())


@lru_cache(maxsize=8)
def _names_of(side: str, number: int) -> frozenset[str]:
    """All names of a side as `_joined` gives them: ``a``, ``modela``, ``responsea``, ``first``."""
    nouns = ("", *_TEXTS | _WHOSE)
    sides = {side, *_PLACES[number]}
    return frozenset(
        name
        for this in sides
        for one in nouns
        for other in nouns
        for name in (one + other + this, one + this + other, this + one + other)
    )


def _is_number(value: object, said: str) -> bool:
    """Tell if a verdict is a number, or a number behind a noun: ``2``, ``-1``, ``response_3``."""
    if isinstance(value, int | float):
        return not isinstance(value, bool)
    for noun in _TEXTS | _WHOSE:
        said = said.removeprefix(noun).removesuffix(noun)
    return any(map(str.isdigit, said)) and not any(map(str.isalpha, said))
