"""Examples -> rows of another format, for other tools: the way back from ``columns.py``.

What a format cannot say (a system turn as an alpaca row's string, a conversation as one string) is
a refusal with the row's place, never left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias, TypeVar

from align.data.formats.columns import Example
from align.data.formats.turn_keys import TOOLS
from align.types import AlignError, Message, PreferencePair, PromptExample, SFTExample, Text

RowOut: TypeAlias = dict[str, Any]
E = TypeVar("E", bound=Example)


def convert(example: Example, target: str) -> RowOut:
    """One example as a row of ``target``.

    Raises:
        AlignError: The format has no place for what the row says, or is none of its kind.
    """
    writers = TARGETS[type(example)]
    if target not in writers:
        raise AlignError(f"--to {target}: not for these rows; allowed: {', '.join(writers)}")
    try:
        return _written(target, example)
    except _CannotSay as error:
        able = [f"--to {name}" for name in writers if _can_say(name, example)]
        use = f"use {' or '.join(able)}, or " if able else ""
        raise AlignError(f"{example.id}: {error}; {use}leave the row out") from None


def _can_say(target: str, example: Example) -> bool:
    try:
        _written(target, example)
    except _CannotSay:
        return False
    return True


def _written(target: str, example: Example) -> RowOut:
    """The row, with the tools of the first turn as a column, which is where others look for it."""
    write = TARGETS[type(example)][target]
    where = "messages" if getattr(example, "messages", None) is not None else "prompt"
    turns: Text | None = getattr(example, where)
    if turns is None or isinstance(turns, str) or TOOLS not in turns[0]:
        return write(example)
    if target in ("strings", "hh"):
        raise _CannotSay(f"{target} has no place for tools")
    first = {key: value for key, value in turns[0].items() if key != TOOLS}
    changed: dict[str, Any] = {where: (first, *turns[1:])}
    return {**write(replace(example, **changed)), TOOLS: turns[0][TOOLS]}


class _CannotSay(ValueError):
    """Part of an example that has no place in the format."""


# ---------------------------------------------------------------- preferences


def _strings(pair: PreferencePair) -> RowOut:
    row = {"prompt": _string(pair.prompt), "chosen": _string(pair.chosen)}
    return _with_margin({**row, "rejected": _string(pair.rejected)}, pair)


def _messages(pair: PreferencePair) -> RowOut:
    row = {"prompt": _turns(pair.prompt, "user"), "chosen": _turns(pair.chosen, "assistant")}
    return _with_margin({**row, "rejected": _turns(pair.rejected, "assistant")}, pair)


def _conversations(pair: PreferencePair) -> RowOut:
    row = _messages(pair)
    prompt = row.pop("prompt")
    return {**row, "chosen": prompt + row["chosen"], "rejected": prompt + row["rejected"]}


def _hh(pair: PreferencePair) -> RowOut:
    row = _conversations(pair)
    return {**row, "chosen": _hh_string(row["chosen"]), "rejected": _hh_string(row["rejected"])}


def _hh_string(turns: list[RowOut]) -> str:
    names = {"user": "Human", "assistant": "Assistant"}
    for turn in turns:
        _require_bare(turn, "HH-RLHF")
        if turn["role"] not in names:
            raise _CannotSay(f"HH-RLHF has no {turn['role']} turn")
        if "\n\nHuman:" in turn["content"] or "\n\nAssistant:" in turn["content"]:
            raise _CannotSay("a turn holds what HH-RLHF begins a turn with")
    return "".join(f"\n\n{names[turn['role']]}: {turn['content'].strip()}" for turn in turns)


def _sharegpt_pair(pair: PreferencePair) -> RowOut:
    prompt, system = _without_system(_turns(pair.prompt, "user"))
    answers = [_turns(side, "assistant") for side in (pair.chosen, pair.rejected)]
    if any(len(turns) != 1 for turns in answers):
        raise _CannotSay("a ShareGPT pair has one turn on each side")
    chosen, rejected = (_from_value(turns)[0] for turns in answers)
    row = {"conversations": _from_value(prompt), "chosen": chosen, "rejected": rejected}
    return _with_margin({**row, **system}, pair)


def _alpaca_pair(pair: PreferencePair) -> RowOut:
    row = {**_alpaca_prompt(pair.prompt), "chosen": _string(pair.chosen)}
    return _with_margin({**row, "rejected": _string(pair.rejected)}, pair)


def _ranking(pair: PreferencePair) -> RowOut:
    if pair.margin is not None:
        raise _CannotSay("a ranking has no margin")
    row = _strings(pair) if isinstance(pair.prompt, str) else _messages(pair)
    return {"prompt": row["prompt"], "responses": [row["chosen"], row["rejected"]]}


def _with_margin(row: RowOut, pair: PreferencePair) -> RowOut:
    """The row with what its pair says besides: its margin, the part of the data that it is of."""
    more: RowOut = {} if pair.margin is None else {"margin": pair.margin}
    # without a column for it, the part is the file's own name
    part = {} if pair.id.startswith(pair.source) else {"subset": pair.source}
    return {**row, **more, **part}


# ---------------------------------------------------------------- demonstrations


def _completion(example: SFTExample) -> RowOut:
    prompt, answer = _asked_and_answered(example)
    return {"prompt": _string(prompt), "completion": _string(answer)}


def _chat(example: SFTExample) -> RowOut:
    if example.messages is not None:
        return {"messages": [dict(turn) for turn in example.messages]}
    prompt, answer = _asked_and_answered(example)
    return {"messages": _turns(prompt, "user") + _turns(answer, "assistant")}


def _sharegpt(example: SFTExample) -> RowOut:
    turns, system = _without_system(_chat(example)["messages"])
    return {"conversations": _from_value(turns), **system}


def _alpaca(example: SFTExample) -> RowOut:
    prompt, answer = _asked_and_answered(example)
    return {**_alpaca_prompt(prompt), "output": _string(answer)}


def _text(example: SFTExample) -> RowOut:
    if example.text is None:
        raise _CannotSay("it has a prompt, which plain text has not")
    return {"text": example.text}


def _asked_and_answered(example: SFTExample) -> tuple[Text, Text]:
    if example.messages is not None:
        if example.messages[-1]["role"] != "assistant":
            raise _CannotSay("its last turn is not the assistant's")
        return example.messages[:-1], example.messages[-1:]
    if example.prompt is None or example.completion is None:
        raise _CannotSay("it is plain text, with no prompt")
    return example.prompt, example.completion


def _prompt_row(example: PromptExample) -> RowOut:
    turns = example.prompt if isinstance(example.prompt, str) else [dict(t) for t in example.prompt]
    row: RowOut = {"prompt": turns}
    if example.references:
        row["references"] = list(example.references)
    return row if example.source_text is None else {**row, "source_text": example.source_text}


# ---------------------------------------------------------------- texts


def _string(text: Text) -> str:
    if isinstance(text, str):
        return text
    if len(text) != 1 or text[0]["role"] == "system":
        roles = ", ".join(turn["role"] for turn in text)
        raise _CannotSay(f"turns of {roles} are no single string")
    _require_bare(text[0], "a string")
    return str(text[0]["content"])


def _require_bare(turn: Message, format: str) -> None:
    """Refuse a turn with more than words for a format that has no place for it."""
    more = sorted(turn.keys() - {"role", "content"})
    if more:
        raise _CannotSay(f"{format} has no place for {', '.join(more)} of a turn")


def _turns(text: Text, role: str) -> list[RowOut]:
    return [{"role": role, "content": text}] if isinstance(text, str) else [dict(t) for t in text]


def _without_system(turns: list[RowOut]) -> tuple[list[RowOut], RowOut]:
    if turns and turns[0]["role"] == "system":
        _require_bare(turns[0], "the column system")
        return turns[1:], {"system": turns[0]["content"]}
    return turns, {}


def _from_value(turns: list[RowOut]) -> list[RowOut]:
    names = {"user": "human", "assistant": "gpt"}
    return [
        {"from": names.get(t["role"], t["role"]), "value": t["content"]}
        | {key: value for key, value in t.items() if key not in ("role", "content")}
        for t in turns
    ]


def _alpaca_prompt(prompt: Text) -> RowOut:
    """``instruction``, ``system``, and earlier exchanges as ``history``."""
    turns, row = _without_system(_turns(prompt, "user"))
    for turn in turns:
        _require_bare(turn, "alpaca")
    *earlier, last = [t["content"] for t in turns]
    if [t["role"] for t in turns] != ["user", "assistant"] * (len(earlier) // 2) + ["user"]:
        raise _CannotSay("alpaca's history is question, answer, question, ...")
    if earlier:
        row["history"] = [list(pair) for pair in zip(earlier[::2], earlier[1::2], strict=True)]
    return {"instruction": last, **row}


# kind of example -> name of the format -> what writes it
TARGETS: dict[type, dict[str, Callable[[Any], RowOut]]] = {
    PreferencePair: {
        "strings": _strings,
        "messages": _messages,
        "conversations": _conversations,
        "hh": _hh,
        "sharegpt": _sharegpt_pair,
        "alpaca": _alpaca_pair,
        "ranking": _ranking,
    },
    SFTExample: {
        "strings": _completion,
        "messages": _chat,
        "sharegpt": _sharegpt,
        "alpaca": _alpaca,
        "text": _text,
    },
    PromptExample: {"prompts": _prompt_row},
}
