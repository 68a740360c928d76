"""One row's values under our names, and what may be asked of them: words, turns, numbers.

Nothing is repaired: a value that is missing, empty or of the wrong kind is a ``BadRow``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, TypeAlias

from align.data.formats import BadRow, Row
from align.data.turns import NotTurns, is_list, read_turns
from align.nearest import nearest
from align.types import AlignError, Message, Text

Kind: TypeAlias = Literal["sft", "preference", "prompt"]
Turns: TypeAlias = tuple[Message, ...]

NEEDED: dict[Kind, str] = {
    "sft": "messages, prompt + completion, instruction + output, or text",
    "preference": "prompt + chosen + rejected, or chosen + rejected as whole conversations",
    "prompt": "prompt, or messages",
}
NAMES = (
    "prompt", "completion", "messages", "conversations", "text", "chosen", "rejected", "margin",
    "references", "responses", "response", "score", "source", "subset", "instruction", "input",
    "output", "history", "system", "labels", "human_ref_A", "human_ref_B", "summaries", "choice",
    "info", "question", "answer_0", "answer_1", "score_0", "score_1", "targets", "target_scores",
    "tools", "images", "videos", "audios",
)  # fmt: skip
"""All names that a format has: what ``columns`` may say."""

_NOT_TEXT = ("tools", "images", "videos", "audios")  # columns whose loss would change the task


@dataclass(frozen=True)
class Fields:
    """A row's values under our names, those that are null left out."""

    values: Mapping[str, Any]
    where: str
    kind: Kind
    # names that the row has, with nothing in them
    null: frozenset[str] = frozenset()

    def __contains__(self, field: str) -> bool:
        return field in self.values

    def bad(self, field: str, reason: str, advice: str = "mend the row") -> NoReturn:
        raise BadRow(self.where, field, reason, advice)

    def missing(self, field: str) -> BadRow:
        if field in self.null:
            return BadRow(self.where, field, "null", "give it a value or remove the row")
        there = ", ".join(map(str, self.values)) or "none"
        advice = (
            f"needed: {NEEDED[self.kind]}; there: {there}; if one of them is it, say so: "
            f"data.columns.{field}=NAME (`align data`: --columns {field}=NAME)"
        )
        return BadRow(self.where, field, "missing", advice)

    def get(self, field: str) -> Any:
        if field not in self.values:
            raise self.missing(field)
        return self.values[field]

    def string(self, field: str, value: Any = None) -> str:
        value = self.get(field) if value is None else value
        if not isinstance(value, str):
            self.bad(field, f"not a string but {type(value).__name__}")
        self.check_words(field, value)
        return value

    def turns(self, field: str, value: Any = None) -> Turns:
        """A conversation, ``system`` of the row in front of it if there is one."""
        try:
            turns = read_turns(self.get(field) if value is None else value)
        except NotTurns as error:
            self.bad(field, str(error), error.advice)
        for name in _NOT_TEXT:
            if self.values.get(name):
                self.bad(name, "not supported", "only text is: remove the row")
        for turn in turns:
            if turn["role"] != "system":
                self.check_words(field, turn["content"])
        system = self.values.get("system")
        if field in ("conversations", "instruction") and system:
            return ({"role": "system", "content": self.string("system")}, *turns)
        return turns

    def text(self, field: str) -> Text:
        """A string, or a conversation."""
        value = self.get(field)
        if isinstance(value, Mapping) or is_list(value):
            return self.turns(field)
        return self.string(field)

    def check_words(self, field: str, value: str) -> None:
        if not value.strip():
            self.bad(field, "empty", "give it a text or remove the row")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            self.bad(field, "half of a surrogate pair (\\ud800...), which is no character")

    def number(self, field: str) -> float:
        value = self.get(field)
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            self.bad(field, "not a number", f"it is {value!r:.40}")
        if not math.isfinite(number):
            self.bad(field, "not a finite number", f"it is {value!r:.40}")
        return number


def check_names(columns: Mapping[str, str]) -> None:
    """Refuse a name of ours that no format has: it would change nothing."""
    for name in columns:
        if name not in NAMES:
            near = nearest(name, NAMES)
            hint = f"did you mean {near}?" if near else f"there are {', '.join(NAMES)}"
            raise AlignError(f"data.columns.{name}: no such field; {hint}")


def fields_of(row: Row, columns: Mapping[str, str], kind: Kind) -> Fields:
    """The row's values under our names; ``columns`` is ours -> the file's."""
    values = dict(row.values)
    for ours, theirs in columns.items():
        found, value = _dig(row.values, theirs)
        if not found:
            there = ", ".join(map(str, row.values)) or "none"
            advice = f"there: {there}; correct data.columns.{ours} (`align data`: --columns)"
            raise BadRow(row.where, ours, f"column {theirs!r} is missing", advice)
        values[ours] = value
    given = {name: value for name, value in values.items() if value is not None}
    return Fields(given, row.where, kind, frozenset(values.keys() - given.keys()))


def _dig(values: Any, path: str) -> tuple[bool, Any]:
    """(found, value) of a column, or of ``a.b.0`` inside nested ones."""
    if isinstance(values, Mapping) and path in values:
        return True, values[path]
    for key in path.split("."):
        if isinstance(values, Mapping) and key in values:
            values = values[key]
        elif isinstance(values, str):
            return False, None
        elif isinstance(values, Sequence) and key.isdecimal() and int(key) < len(values):
            values = values[int(key)]
        else:
            return False, None
    return True, values
