"""Rows -> examples: which columns mean what.

Which format a row is in is decided by its columns alone. Preference rows are ``pairs.py``'s and
``rankings.py``'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import TypeAlias

from align.data.formats.comparisons import JUDGEMENT, comparison_of
from align.data.formats.fields import Fields, Kind, Turns, fields_of
from align.data.formats.naming import every_way
from align.data.formats.pairs import (
    NAMED_SETS,
    PairFormat,
    against_scores,
    alpaca,
    alpaca_answer,
    chosen_rejected,
    matched,
    pair_format,
    read_pair,
)
from align.data.formats.rankings import (
    RANKING,
    RATING,
    Rated,
    listwise_format,
    missing_rating,
    read_ranking,
    read_rating,
)
from align.data.formats.references import reference_of, references_of
from align.data.formats.turn_keys import TRAIN
from align.data.formats.turns import ALLOWED, ROLES
from align.data.formats.unread import completed, unread_columns, with_extras
from align.data.sources import BadRow, Row
from align.types import PreferencePair, PromptExample, SFTExample, Text

Example: TypeAlias = SFTExample | PreferencePair | PromptExample


def read_row(
    row: Row,
    kind: Kind,
    *,
    columns: Mapping[str, str],
    source: str,
    unread: MutableMapping[str, None] | None = None,
    note: Callable[[BadRow], None] | None = None,
) -> tuple[Example, ...] | Rated:
    """Read one row: one example, of a ranking several, or a response with its score.

    Args:
        row: As read from the file.
        kind: What it is to be read as.
        columns: Our field -> the file's column; ``info.post`` and ``texts.0`` reach inside.
        source: Name of the data set, kept with a pair.
        unread: Takes the names of the row's columns that its format does not read.
        note: Takes a remark on a row that is read all the same.

    Raises:
        BadRow: A field is missing, empty or of the wrong type, the pair is no preference, or a
            column carries a meaning that this format has no place for.
    """
    fields = fields_of(row, columns, kind)
    found = _read(fields, kind, source)
    if isinstance(found, Rated):
        found = completed(found, fields)
    else:
        found = tuple(completed(example, fields) for example in found)
    names = unread_columns(fields)
    if unread is not None:
        unread.update(dict.fromkeys(names))
    if isinstance(found, Rated):
        return found
    remark = against_scores(fields) if kind == "preference" else None
    if note is not None and remark is not None:
        note(remark)
    return tuple(with_extras(example, fields) for example in found)


def _read(fields: Fields, kind: Kind, source: str) -> tuple[Example, ...] | Rated:
    if kind == "sft":
        return (_sft(fields),)
    if kind == "prompt":
        return (_prompt(fields),)
    listwise = listwise_format(fields)
    if listwise == RATING:
        return read_rating(fields, source)
    if listwise == RANKING:
        return read_ranking(fields, source)
    lacking = missing_rating(fields)
    if lacking is not None:
        raise fields.missing(lacking)
    return (read_pair(fields, source),)


def format_name(row: Row, kind: Kind, *, columns: Mapping[str, str]) -> str:
    """Name the row's format, by the same rules that it is read by."""
    fields = fields_of(row, columns, kind)
    if kind == "preference":
        return listwise_format(fields) or pair_format(fields).name
    if kind == "prompt" and _named_set(fields):
        return f"prompts of {_named_set(fields)[0].name}"
    if kind == "prompt" and isinstance(fields.values.get("reward_model"), Mapping):
        return "verl prompts"
    names = {
        "messages": "messages",
        "conversations": "ShareGPT",
        "prompt": "prompts" if kind == "prompt" else "prompt + completion",
        "chosen": "prompts of pairs",
        "instruction": "Dolly" if "response" in fields and "output" not in fields else "alpaca",
        "completion": "prompt + completion",
        "text": "plain text",
    }
    if kind == "prompt":
        names = {"prompt": names["prompt"], **names}
    elif "text" in fields and "completion" not in fields:
        del names["prompt"]
    return next((name for column, name in names.items() if column in fields), "unknown")


def kind_of(row: Row, *, columns: Mapping[str, str]) -> Kind:
    """Guess the stage that a row was meant for, where nobody says.

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
    if comparison_of(sorted(names)):
        return "preference"
    learnt = {"completion", "messages", "conversations", "text"} & names
    if learnt or ("instruction" in names and alpaca_answer(fields)):
        return "sft"
    if not {"prompt", "instruction"} & names:
        there = ", ".join(map(str, row.values)) or "none"
        advice = f"they are {there}; say which is which: {every_way(map(str, row.values))}"
        raise BadRow(row.where, "columns", "do not tell what the row is", advice)
    return "prompt"


RANK = "`align data rank FILE --pairs pairs.jsonl` makes pairs of them"


def is_judgement(names: Iterable[str]) -> bool:
    """Tell whether the columns are what `align data rank` reads and no stage does."""
    names = set(names)
    compared = {JUDGEMENT.a, JUDGEMENT.b, JUDGEMENT.verdict} <= names
    ranked = "ranking" in names and "responses" not in names
    return (compared or ranked) and "chosen" not in names


def _sft(fields: Fields) -> SFTExample:
    for name in ("messages", "conversations"):
        if name in fields:
            messages = fields.turns(name)
            if not any(t["role"] == "assistant" and TRAIN not in t for t in messages):
                fields.bad(name, "no assistant turn to learn from", _roles_to_mend(messages))
            return SFTExample(id=fields.where, messages=messages)
    if "instruction" in fields and "prompt" not in fields:
        answer = fields.string(alpaca_answer(fields) or "output")
        turns = (*alpaca(fields), {"role": "assistant", "content": answer})
        return SFTExample(id=fields.where, messages=turns)
    if "completion" in fields or ("prompt" in fields and "text" not in fields):
        prompt, (completion,) = matched(fields, fields.text("prompt"), "completion")
        return SFTExample(id=fields.where, prompt=prompt, completion=completion)
    if "text" in fields:
        return SFTExample(id=fields.where, text=fields.string("text"))
    raise fields.missing("messages")


def _roles_to_mend(messages: Turns) -> str:
    """Advice on a conversation in which nobody's words are learnt."""
    strange = sorted({turn["role"] for turn in messages} - set(ROLES))
    if strange:
        return f"nobody knows the role {', '.join(map(repr, strange))}; allowed: {ALLOWED}"
    return "mend the row"


def _prompt(fields: Fields) -> PromptExample:
    prompt, references = _prompt_and_references(fields)
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        fields.bad("prompt", "its last turn is the assistant's", "end it with the user's turn")
    # a column `source` says where a row is from, unless `data.columns` says that it is the text
    source_text = next((n for n in ("source_text", "source") if _is_named(fields, n)), None)
    return PromptExample(
        id=fields.where,
        prompt=prompt,
        references=references,
        source_text=fields.string(source_text) if source_text else None,
    )


def _is_named(fields: Fields, name: str) -> bool:
    return name in fields and (name != "source" or name in fields.renamed)


def _named_set(fields: Fields) -> tuple[PairFormat, ...]:
    """The well-known set of pairs that a row is of, if it is one and has no prompt of its own."""
    if "prompt" in fields or "instruction" in fields:
        return ()
    return tuple(pairs for pairs in NAMED_SETS if pairs.holds(fields))[:1]


def _prompt_and_references(fields: Fields) -> tuple[Text, tuple[str, ...]]:
    if "prompt" in fields:
        return fields.text("prompt"), references_of(fields)
    for name in ("messages", "conversations"):
        if name in fields and "chosen" not in fields:
            turns = fields.turns(name)
            if turns[-1]["role"] == "assistant" and len(turns) > 1:
                return turns[:-1], (reference_of(fields, name, turns),)
            return turns, references_of(fields)
    if "chosen" in fields:
        return chosen_rejected(fields)[0], references_of(fields)
    if "instruction" in fields:
        answer = alpaca_answer(fields)
        if answer is None or not fields.value(answer):
            return alpaca(fields), references_of(fields)
        return alpaca(fields), (fields.string(answer),)
    for pairs in _named_set(fields):
        return pairs.read(fields)[0], references_of(fields)
    raise fields.missing("prompt")
