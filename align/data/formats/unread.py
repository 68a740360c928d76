"""Columns that a format does not read: extra ones, which are reported, and meaningful ones.

Readers take values through ``Fields``, which remembers what was asked for. What is left over after
a row was read is looked at here, whatever the format. A column that other tools give a meaning
(system text, tools, images, weights, thinking, ...) would change the task if it were left out, so
its row is refused; any other is an extra column, and its name is reported.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any, TypeVar

from align.data.formats.fields import Fields
from align.data.formats.rankings import Rated
from align.data.formats.tool_turns import tools_of
from align.data.formats.turn_keys import TOOLS, TRAIN, NotTurns, has_content
from align.types import Message, PreferencePair, PromptExample, SFTExample, Text

Read = TypeVar("Read", bound=SFTExample | PreferencePair | PromptExample | Rated)

SYSTEM = ("system", "system_prompt", "system_message")
_MEDIA = ("images", "image", "videos", "video", "audios", "audio")
_CALLS = ("functions", "function_call", "tool_calls")
_BESIDE_STRINGS = "beside a prompt that is a string, which no chat template is put around"
_THOUGHTS = ("thinking", "thinking_content", "reasoning", "reasoning_content")

MOST_SHOWN = 12
"""Names of a line."""
_REMOVE = "remove the column, or the row"
MEANING: dict[str, tuple[str, str]] = {
    **dict.fromkeys(
        SYSTEM,
        (
            _BESIDE_STRINGS,
            'write the prompt as turns: [{"role": "system", "content": ...}, {"role": "user", '
            '"content": ...}], or have it read as the instruction of a conversation: '
            "data.columns.instruction=COLUMN",
        ),
    ),
    **dict.fromkeys(_MEDIA, ("not supported", "only text is: remove the row")),
    TOOLS: (
        _BESIDE_STRINGS,
        "write the prompt as turns, have it read as the instruction of a conversation "
        f"(data.columns.instruction=COLUMN), or {_REMOVE}",
    ),
    **dict.fromkeys(
        _CALLS,
        ("not supported", f"give a column tools, write calls into turns, or {_REMOVE}"),
    ),
    "history": ("not read in this format", "write the conversation as turns: messages, or prompt"),
    "chat_template_kwargs": ("not supported", _REMOVE),
    "weights": ("not supported", 'mark turns that are not trained on with "weight": 0 in them'),
    "message_tree_id": (
        "rows that are messages of a tree (OASST)",
        "write each path from root to leaf as one row of messages",
    ),
}
_OF_ANSWERS = dict.fromkeys(
    _THOUGHTS,
    (
        "not read: thinking belongs into its turn",
        'give turns: {"role": "assistant", "reasoning_content": ..., "content": ...}, '
        f"or {_REMOVE}",
    ),
)
_MARGIN = ("not read in this format", f"give prompt + chosen + rejected + margin, or {_REMOVE}")


def unread_columns(fields: Fields) -> list[str]:
    """The file's columns that were not read, and keys of turns as ``turns[].key``.

    Raises:
        BadRow: One of them carries a meaning, or `data.columns` names it: it would have no effect.
    """
    extra = []
    for name, value in _untouched(fields).items():
        problem = _problem(fields, name, value)
        if problem is not None:
            fields.bad(name, *problem)
        if name in fields.renamed and fields.kind != "prompt":
            advice = f"take data.columns.{name} out (`align data`: --columns)"
            fields.bad(name, "named in data.columns, but this format does not read it", advice)
        if has_content(value):
            extra.append(name)
    hidden = (f"{name} (data.columns names another)" for name in fields.hidden)
    return [*extra, *hidden, *(f"turns[].{key}" for key in sorted(fields.left_out))]


def _untouched(fields: Fields) -> dict[str, Any]:
    """Columns of the row that its format did not read, blank ones too."""
    taken = {fields.renamed[name] for name in fields.used if name in fields.renamed}
    read = {*fields.used, *(name for name in taken if name not in fields.renamed)}
    return {name: value for name, value in fields.values.items() if name not in read}


def not_read(unread: Iterable[str], noted: Iterable[Mapping[str, int]] = ()) -> str:
    """The end of a line about data: rows with a remark, and columns that are not read."""
    counts: Counter[str] = Counter()
    for reasons in noted:
        counts.update(reasons)
    remarks = "".join(f"; {count:,} rows: {reason}" for reason, count in counts.items())
    names = list(dict.fromkeys(unread))
    shown = ", ".join(names[:MOST_SHOWN])
    more = f" and {len(names) - MOST_SHOWN} more" if len(names) > MOST_SHOWN else ""
    return f"{remarks}; columns not read: {shown}{more}" if names else remarks


def _problem(fields: Fields, name: str, value: Any) -> tuple[str, str] | None:
    """Say why a row with this column cannot be used, and what to do; None for an extra column."""
    if name in ("weight", "sample_weight", "loss_weight") and has_content(value):
        try:
            return None if float(value) == 1 else ("of a row is not supported", _WEIGHT)
        except (TypeError, ValueError):
            return None  # of something else
    if name in ("label", "kto_tag") and fields.kind == "sft":
        is_no = value is False or str(value).strip().lower() == "false"
        if "completion" in fields.used:  # elsewhere a 0 may be a class
            is_no = is_no or str(value).strip() in ("0", "0.0")
        return ("false: an answer that is not to be learnt", "remove the row") if is_no else None
    if not has_content(value):
        return None
    if name == "margin" and fields.kind == "preference":
        return _MARGIN
    if name in ("input", "context") and "instruction" in {*fields.used, *fields.renamed.values()}:
        how = "data.columns.input=context" if name == "context" else "leave instruction its name"
        return "not read here, though it is a part of the instruction", how
    if name in _OF_ANSWERS and fields.kind != "prompt":
        # beside two answers it is a judge's, of whom nothing is learnt
        is_judges = name == "reasoning" and fields.kind == "preference"
        return None if is_judges else _OF_ANSWERS[name]
    return MEANING.get(name)


_WEIGHT = "give data.train[].weight to a file of such rows, or remove the column"


def completed(example: Read, fields: Fields) -> Read:
    """The example with the row's system text and tools; a prompt of strings stays as it is.

    The system text becomes the first turn. Tools are kept in the first turn, whichever it is.
    Marks of turns that are not trained on are taken out of prompts, of which nothing is.

    Raises:
        BadRow: The conversation has another system text or other tools already.
    """
    where = "prompt"
    if isinstance(example, SFTExample) and example.messages is not None:
        where = "messages"
    turns: Text | None = getattr(example, where)
    if turns is None or isinstance(turns, str):
        return example
    tools, bare = _tools(fields, turns)
    whole = (*_system(fields, bare), *bare)
    if tools:
        whole = ({**whole[0], TOOLS: tools}, *whole[1:])
    if where == "prompt":
        whole = tuple({key: turn[key] for key in turn if key != TRAIN} for turn in whole)
    changed: dict[str, Any] = {where: whole}
    return example if whole == turns else replace(example, **changed)


def _system(fields: Fields, turns: Sequence[Message]) -> tuple[Message, ...]:
    """The turn that has to be put in front of the others, if there is one."""
    names = [name for name in SYSTEM if has_content(fields.values.get(name))]
    said = [fields.string(name) for name in names]
    own = [turn["content"] for turn in turns if turn["role"] in ("system", "developer")]
    if len({text.strip() for text in (*said, *own[:1])}) > 1 and said:
        fields.bad(names[0], "differs from the row's other system text", "keep one of them")
    return ({"role": "system", "content": said[0]},) if said and not own else ()


def _tools(
    fields: Fields, turns: tuple[Message, ...]
) -> tuple[list[Any] | None, tuple[Message, ...]]:
    """The tools of the row's column, or of its first turn, and the turns without them."""
    own, value = turns[0].get(TOOLS), fields.values.get(TOOLS)
    if own:
        turns = ({key: turns[0][key] for key in turns[0] if key != TOOLS}, *turns[1:])
    if not has_content(value):
        return own, turns
    fields.used.add(TOOLS)
    try:
        tools = tools_of(value)
    except NotTurns as error:
        fields.bad(TOOLS, str(error).removeprefix(f"{TOOLS}: "), error.advice)
    if own and own != tools:
        fields.bad(TOOLS, "differ from those of the first turn", "keep one of them")
    return tools, turns


def with_extras(example: Read, fields: Fields) -> Read:
    """A prompt with the row's unread columns, as JSON has them, for rewards."""
    if not isinstance(example, PromptExample):
        return example
    # bytes say nothing to a reward
    kept = {k: v for k, v in _untouched(fields).items() if not isinstance(v, bytes)}
    named = {*fields.used, *fields.renamed, *fields.renamed.values()}
    kept |= dict.fromkeys(sorted(fields.null - named))
    if isinstance(example.prompt, tuple) and TOOLS in example.prompt[0]:
        kept[TOOLS] = example.prompt[0][TOOLS]
    if not kept:
        return example
    changed: dict[str, Any] = {"extra": {k: _as_json(fields, k, v) for k, v in kept.items()}}
    return replace(example, **changed)


def _as_json(fields: Fields, name: str, value: Any) -> Any:
    """A column's value as JSON has it, dates and decimals as text.

    Raises:
        BadRow: It is an object, such as an image, whose text would say nothing.
    """

    def as_text(inner: Any) -> str:
        if not isinstance(inner, date | time | timedelta | Decimal | bytes):
            fields.bad(name, f"is a {type(inner).__name__}", _REMOVE)
        return str(inner)

    return json.loads(json.dumps(value, default=as_text))
