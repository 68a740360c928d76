"""Rows that hold one preference: our own columns, implicit prompts, the well-known sets' columns.

Rows from which pairs have yet to be made (rankings, ratings) are ``rankings.py``'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

from align.data.formats.comparisons import Comparison, comparison_of, verdict_of
from align.data.formats.fields import Fields, Turns
from align.data.formats.turn_keys import TRAIN, is_list
from align.data.formats.turns import is_hh, read_hh, split_shared, without_prompt
from align.data.readers.rows import TIE, Ambiguous, BadRow, LeftOut
from align.types import Message, PreferencePair, Text

Sides: TypeAlias = tuple[Text, Text, Text]
"""Prompt, chosen, rejected."""


@dataclass(frozen=True)
class PairFormat:
    """One way to write a pair: ``holds`` goes by the row's columns, the first that holds wins."""

    name: str
    holds: Callable[[Fields], bool]
    read: Callable[[Fields], Sides]


def pair_format(fields: Fields) -> PairFormat:
    return next(f for f in PAIR_FORMATS if f.holds(fields))


def read_pair(fields: Fields, source: str) -> PreferencePair:
    prompt, chosen, rejected = pair_format(fields).read(fields)
    if chosen == rejected:
        fields.bad("rejected", "is the same as chosen", "remove the row")
    return PreferencePair(
        id=fields.where,
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        margin=fields.number("margin") if "margin" in fields else None,
        source=_part(fields, source),
    )


_SCORES = tuple(
    pair
    for word in ("score", "rating", "reward")
    for pair in (
        (f"chosen_{word}", f"rejected_{word}"),
        (f"chosen-{word}", f"rejected-{word}"),
        (f"{word}_chosen", f"{word}_rejected"),
    )
)
"""Columns that say how good the answers of a pair are; nothing is trained on them."""


def against_scores(fields: Fields) -> BadRow | None:
    """A remark on a pair whose rejected answer has the higher score; None where scores agree."""
    for chosen, rejected in _SCORES:
        if chosen not in fields.values:
            continue
        try:
            scores = [float(fields.values[name]) for name in (chosen, rejected)]
        except (KeyError, TypeError, ValueError, OverflowError):
            continue
        if all(map(math.isfinite, scores)) and scores[0] < scores[1]:
            advice = (
                f"{scores[0]:g} against {scores[1]:g}: make sure which answer is the better one"
            )
            return BadRow(fields.where, chosen, f"below {rejected}", advice)
    return None


def _part(fields: Fields, source: str) -> str:
    """RewardBench's ``subset``, or a column ``source``: the part of the data that a pair is of."""
    for name in ("subset", "source"):
        given = fields.value(name)
        if isinstance(given, str) and given.strip():
            return fields.string(name)
    return source


def chosen_rejected(fields: Fields) -> Sides:
    prompt = given_prompt(fields)
    if isinstance(prompt, str) and _are_whole(fields):
        return _whole(fields, prompt)
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
        fields.bad("prompt", "none: chosen and rejected share no first turn", "add a prompt")
    _check_answers(fields, chosen=chosen, rejected=rejected)
    return shared, chosen, rejected


def _are_whole(fields: Fields) -> bool:
    """Tell whether both sides are conversations that begin before their answer."""
    for name in ("chosen", "rejected"):
        side = fields.get(name)
        if not is_list(side) or not side or fields.turns(name, side[0])[0]["role"] == "assistant":
            return False
    return True


def _whole(fields: Fields, prompt: str) -> Sides:
    """Two whole conversations; ``prompt`` is one of the user's turns that they share."""
    shared, chosen, rejected = split_shared(fields.turns("chosen"), fields.turns("rejected"))
    asked = {turn["content"].strip() for turn in shared if turn["role"] == "user"}
    if prompt.strip() not in asked:
        fields.bad("prompt", "is not among the turns that the answers share")
    _check_answers(fields, chosen=chosen, rejected=rejected)
    return shared, chosen, rejected


def given_prompt(fields: Fields) -> Text | None:
    """The prompt by the first name that has one; None where the answers hold it."""
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
        if any(TRAIN in t for t in turns):
            fields.bad(name, "a turn that is not to be trained on", "remove the mark, or the row")


def _shp(fields: Fields) -> Sides:
    """Stanford Human Preferences: ``labels`` 1 = reply A was preferred, 0 = B."""
    a, b = fields.string("human_ref_A"), fields.string("human_ref_B")
    label = _zero_or_one(fields, "labels")
    prompt = fields.string("prompt" if "prompt" in fields else "history")
    return (prompt, a, b) if label == 1 else (prompt, b, a)


def _summaries(fields: Fields) -> Sides:
    """summarize-from-feedback, ``comparisons``: ``choice`` is the index of the better summary."""
    summaries, choice = fields.get("summaries"), _zero_or_one(fields, "choice")
    if not is_list(summaries) or len(summaries) != 2:
        fields.bad("summaries", "not two summaries")
    texts = [
        fields.string("summaries", s.get("text", "") if isinstance(s, Mapping) else s)
        for s in summaries
    ]
    info = fields.value("info")
    info = info if isinstance(info, Mapping) else {}
    prompt = fields.value("prompt") or info.get("post") or info.get("article") or ""
    return fields.string("info.post", prompt), texts[choice], texts[1 - choice]


def _zero_or_one(fields: Fields, name: str) -> int:
    """Read which of two answers is better, in a set that says so by 0 and 1."""
    number = fields.label(name)
    if number in (0, 1):
        return int(number)
    advice = (
        f"it is {number:g}, so the file's numbers may not mean what this set's do: write 0 and 1, "
        "or give pairs with data.columns.chosen=NAME data.columns.rejected=NAME"
    )
    raise Ambiguous(fields.where, name, "not 0 or 1", advice)


def _webgpt(fields: Fields) -> Sides:
    """WebGPT comparisons: the answer with the higher of ``score_0`` and ``score_1`` is better."""
    scores = [fields.number(f"score_{i}") for i in (0, 1)]
    if scores[0] == scores[1]:
        raise LeftOut(fields.where, "score_0", TIE, "it is the same as score_1")
    asked = fields.get("question")
    if isinstance(asked, Mapping):
        asked = asked.get("full_text", "")
    better = int(scores[1] > scores[0])
    answers = [fields.string(f"answer_{i}") for i in (better, 1 - better)]
    return fields.string("question", asked), answers[0], answers[1]


def _compared(fields: Fields) -> Sides:
    """Two answers and which of them won, however their columns are called."""
    found = _comparison(fields)
    assert found is not None  # `holds` has said so
    # a prompt is the same whoever won, so a tie has one too
    won = "a" if fields.kind == "prompt" else verdict_of(fields, found)
    if won == "tie":
        raise LeftOut(fields.where, found.verdict, TIE, "it is left out")
    names = {"chosen": found.a, "rejected": found.b}
    if won == "b":
        names = {"chosen": found.b, "rejected": found.a}
    answers = {ours: fields.get(theirs) for ours, theirs in names.items()}
    try:
        return chosen_rejected(replace(fields, values={**fields.values, **answers}))
    except BadRow as error:
        name = names.get(error.field, error.field)
        raise BadRow(error.where, name, error.reason, error.advice) from None


def _hhh(fields: Fields) -> Sides:
    """HHH alignment: ``targets`` (``choices``, ``labels``), or BIG-bench's ``target_scores``."""
    scores = fields.value("target_scores")
    if not isinstance(scores, Mapping):
        targets = fields.value("targets")
        targets = targets if isinstance(targets, Mapping) else {}
        choices, labels = targets.get("choices") or [], targets.get("labels") or []
        if not is_list(choices) or not is_list(labels) or len(choices) != len(labels):
            fields.bad("targets", "has not one label for each choice")
        if not all(isinstance(choice, str) for choice in choices):
            fields.bad("targets", "has a choice that is no text")
        scores = dict(zip(choices, labels, strict=True))
    chosen = [text for text, label in scores.items() if label == 1]
    rejected = [text for text, label in scores.items() if label == 0]
    if len(chosen) != 1 or len(rejected) != 1:
        fields.bad("targets", "not one better and one worse answer")
    prompt = fields.string("input")
    asked = prompt.removesuffix("Assistant:").rstrip()
    turns = fields.turns("input", read_hh(asked) if is_hh(asked) else _user(asked))
    texts = [fields.string("targets", text) for text in (chosen[0], rejected[0])]
    answers = [({"role": "assistant", "content": text},) for text in texts]
    _check_answers(fields, chosen=answers[0], rejected=answers[1])
    return turns, answers[0], answers[1]


def _user(text: str) -> Turns:
    return ({"role": "user", "content": text},)


def alpaca(fields: Fields) -> Turns:
    """``instruction``, ``input``, ``history`` as turns of a dialogue, as LLaMA-Factory has them."""
    turns: list[Message] = []
    history = fields.value("history") or ()
    if not is_list(history) or not all(is_list(e) and len(e) == 2 for e in history):
        fields.bad("history", "not a list of (question, answer)")
    for exchange in history:
        question, answer = (fields.string("history", said) for said in exchange)
        turns += ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    asked = [fields.string("instruction")]
    for name in ("input", "context") if "output" not in fields else ("input",):
        if fields.value(name):  # `context` is Dolly's name for it
            asked.append(fields.string(name))
    turns.append({"role": "user", "content": "\n".join(asked)})
    return fields.turns("instruction", turns)


def alpaca_answer(fields: Fields) -> str | None:
    """Find the column that answers an instruction: alpaca's, Dolly's, or our own."""
    return next((name for name in ("output", "response", "completion") if name in fields), None)


def _has(*names: str, without: str = "") -> Callable[[Fields], bool]:
    wanted = set(names)
    return lambda fields: wanted <= fields.values.keys() and without not in fields


def _is_text_then_turns(fields: Fields) -> bool:
    prompt, chosen = (fields.values.get(n) for n in ("prompt", "chosen"))
    return isinstance(prompt, str) and is_list(chosen)


def _comparison(fields: Fields) -> Comparison | None:
    """Columns of two answers and a verdict, which may be null in this row."""
    return comparison_of((*fields.values, *sorted(fields.null)))


def _is_comparison(fields: Fields) -> bool:
    return "chosen" not in fields and _comparison(fields) is not None


NAMED_SETS = (
    PairFormat("Stanford Human Preferences", _has("human_ref_A", without="chosen"), _shp),
    PairFormat("summarize-from-feedback", _has("summaries", without="chosen"), _summaries),
    PairFormat("HHH alignment", _has("input", "targets", without="chosen"), _hhh),
    PairFormat("BIG-bench HHH", _has("input", "target_scores", without="chosen"), _hhh),
    PairFormat("two answers and which won", _is_comparison, _compared),
    PairFormat("WebGPT comparisons", _has("answer_0", without="chosen"), _webgpt),
)
"""Sets whose prompt has columns of its own too."""
PAIR_FORMATS = (
    *NAMED_SETS,
    PairFormat("UltraFeedback binarized", _is_text_then_turns, chosen_rejected),
    PairFormat("prompt + chosen + rejected", _has("prompt"), chosen_rejected),
    PairFormat("LLaMA-Factory ShareGPT pair", _has("conversations"), chosen_rejected),
    PairFormat("LLaMA-Factory alpaca pair", _has("instruction"), chosen_rejected),
    PairFormat("HH-RLHF", lambda fields: is_hh(fields.values.get("chosen")), chosen_rejected),
    PairFormat("chosen + rejected as conversations", lambda fields: True, chosen_rejected),
)
