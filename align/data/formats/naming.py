"""Columns under foreign names: which of them may be ours, and how to say so."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

from align.data.formats.comparisons import comparison_of, side_by_side
from align.data.formats.fields import Kind

ASKED: dict[Kind, tuple[str, ...]] = {
    "preference": ("prompt", "chosen", "rejected"),
    "prompt": ("prompt",),
    "sft": ("prompt", "completion"),
}
"""Our names of the simplest format of each kind."""
KIND_NAMES: dict[Kind, str] = {"preference": "pairs", "prompt": "prompts", "sft": "SFT rows"}
UNKNOWN = "NAME"
"""Stands where no column looks like it."""

_USUAL = {
    "prompt": ("question", "query", "instruction", "input", "context", "source", "post"),
    "chosen": ("good", "better", "preferred", "accepted", "winner", "win", "positive", "best"),
    "rejected": ("bad", "worse", "dispreferred", "loser", "lose", "negative", "worst"),
    "completion": ("response", "answer", "output", "target", "reply", "reference", "summary"),
}
_OPPOSITES = {
    "winner": "loser", "win": "lose", "better": "worse", "best": "worst",
    "preferred": "dispreferred",
}  # fmt: skip
"""Names that hold an answer where their opposite is there too, and else may say which one won."""
_DIALOGUES = ("conversation", "dialogue", "dialog", "chat", "turns")


def mapping(kind: Kind, columns: Iterable[str]) -> dict[str, str]:
    """Our name -> the column that looks like it, for every name that the columns lack."""
    exact = list(columns)
    there = {column.strip().lower(): column for column in exact}
    dialogue = next((there[name] for name in _DIALOGUES if name in there), None)
    if dialogue and kind == "sft" and "messages" not in exact:
        return {"messages": dialogue}
    asked = ("prompt",) if kind == "preference" and comparison_of(exact) else ASKED[kind]
    may_be = {name for name in there if _OPPOSITES.get(name, name) in there}
    return {
        ours: next((there[name] for name in (ours, *_USUAL[ours]) if name in may_be), UNKNOWN)
        for ours in asked
        if ours not in exact
    }


def other_kind(kind: Kind, columns: Iterable[str]) -> str:
    """Say what rows with these columns are instead, and which commands read them, or nothing."""
    names = set(columns)
    answers = side_by_side(sorted(names))
    if kind == "preference" and answers and not comparison_of(sorted(names)):
        return (
            f"{answers[0]} and {answers[1]} are two answers side by side, and no column says which "
            "won: add `winner`, with a, b or tie"
        )
    if kind == "sft" and comparison_of(sorted(names)):
        return "they are comparisons of two answers, which `align rm` and `align dpo` read"
    if kind != "preference" and {"chosen", "rejected"} <= names:
        return "they are pairs, which `align rm` and `align dpo` read"
    learnt = {"completion", "messages", "conversations", "text"} & names
    if kind == "preference" and learnt and {"label", "kto_tag"} & names:
        return (
            "they are answers with a label each (KTO), and there is no KTO: `align sft` with "
            "data.on_bad_row=skip learns those whose label is true"
        )
    if kind == "preference" and learnt:
        return "they are SFT rows, which `align sft` reads"
    beside = {"references", "source_text", "id"}
    if kind != "prompt" and "prompt" in names and names <= {"prompt"} | beside:
        return "they are prompts, which `align ppo`, `align generate` and `align eval` read"
    return ""


def flags(kind: Kind, columns: Iterable[str]) -> str:
    """``prompt=question chosen=good rejected=NAME``, as ``align data --columns`` takes it."""
    return shlex.join(f"{ours}={theirs}" for ours, theirs in mapping(kind, columns).items())


def overrides(kind: Kind, columns: Iterable[str]) -> str:
    """``data.columns.prompt=question ...``, as a recipe's overrides take it."""
    pairs = mapping(kind, columns).items()
    return " ".join(f"data.columns.{ours}={theirs}" for ours, theirs in pairs)


def every_way(columns: Iterable[str]) -> str:
    """Say which option makes a file read as pairs, as prompts, or as SFT rows."""
    there = list(columns)
    ways = (f"for {name} --columns {flags(kind, there)}" for kind, name in KIND_NAMES.items())
    return f"{'; '.join(ways)} (in a recipe: {overrides('preference', there)})"
