"""Tools and their calls as trainers write them -> as chat templates expect them.

LLaMA-Factory and ms-swift give calls and results roles of their own, with the call as JSON text.
Templates expect an assistant's ``tool_calls`` and turns of the role ``tool``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from align.data.formats.turn_keys import NotTurns, is_list, json_value

CALLS = ("function_call", "tool_call")
RESULTS = ("observation", "tool_response")
_ROLE, _WORDS = ("role", "from"), ("content", "value")
_EXAMPLE = (
    'give [{"type": "function", "function": {"name": ..., "description": ..., "parameters": '
    "{...}}}], or the same as JSON text"
)


def tools_of(value: Any) -> list[Any]:
    """Tools that the assistant may call, as `apply_chat_template` takes them.

    A function that stands alone is put under ``{"type": "function", "function": ...}``. Nulls are
    taken out of objects, because Parquet gives every object the keys of all others; JSON text is
    taken as it is.

    Raises:
        NotTurns: It is no list of objects with a name each.
    """
    tools = _from_json(value) if isinstance(value, str) else _without_nulls(value)
    if not is_list(tools):
        raise NotTurns("not a list of tools", _EXAMPLE)
    found = []
    for tool in tools:
        tool = _from_json(tool) if isinstance(tool, str) else tool
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping):
            raise NotTurns("a tool that is no object", _EXAMPLE)
        is_function = tool.get("type", "function") == "function"
        if is_function and not isinstance(function.get("name"), str):
            raise NotTurns("a tool without the name of its function", _EXAMPLE)
        is_bare = function is tool and "type" not in tool
        found.append({"type": "function", "function": tool} if is_bare else tool)
    return [json_value("tools", tool) for tool in found]


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise NotTurns("text that is no JSON", _EXAMPLE) from None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if is_list(value) else value


def standard_calls(turns: Sequence[Any]) -> Sequence[Any]:
    """The turns with their calls as an assistant's ``tool_calls`` and results as turns of ``tool``.

    Calls in a row are one turn. A conversation stays as it is where it has no such call, or one
    that is no JSON of a name and its arguments: the chat template then has to know the roles.
    """
    roles = [_first(turn, _ROLE) for turn in turns]
    if not set(CALLS) & {role for role in roles if isinstance(role, str)}:
        return turns
    found: list[dict[str, Any]] = []
    for turn, role, before in zip(turns, roles, [None, *roles], strict=False):
        if not isinstance(turn, Mapping):
            return turns
        others = {key: turn[key] for key in turn if key not in (*_ROLE, *_WORDS)}
        words = _first(turn, _WORDS)
        if role in CALLS:
            calls = _calls(words)
            if not calls or "tool_calls" in others:
                return turns
            if before in CALLS and not others:
                found[-1]["tool_calls"] += calls
                continue
            found.append({"role": "assistant", "content": "", "tool_calls": calls, **others})
        elif role in RESULTS:
            found.append({"role": "tool", "content": words, **others})
        else:
            found.append(dict(turn))
    return found


def _first(turn: Any, names: Sequence[str]) -> Any:
    if isinstance(turn, (dict, Mapping)):
        for name in names:
            value = turn.get(name)
            if value is not None:
                return value
    return None


def _calls(words: Any) -> list[Any]:
    """Calls that a turn spells out in JSON; none where it is anything else."""
    try:
        spelt = json.loads(words) if isinstance(words, str) else None
    except (ValueError, RecursionError):
        return []
    calls = spelt if isinstance(spelt, list) else [spelt]
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return []
        if call.keys() != {"name", "arguments"}:
            return []
    return [{"type": "function", "function": call} for call in calls]
