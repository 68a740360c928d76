"""Conversations: turns as files write them -> messages, and where a pair's prompt ends.

An implicit prompt ends at a turn's boundary and nowhere else: a common prefix of *strings* would
make prompt "", chosen "Paris " and rejected "London" of one pair, and prompt "Paris", chosen " ",
rejected "n" of another.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from align.base.suggest import alike, suggest
from align.data.formats.tool_turns import standard_calls, tools_of
from align.data.formats.turn_keys import (
    TOOLS,
    TRAIN,
    NotTurns,
    has_content,
    is_list,
    keys_of_turn,
    says_more,
)
from align.types import Message

ROLES = (
    "system", "developer", "user", "assistant", "tool", "function", "ipython", "observation",
    "document", "context",
)  # fmt: skip
"""Roles that any chat template may have; others are allowed where the template names them."""

_ALIASES = {
    "human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant",
    "ai": "assistant",
}  # fmt: skip
_COMMON = ("system", "developer", "user", "assistant", "human")
_NEAR = 0.8
"""Likeness from which on a role is a misspelt one: a template's own names are further off."""

_HH_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


def read_turns(value: Any, left_out: set[str] | None = None) -> tuple[Message, ...]:
    """Messages of a list of turns, or of one, with ``role``/``content`` or ``from``/``value``.

    Args:
        left_out: Takes the names of the turns' keys that are not kept.
    """
    turns = [value] if isinstance(value, Mapping) else value
    if isinstance(value, Mapping) and is_list(_either(value, "role", "from")):
        advice = "write a list of turns, one object each"  # as `datasets` gives a Sequence of dicts
        raise NotTurns("turns column by column: a list of roles, a list of contents", advice)
    if not is_list(turns):
        is_json = isinstance(turns, str) and turns.lstrip().startswith(("[", "{"))
        if is_json or is_written_turns(turns):
            raise NotTurns("not a list of turns, but text that may hold one", AS_A_LIST)
        raise NotTurns(f"not a list of turns but {kind_name(turns)}")
    if not turns:
        raise NotTurns("empty")
    left_out = set() if left_out is None else left_out
    found = tuple(_read_turn(t, left_out) for t in standard_calls(turns))
    if TOOLS in found[0]:  # as our own files of prompts have them
        return ({**found[0], TOOLS: tools_of(found[0][TOOLS])}, *found[1:])
    return found


def _read_turn(turn: Any, left_out: set[str]) -> Message:
    if is_written_turns(turn):
        raise NotTurns("a turn written as text", _EXAMPLE)
    if isinstance(turn, str):
        raise NotTurns("a list of texts, which does not say who speaks", f"one text, or {_EXAMPLE}")
    if not isinstance(turn, (dict, Mapping)):
        raise NotTurns("a turn is not an object", _EXAMPLE)
    role, content = _either(turn, "role", "from"), _either(turn, "content", "value")
    if is_list(content):
        content = _text_parts(content)
    if not isinstance(role, str):
        raise NotTurns("a turn without a role or without text", _has_keys(turn))
    meant = misspelt(role)
    if meant:
        advice = f"did you mean {meant}? Allowed: {ALLOWED}"
        raise NotTurns(f"role {role!r:.40}, which nobody has", advice)
    role = _ALIASES.get(role, role)
    keys = keys_of_turn(turn, role, left_out)
    if content is None and says_more(keys):
        content = ""  # a call of a tool may have no words
    if not isinstance(content, str):
        raise NotTurns("a turn without a role or without text", _has_keys(turn))
    return {"role": role, "content": content, **keys}


def _either(turn: Mapping[str, Any], name: str, other: str) -> Any:
    """The value under either name: where formats are mixed in Parquet, each turn has both keys."""
    value, second = turn.get(name), turn.get(other)
    if value is None:
        return second
    if second is not None and has_content(second) and second != value:
        raise NotTurns(f"a turn whose {name} and {other} differ", "keep one of them")
    return value


_EXAMPLE = 'write {"role": "user", "content": "..."}'


def _has_keys(turn: Mapping[str, Any]) -> str:
    there = ", ".join(f"{key} ({kind_name(value)})" for key, value in turn.items())
    return f"{_EXAMPLE}; there: {there:.200}"


def kind_name(value: Any) -> str:
    """Name a value's kind for a message: ``null``, ``a number (int)``, ``list``."""
    if value is None:
        return "null"
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    kind = type(value).__name__
    return f"a number ({kind})" if is_number else kind


ALLOWED = f"{', '.join(ROLES)} (or {', '.join(_ALIASES)})"


def misspelt(role: str) -> str | None:
    """The common role that a name was meant for; None for a role, and for what is like none.

    A name that is like none may be one that the chat template has: ``template.py`` looks there.
    """
    if role in ROLES or role in _ALIASES:
        return None
    bare = role.strip().lower()
    if bare in ROLES or bare in _ALIASES:
        return bare
    near = suggest(bare, _COMMON)
    return near if near and alike(bare, near) >= _NEAR else None


_TEXT_TYPES = (None, "text", "input_text", "output_text")
_TEXT_KEYS = ("type", "text", "value", "cache_control", "annotations", "citations", "index", "id")


def _text_parts(parts: Sequence[Any]) -> str:
    """``[{"type": "text", "text": ...}, ...]`` as one string."""
    texts = []
    for part in parts:
        if not isinstance(part, Mapping):
            raise NotTurns("a turn with something other than text", _EXAMPLE)
        text, kind = _either(part, "text", "value"), part.get("type")
        more = [key for key in part if key not in _TEXT_KEYS and has_content(part[key])]
        if kind not in _TEXT_TYPES or more or not isinstance(text, str):
            named = kind if kind not in _TEXT_TYPES else more[0] if more else kind_name(text)
            advice = f"a part of it is {named!s:.40}: only text is supported; remove the row"
            raise NotTurns("a turn with something other than text", advice)
        texts.append(text)
    return "".join(texts)


AS_A_LIST = (
    "give the list itself, in JSONL or Parquet (a CSV has no lists); with pandas, of JSON text: "
    'df[NAME] = df[NAME].map(json.loads), then df.to_json(path, orient="records", lines=True)'
)
_SPEAKERS = "|".join((*ROLES, *_ALIASES))
_WRITTEN_ROLE = re.compile(rf"""['"](?:role|from)['"]\s*:\s*['"](?:{_SPEAKERS})['"]""")
_WRITTEN_WORDS = re.compile(r"""['"](?:content|value|tool_calls|function_call)['"]\s*:""")
_WRITTEN = re.compile(r"""\A\s*"?\s*(?:array\()?\s*[\[(]?\s*(?:\{|dict\()""")
_LOOKED_AT = 100_000


def is_written_list(text: str) -> bool:
    """Tell whether a text is a JSON list of texts, as LMSYS's comparisons write their prompts."""
    if not text.lstrip().startswith("["):
        return False
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)


def is_written_turns(value: Any) -> bool:
    """Tell whether a text is turns, as JSON or as Python prints them: a cell of a CSV, for one.

    It has to begin and end as a list or an object does, and to name a role and its words: text that
    only begins with a bracket, and JSON of other things, is text.
    """
    if not isinstance(value, str) or not _WRITTEN.match(value):
        return False
    if value.rstrip()[-1] not in ']})"':
        return False
    text = value[:_LOOKED_AT].replace('\\"', '"')
    return bool(_WRITTEN_ROLE.search(text) and _WRITTEN_WORDS.search(text))


def is_hh(value: Any) -> bool:
    """Recognise a dialogue as in HH-RLHF: ``\\n\\nHuman: ...\\n\\nAssistant: ...``."""
    return isinstance(value, str) and bool(re.match(r"\s*Human:", value)) and "Assistant:" in value


def read_hh(text: str) -> tuple[Message, ...]:
    _, *parts = _HH_TURN.split(text)
    names = {"Human": "user", "Assistant": "assistant"}
    return tuple(
        {"role": names[who], "content": said.strip()}
        for who, said in zip(parts[::2], parts[1::2], strict=True)
    )


def split_shared(
    chosen: tuple[Message, ...], rejected: tuple[Message, ...]
) -> tuple[tuple[Message, ...], tuple[Message, ...], tuple[Message, ...]]:
    """(prompt, chosen, rejected) of two whole conversations: the turns they share are the prompt.

    The prompt ends before an assistant's turn, and leaves at least one turn to each side.
    """
    most = min(len(chosen), len(rejected)) - 1
    shared = 0
    while shared < most and same_turn(chosen[shared], rejected[shared]):
        shared += 1
    while shared and chosen[shared - 1]["role"] == "assistant":
        shared -= 1
    return chosen[:shared], chosen[shared:], rejected[shared:]


def without_prompt(prompt: tuple[Message, ...], answer: tuple[Message, ...]) -> tuple[Message, ...]:
    """The answer without the prompt's turns, where it repeats them."""
    repeats = len(answer) > len(prompt) and all(map(same_turn, prompt, answer))
    return answer[len(prompt) :] if repeats else answer


def same_turn(a: Message, b: Message) -> bool:
    """Tell whether two turns say the same; whether they are trained on is not what they say."""

    def said(turn: Message) -> dict[str, Any]:
        words = {"content": turn["content"].strip()}
        return {key: value for key, value in {**turn, **words}.items() if key != TRAIN}

    return said(a) == said(b)
