"""Rows -> examples: which columns mean what.

Which format a row is in is decided by its columns alone. Preference rows are ``pairs.py``'s and
``rankings.py``'s.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import TypeAlias

from align.data.fields import Fields, Kind, fields_of
from align.data.formats import BadRow, Row
from align.data.naming import every_way
from align.data.pairs import alpaca, chosen_rejected, matched, pair_format, read_pair
from align.data.rankings import (
    RANKING,
    RATING,
    Rated,
    listwise_format,
    read_ranking,
    read_rating,
)
from align.types import PreferencePair, PromptExample, SFTExample, Text

Example: TypeAlias = SFTExample | PreferencePair | PromptExample


def read_row(
    row: Row, kind: Kind, *, columns: Mapping[str, str], source: str
) -> tuple[Example, ...] | Rated:
    """What one row says: one example, of a ranking several, or a response with its score.

    Args:
        row: As read from the file.
        kind: What it is to be read as.
        columns: Our field -> the file's column; ``info.post`` and ``texts.0`` reach inside.
        source: Name of the data set, kept with a pair.

    Raises:
        BadRow: A field is missing, empty or of the wrong type, or the pair is no preference.
    """
    fields = fields_of(row, columns, kind)
    if kind == "sft":
        return (_sft(fields),)
    if kind == "prompt":
        return (_prompt(fields),)
    listwise = listwise_format(fields)
    if listwise == RATING:
        return read_rating(fields, source)
    if listwise == RANKING:
        return read_ranking(fields, source)
    return (read_pair(fields, source),)


def format_name(row: Row, kind: Kind, *, columns: Mapping[str, str]) -> str:
    """What the row's format is called, by the same rules that it is read by."""
    fields = fields_of(row, columns, kind)
    if kind == "preference":
        return listwise_format(fields) or pair_format(fields).name
    if kind == "sft" and "completion" in fields:
        return "prompt + completion"
    names = {
        "prompt": "prompts",
        "messages": "messages",
        "conversations": "ShareGPT",
        "chosen": "prompts of pairs",
        "instruction": "alpaca",
        "text": "plain text",
    }
    return next((name for column, name in names.items() if column in fields), "unknown")


def kind_of(row: Row, *, columns: Mapping[str, str]) -> Kind:
    """What a row was most likely meant for, where nobody says.

    Raises:
        BadRow: It has no column that could tell, or is a judgement, which is no row to train on.
    """
    names = {*row.values, *columns}
    if is_judgement(names):
        advice = f"{RANK}; --kind prompt reads their prompts alone"
        raise BadRow(row.where, "columns", "are of judgements", advice)
    fields = fields_of(row, columns, "preference")
    if {"chosen", "summaries", "human_ref_A", "answer_0"} & names or listwise_format(fields):
        return "preference"
    learnt = {"completion", "messages", "conversations", "text"} & names
    if learnt or {"instruction", "output"} <= names:
        return "sft"
    if not {"prompt", "instruction"} & names:
        there = ", ".join(map(str, row.values)) or "none"
        advice = f"they are {there}; say which is which: {every_way(map(str, row.values))}"
        raise BadRow(row.where, "columns", "do not tell what the row is", advice)
    return "prompt"


RANK = "`align data rank FILE --pairs pairs.jsonl` makes pairs of them"


def is_judgement(names: Container[str]) -> bool:
    """Whether the columns are what `align data rank` reads and no stage does."""
    compared = all(name in names for name in ("a", "b", "winner"))
    ranked = "ranking" in names and "responses" not in names
    return (compared or ranked) and "chosen" not in names


def _sft(fields: Fields) -> SFTExample:
    for name in ("messages", "conversations"):
        if name in fields:
            messages = fields.turns(name)
            if not any(t["role"] == "assistant" for t in messages):
                fields.bad(name, "no assistant turn to learn from")
            return SFTExample(id=fields.where, messages=messages)
    if "completion" in fields or ("prompt" in fields and "text" not in fields):
        prompt, (completion,) = matched(fields, fields.text("prompt"), "completion")
        return SFTExample(id=fields.where, prompt=prompt, completion=completion)
    if "instruction" in fields:
        answer = {"role": "assistant", "content": fields.string("output")}
        return SFTExample(id=fields.where, messages=(*alpaca(fields), answer))
    if "text" in fields:
        return SFTExample(id=fields.where, text=fields.string("text"))
    raise fields.missing("messages")


def _prompt(fields: Fields) -> PromptExample:
    prompt, references = _prompt_and_references(fields)
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        fields.bad("prompt", "its last turn is the assistant's", "end it with the user's turn")
    source_text = next((n for n in ("source_text", "source") if n in fields), None)
    return PromptExample(
        id=fields.where,
        prompt=prompt,
        references=references,
        source_text=fields.string(source_text) if source_text else None,
    )


def _prompt_and_references(fields: Fields) -> tuple[Text, tuple[str, ...]]:
    if "prompt" in fields:
        return fields.text("prompt"), _references(fields)
    for name in ("messages", "conversations"):
        if name in fields and "chosen" not in fields:
            turns = fields.turns(name)
            if turns[-1]["role"] == "assistant" and len(turns) > 1:
                return turns[:-1], (turns[-1]["content"],)
            return turns, _references(fields)
    if "chosen" in fields:
        return chosen_rejected(fields)[0], _references(fields)
    if "instruction" in fields:
        output = fields.values.get("output")
        return alpaca(fields), (fields.string("output"),) if output else ()
    raise fields.missing("prompt")


def _references(fields: Fields) -> tuple[str, ...]:
    for name in ("references", "reference", "completion"):
        if name not in fields:
            continue
        value = fields.get(name)
        if isinstance(value, str):
            return (fields.string(name),)
        if isinstance(value, Sequence) and all(isinstance(v, str) for v in value):
            return tuple(fields.string(name, v) for v in value)
        return (fields.turns(name)[-1]["content"],)
    return ()
