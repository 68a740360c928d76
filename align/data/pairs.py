"""Preference rows: our own columns, implicit prompts, and the well-known sets by their columns.

The formats, told apart by the row's columns alone: prompt + chosen + rejected (UltraFeedback
repeats the prompt in both), whole conversations or HH strings whose shared turns are the prompt,
LLaMA-Factory's ``conversations``, Stanford Human Preferences, summarize-from-feedback.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from align.data.fields import Fields, Turns
from align.data.turns import is_hh, read_hh, split_shared, without_prompt
from align.types import Message, PreferencePair, Text


def read_pair(fields: Fields, source: str) -> PreferencePair:
    prompt: Text
    chosen: Text
    rejected: Text
    if "chosen" not in fields and "human_ref_A" in fields:
        prompt, chosen, rejected = _shp(fields)
    elif "chosen" not in fields and "summaries" in fields:
        prompt, chosen, rejected = _summaries(fields)
    else:
        prompt, chosen, rejected = chosen_rejected(fields)
    if chosen == rejected:
        fields.bad("rejected", "is the same as chosen", "remove the row")
    margin = fields.number("margin") if "margin" in fields else None
    return PreferencePair(
        id=fields.where,
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        margin=margin,
        source=source,
    )


def chosen_rejected(fields: Fields) -> tuple[Text, Text, Text]:
    prompt = _given_prompt(fields)
    if prompt is not None:
        prompt, (chosen, rejected) = matched(fields, prompt, "chosen", "rejected")
        return prompt, chosen, rejected
    both: list[Turns] = []
    for field in ("chosen", "rejected"):
        answer = fields.text(field)
        if isinstance(answer, str):
            if not is_hh(answer):
                raise fields.missing("prompt")  # plain strings do not say where the prompt ends
            answer = fields.turns(field, read_hh(answer))
        both.append(answer)
    shared, chosen, rejected = split_shared(both[0], both[1])
    if not shared:
        fields.bad("prompt", "missing", "chosen and rejected share no first turn: add a prompt")
    _check_answers(fields, chosen=chosen, rejected=rejected)
    return shared, chosen, rejected


def _given_prompt(fields: Fields) -> Text | None:
    if "prompt" in fields:
        return fields.text("prompt")
    if "conversations" in fields:
        return fields.turns("conversations")
    if "instruction" in fields:
        return alpaca(fields)
    return None


def matched(fields: Fields, prompt: Text, *names: str) -> tuple[Text, tuple[Text, ...]]:
    """The prompt and its answers, all strings or all turns, answers without the prompt's turns."""
    answers = [fields.text(name) for name in names]
    if isinstance(prompt, str):
        if all(isinstance(a, str) for a in answers):
            return prompt, tuple(answers)
        prompt = _asked_by_turns(fields, prompt, answers[0])
    if prompt[-1]["role"] == "assistant":
        fields.bad("prompt", "its last turn is the assistant's", "end it with the user's turn")
    turns = {
        name: (
            ({"role": "assistant", "content": answer},)
            if isinstance(answer, str)
            else without_prompt(prompt, answer)
        )
        for name, answer in zip(names, answers, strict=True)
    }
    _check_answers(fields, **turns)
    return prompt, tuple(turns.values())


def _asked_by_turns(fields: Fields, prompt: str, answer: Text) -> Turns:
    """A string prompt as turns: the answer's own first turns if they repeat it, else the user's."""
    if not isinstance(answer, str) and answer[0]["role"] != "assistant":
        for n, turn in enumerate(answer, start=1):
            if turn["role"] == "user" and turn["content"].strip() == prompt.strip():
                return answer[:n]
        fields.bad("prompt", "is not among the turns that the answer repeats")
    return ({"role": "user", "content": prompt},)


def _check_answers(fields: Fields, **answers: Turns) -> None:
    for name, turns in answers.items():
        if any(t["role"] != "assistant" for t in turns):
            roles = ", ".join(t["role"] for t in turns)
            fields.bad(
                name, "not an answer to the prompt", f"its turns are {roles}: only assistant turns"
            )


def _shp(fields: Fields) -> tuple[Text, Text, Text]:
    """Stanford Human Preferences: ``labels`` 1 = reply A was preferred, 0 = B."""
    a, b = fields.string("human_ref_A"), fields.string("human_ref_B")
    label = fields.number("labels")
    if label not in (0, 1):
        fields.bad("labels", "not 0 or 1")
    prompt = fields.string("prompt" if "prompt" in fields else "history")
    return (prompt, a, b) if label == 1 else (prompt, b, a)


def _summaries(fields: Fields) -> tuple[Text, Text, Text]:
    """summarize-from-feedback, ``comparisons``: ``choice`` is the index of the better summary."""
    summaries, choice = fields.get("summaries"), fields.number("choice")
    if not isinstance(summaries, Sequence) or len(summaries) != 2 or choice not in (0, 1):
        fields.bad("choice", "not 0 or 1 for two summaries")
    texts = [
        fields.string("summaries", s.get("text", "") if isinstance(s, Mapping) else s)
        for s in summaries
    ]
    info = fields.values.get("info")
    info = info if isinstance(info, Mapping) else {}
    prompt = fields.values.get("prompt") or info.get("post") or info.get("article") or ""
    return fields.string("info.post", prompt), texts[int(choice)], texts[1 - int(choice)]


def alpaca(fields: Fields) -> Turns:
    """``instruction``, ``input``, ``history`` as turns of a dialogue, as LLaMA-Factory has them."""
    turns: list[Message] = []
    for exchange in fields.values.get("history") or ():
        if not isinstance(exchange, Sequence) or len(exchange) != 2:
            fields.bad("history", "not a list of (question, answer)")
        question, answer = (fields.string("history", said) for said in exchange)
        turns += ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    asked = [fields.string("instruction")]
    if fields.values.get("input"):
        asked.append(fields.string("input"))
    turns.append({"role": "user", "content": "\n".join(asked)})
    return fields.turns("instruction", turns)
