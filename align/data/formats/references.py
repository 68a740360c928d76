"""Reference answers of a prompt: texts, whole numbers, the last turn of a conversation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align.data.formats.fields import Fields, Turns
from align.data.formats.turn_keys import is_list
from align.data.formats.turns import kind_name

NAMES = ("references", "reference", "completion")
"""Columns that may hold them, the first that is there counts."""


def references_of(fields: Fields) -> tuple[str, ...]:
    """The row's references; none where it has no such column."""
    name = next((name for name in NAMES if name in fields), None)
    if name is not None:
        return _texts(fields, name, fields.get(name))
    graded = fields.values.get("reward_model")
    if not isinstance(graded, Mapping) or "ground_truth" not in graded:
        return ()
    fields.used.add("reward_model")
    truth = graded["ground_truth"]
    if truth is None:
        return ()
    return _texts(fields, "reward_model.ground_truth", truth)


def reference_of(fields: Fields, name: str, turns: Turns) -> str:
    """The words of the last turn, which is to be the reference."""
    words = turns[-1]["content"]
    if not words.strip():
        fields.bad(name, "its last turn has no words to compare with", "end it before that turn")
    return str(words)


def _texts(fields: Fields, name: str, value: Any) -> tuple[str, ...]:
    if is_list(value) and not any(isinstance(item, Mapping) for item in value):
        return tuple(_text(fields, name, item) for item in value)
    if is_list(value) or (isinstance(value, Mapping) and ("role" in value or "from" in value)):
        return (reference_of(fields, name, fields.turns(name, value)),)
    return (_text(fields, name, value),)


def _text(fields: Fields, name: str, value: Any) -> str:
    """A text; of a whole number its digits, which are written in one way only."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        advice = 'write it in quotes, as it is to be compared: "0.50"'
        if value is None or is_list(value) or isinstance(value, Mapping) or value != value:
            advice = "give one text, or a list of texts"
        fields.bad(name, f"not a text but {kind_name(value)}", advice)
    return fields.string(name, value)
