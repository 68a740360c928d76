"""One row's values under our names, and what may be asked of them: words, turns, numbers.

Nothing is repaired: a value that is missing, empty or of the wrong kind is a ``BadRow``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn, TypeAlias

from align.base.suggest import suggest
from align.data.formats.turn_keys import NotTurns, is_list, says_more
from align.data.formats.turns import (
    AS_A_LIST,
    is_written_list,
    is_written_turns,
    kind_name,
    read_turns,
)
from align.data.sources import BadRow, Row
from align.types import AlignError, Message, Text

Kind: TypeAlias = Literal["sft", "preference", "prompt"]
Turns: TypeAlias = tuple[Message, ...]

NEEDED: dict[Kind, str] = {
    "sft": "messages, prompt + completion, instruction + output, or text",
    "preference": "prompt + chosen + rejected, or chosen + rejected as whole conversations, or "
    "prompt + response + score",
    "prompt": "prompt, or messages",
}
NAMES = (
    "prompt", "completion", "messages", "conversations", "text", "chosen", "rejected", "margin",
    "references", "reference", "responses", "response", "score", "rating", "label", "source",
    "source_text", "subset", "instruction", "input", "context", "output", "history", "system",
    "system_prompt", "system_message", "labels", "human_ref_A", "human_ref_B", "summaries",
    "choice", "info", "question", "answer_0", "answer_1", "score_0", "score_1", "targets",
    "target_scores", "tools", "images", "videos", "audios", "response_a", "response_b", "winner",
)  # fmt: skip
"""All names that a format has: what ``columns`` may say."""
_PROMPTS = ("prompt", "instruction")
_TRUTH = {"true": 1.0, "false": 0.0}


@dataclass(frozen=True)
class Fields:
    """A row's values under our names, those that are null left out."""

    values: Mapping[str, Any]
    where: str
    kind: Kind
    # names that the row has, with nothing in them
    null: frozenset[str] = frozenset()
    # ours -> the file's column, where `columns` says so; of a path its first part
    renamed: Mapping[str, str] = field(default_factory=dict)
    # the file's columns of these names, in whose place `columns` puts others
    hidden: tuple[str, ...] = ()
    # names that were read, and keys of turns that were left out: `unread.py` looks at the others
    used: set[str] = field(default_factory=set)
    left_out: set[str] = field(default_factory=set)

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
        return self.value(field)

    def value(self, field: str) -> Any:
        """The value, which counts as read from now on; None where there is none."""
        self.used.add(field)
        return self.values.get(field)

    def string(self, field: str, value: Any = None) -> str:
        value = self.get(field) if value is None else value
        if not isinstance(value, str):
            advice = "write it in quotes" if isinstance(value, int | float) else "mend the row"
            self.bad(field, f"not a string but {kind_name(value)}", advice)
        self.check_words(field, value)
        if is_written_turns(value):
            self.bad(field, "turns written as text", AS_A_LIST)
        if field in _PROMPTS and is_written_list(value):
            self.bad(field, "a list written as text", f"give one text, or turns: {AS_A_LIST}")
        return value

    def turns(self, field: str, value: Any = None) -> Turns:
        """A conversation, its words checked."""
        try:
            turns = read_turns(self.get(field) if value is None else value, self.left_out)
        except NotTurns as error:
            self.bad(field, str(error), error.advice)
        for turn in turns:
            may_be_empty = turn["role"] in ("system", "developer") or says_more(turn)
            self.check_words(field, turn["content"], may_be_empty=may_be_empty)
        return turns

    def text(self, field: str) -> Text:
        """A string, or a conversation."""
        value = self.get(field)
        if isinstance(value, Mapping) or is_list(value):
            return self.turns(field)
        return self.string(field)

    def check_words(self, field: str, value: str, *, may_be_empty: bool = False) -> None:
        if not may_be_empty and not value.strip():
            self.bad(field, "empty", "give it a text or remove the row")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            self.bad(field, "half of a surrogate pair (\\ud800...), which is no character")

    def label(self, field: str) -> float:
        """A number, or a boolean as JSON, CSV or a spreadsheet writes it."""
        value = self.get(field)
        if isinstance(value, bool):
            return float(value)
        if isinstance(value, str) and value.strip().lower() in _TRUTH:
            return _TRUTH[value.strip().lower()]
        return self.number(field)

    def number(self, field: str) -> float:
        value = self.get(field)
        if isinstance(value, bool):
            self.bad(field, "not a number", f"it is {value}")
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
            near = suggest(name, NAMES)
            hint = f"did you mean {near}?" if near else f"there are {', '.join(NAMES)}"
            raise AlignError(f"data.columns.{name}: no such field; {hint}")


def fields_of(row: Row, columns: Mapping[str, str], kind: Kind) -> Fields:
    """The row's values under our names; ``columns`` is ours -> the file's."""
    values, renamed = dict(row.values), {}
    for ours, theirs in columns.items():
        found, value = _dig(row.values, theirs)
        if not found:
            there = ", ".join(map(str, row.values)) or "none"
            advice = f"there: {there}; correct data.columns.{ours} (`align data`: --columns)"
            raise BadRow(row.where, ours, f"column {theirs!r} is missing", advice)
        values[ours] = value
        renamed[ours] = theirs if theirs in row.values else theirs.partition(".")[0]
    for ours, theirs in renamed.items():
        if ours in _PROMPTS and theirs in _PROMPTS and theirs not in columns and ours != theirs:
            values.pop(theirs)  # the prompt is moved: which name it has decides how it is read
    given = {name: value for name, value in values.items() if value is not None}
    null = frozenset(values.keys() - given.keys())
    read = set(renamed.values())
    hidden = tuple(n for n in renamed if row.values.get(n) is not None and n not in read)
    return Fields(given, row.where, kind, null, renamed, hidden)


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
