"""Two answers side by side and which of them won: ``response_a``, ``response_b``, ``winner``.

The columns of an arena's votes have many names. They are read where only one reading is possible:
one pair of columns, and a verdict that names a side or a tie. A number says which side is meant
only beside columns with numbers (``response_0``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeAlias

from align.data.formats.fields import Fields

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
_TIES = frozenset(("tie", "ties", "draw", "equal", "same", "both", "neither", "bothbad"))


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
    """Who won.

    Raises:
        BadRow: The verdict is neither side nor a tie.
    """
    value = fields.get(found.verdict)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of numbers in which one is missing
    is_word = isinstance(value, str | int) and not isinstance(value, bool)
    said = [word for word in _words(str(value)) if word not in _TEXTS | _WHOSE] if is_word else []
    if said and said[0] in _TIES:
        return "tie"
    a, b = found.sides
    if said in ([a], ["a"]):
        return "a"
    if said in ([b], ["b"]):
        return "b"
    hint = f"it is {value!r:.40}"
    if is_word and str(value).strip().lstrip("-").isdigit():
        hint += ": which of the answers a number means is not said"
    return fields.bad(found.verdict, f"not one of {a}, {b}, tie", hint)
