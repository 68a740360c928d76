"""Conversations: turns as files write them -> messages, and where a pair's prompt ends.

An implicit prompt ends at a turn's boundary and nowhere else: a common prefix of *strings* would
make prompt "", chosen "Paris " and rejected "London" of one pair, and prompt "Paris", chosen " ",
rejected "n" of another.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from align.nearest import alike, nearest
from align.types import Message

ROLES = (
    "system", "developer", "user", "assistant", "tool", "function", "ipython", "observation",
    "document", "context",
)  # fmt: skip
"""Who may speak whatever the chat template says; others may where the template names them."""

_ALIASES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
_COMMON = ("system", "developer", "user", "assistant", "human")
_NEAR = 0.8
"""Likeness from which on a role is a misspelt one: a template's own names are further off."""

_HH_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


class NotTurns(ValueError):
    """Why a value is no conversation; ``fields.py`` says in which row and field."""

    def __init__(self, reason: str, advice: str = "mend the row") -> None:
        super().__init__(reason)
        self.advice = advice


def is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    """Whether a value of a row is a list; text is none, though Python counts it as a sequence."""
    return isinstance(value, Sequence) and not isinstance(value, str)


def read_turns(value: Any) -> tuple[Message, ...]:
    """Messages of a list of turns, or of one, with ``role``/``content`` or ``from``/``value``."""
    turns = [value] if isinstance(value, Mapping) else value
    if not is_list(turns):
        is_json = isinstance(turns, str) and turns.lstrip().startswith(("[", "{"))
        as_text = ", but text that may hold one (a CSV has no lists: save it as JSONL or Parquet)"
        raise NotTurns("not a list of turns" + (as_text if is_json else ""))
    if not turns:
        raise NotTurns("empty")
    return tuple(_read_turn(t) for t in turns)


def _read_turn(turn: Any) -> Message:
    if not isinstance(turn, Mapping):
        raise NotTurns("a turn is not an object")
    role = turn.get("role", turn.get("from"))
    content = turn.get("content", turn.get("value"))
    if turn.get("tool_calls"):
        raise NotTurns("tool calls, which are not supported")
    if is_list(content):
        content = _text_parts(content)
    if not isinstance(role, str) or not isinstance(content, str):
        raise NotTurns("a turn without a role or without text")
    meant = misspelt(role)
    if meant:
        advice = f"did you mean {meant}? Allowed: {ALLOWED}"
        raise NotTurns(f"role {role!r}, which nobody has", advice)
    return {"role": _ALIASES.get(role, role), "content": content}


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
    near = nearest(bare, _COMMON)
    return near if near and alike(bare, near) >= _NEAR else None


def _text_parts(parts: Sequence[Any]) -> str:
    """``[{"type": "text", "text": ...}, ...]`` as one string."""
    texts = [p.get("text", p.get("value")) if isinstance(p, Mapping) else None for p in parts]
    if not all(isinstance(t, str) for t in texts):
        raise NotTurns("a turn with something other than text")
    return "".join(t for t in texts if t is not None)


def is_hh(value: Any) -> bool:
    """Whether a string is a dialogue as in HH-RLHF: ``\\n\\nHuman: ...\\n\\nAssistant: ...``."""
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
    return a["role"] == b["role"] and a["content"].strip() == b["content"].strip()
