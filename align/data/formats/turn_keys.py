"""Keys of a turn beside its role and its content: kept for the chat template, or left out by name.

A key that carries meaning (thinking, tool calls, a name) stays as it is: the template renders it,
or the row is refused when it is rendered. What other trainers call a turn's weight becomes our one
key ``train``. Notes about a turn (ids, times, scores) are left out, and reported as unread.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

TRAIN = "train"
"""Our key of an assistant's turn that is not trained on: ``"train": False``. Absent = trained."""

TOOLS = "tools"
"""Our key of a conversation's first turn: the tools that a template is given beside the turns."""

_MARKS = ("weight", "loss_weight", "loss_scale", "train", "training", "trainable", "loss")
"""Names of it in OpenAI's format, Axolotl and ms-swift."""
_SAYING = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
_PARTLY = ("train_detail", "training_detail")
_MEDIA = ("images", "image", "videos", "video", "audios", "audio")
NOTES = frozenset((
    "id", "uuid", "message_id", "parent_id", "turn_id", "turn_identifier", "index", "user_id",
    "timestamp", "created_at", "updated_at", "created_date", "created", "create_time", "time",
    "date", "url",
    "model", "lang", "language", "country", "state", "header", "hashed_ip", "source", "category",
    "toxic", "redacted", "moderation", "detoxify", "deleted", "synthetic", "markdown", "emojis",
    "score", "rating", "rank", "labels", "review_count", "review_result", "metadata",
    "annotations", "finish_reason",
    "token_count", "tokens", "num_tokens", "n_tokens", "length",
))  # fmt: skip
"""About a turn rather than of it: no template renders them."""


class NotTurns(ValueError):
    """Reason why a value is no conversation; ``fields.py`` adds its row and field."""

    def __init__(self, reason: str, advice: str = "mend the row") -> None:
        super().__init__(reason)
        self.advice = advice


def is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    """Tell if a value of a row is a list; text is none, though Python counts it as a sequence."""
    # ordinary kinds first: asking an abstract class takes four times as long
    return not isinstance(value, str | bytes) and isinstance(value, (list, tuple, Sequence))


def has_content(value: Any) -> bool:
    """Tell whether a value says anything; Parquet and CSV fill what a row lacks with empty ones."""
    if value is None or (isinstance(value, float) and math.isnan(value)):  # pandas fills with it
        return False
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "{}", "null")
    if isinstance(value, Mapping):
        return any(map(has_content, value.values()))
    return any(map(has_content, value)) if is_list(value) else True


def says_more(turn: Mapping[str, Any]) -> bool:
    """Tell whether a turn without words says something all the same: a tool's call, a thought."""
    return not turn.keys().isdisjoint(_SAYING)


def keys_of_turn(turn: Mapping[str, Any], role: str, left_out: set[str]) -> dict[str, Any]:
    """Collect what a turn has beside role and content, under our names.

    Args:
        left_out: Takes the names of keys that are about the turn and go nowhere.

    Raises:
        NotTurns: A key that cannot be honoured: a weight other than 0 and 1, images, half a turn.
    """
    kept: dict[str, Any] = {}
    for key, value in turn.items():
        if key in ("role", "from", "content", "value") or not has_content(value):
            continue
        if key in _MARKS:
            if not _is_trained(key, value, role):
                kept[TRAIN] = False
        elif key in _PARTLY:
            raise NotTurns(f"{key}, training on a part of a turn, is not supported", "remove it")
        elif key in _MEDIA:
            raise NotTurns(f"a turn with {key}, which are not supported", "remove the row")
        elif key in NOTES:
            left_out.add(key)
        else:
            kept[key] = _tool_calls(value) if key == "tool_calls" else json_value(key, value)
    return kept


def _is_trained(key: str, value: Any, role: str) -> bool:
    """Read whether a turn is trained on from its mark; turns that never are may be marked no."""
    number = float(value) if isinstance(value, bool | int | float) else None
    if number not in (0, 1):
        allowed = "1 or true: the turn is trained on; 0 or false: it is not"
        raise NotTurns(f"{key} {value!r:.40} of a turn", allowed)
    if role == "assistant":
        return number == 1
    if number == 1 and value is True:
        advice = "only turns of the assistant are trained on: take the key out of the others"
        raise NotTurns(f"{key}: true in a turn of {role}", advice)
    return True


def _tool_calls(calls: Any) -> list[Any]:
    """Tool calls, arguments as objects: that is what templates render, OpenAI writes JSON text."""
    advice = 'give [{"type": "function", "function": {"name": ..., "arguments": {...}}}]'
    if not is_list(calls) or not all(isinstance(call, Mapping) for call in calls):
        raise NotTurns("tool_calls that are no list of objects", advice)
    found = []
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise NotTurns("a tool call without the name of its function", advice)
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                raise NotTurns("a tool call whose arguments are no JSON", advice) from None
            function = {**function, "arguments": arguments}
        found.append({**call, "function": function} if "function" in call else function)
    return [json_value("tool_calls", call) for call in found]


def json_value(key: str, value: Any) -> Any:
    """The value as JSON has it, so that it stays the same on its way through the token cache."""
    try:
        text = json.dumps(value, ensure_ascii=False)
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise NotTurns(f"{key}: half of a surrogate pair (\\ud800...)") from None
    except (TypeError, ValueError, RecursionError):
        advice = f"it is a {type(value).__name__}: write it as text, or remove it"
        raise NotTurns(f"{key} of a turn is no JSON value", advice) from None
    return json.loads(text)
