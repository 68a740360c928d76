"""Rows from which pairs have yet to be made: whole rankings, and one rated response a row.

A ranking (``responses``, best first) gives every pair of its responses. Rated responses of one
prompt (``response`` and ``score``, or TRL's ``completion`` and ``label``) give every pair whose
scores differ, the difference as margin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from align.data.formats.fields import Fields
from align.data.formats.pairs import given_prompt, matched
from align.data.formats.turn_keys import is_list
from align.data.formats.turns import AS_A_LIST
from align.types import PreferencePair, Text

RANKING, RATING = "ranking", "rating"
RATINGS = ("score", "rating", "label")
ORDERS = ("ranking", "rankings", "rank", "ranks", "scores", "ratings")
"""Columns beside ``responses`` by which somebody may mean another order than theirs."""


@dataclass(frozen=True)
class Rated:
    """One response and how good it is; the unit is the file's own."""

    id: str
    prompt: Text
    response: Text
    score: float
    source: str = ""
    # name of the column that has it
    by: str = "score"


def listwise_format(fields: Fields) -> str | None:
    """Tell which of the two kinds of rows this is, if it is one."""
    if "chosen" in fields or not ("prompt" in fields or "instruction" in fields):
        return None
    if "responses" in fields:
        return RANKING
    rated = _first(fields, "response", "completion") and _first(fields, *RATINGS)
    return RATING if rated else None


def missing_rating(fields: Fields) -> str | None:
    """Name the rating that a response lacks: a column that is null, else ``score``.

    None where the row is of another format.
    """
    if "chosen" in fields or not ("prompt" in fields or "instruction" in fields):
        return None
    null = next((name for name in RATINGS if name in fields.null), None)
    if null is not None and _first(fields, "response", "completion"):
        return null
    return "score" if "response" in fields and "prompt" in fields else None


def read_ranking(fields: Fields, source: str) -> tuple[PreferencePair, ...]:
    """All pairs of ``responses``, which stand best first."""
    given: Any = fields.get("responses")
    for name in ORDERS:
        if name in fields:
            advice = f"sort the responses best first and leave {name} out"
            fields.bad(name, "would be ignored: `responses` are read best first", advice)
    if not is_list(given) or len(given) < 2:
        text = f"{AS_A_LIST}, " if isinstance(given, str) else ""
        fields.bad("responses", "not a list of at least two", f"{text}best first")
    numbered = {f"responses[{i}]": response for i, response in enumerate(given)}
    inside = replace(fields, values={**fields.values, **numbered})
    prompt, responses = matched(inside, given_prompt(fields) or fields.text("prompt"), *numbered)
    if len(set(map(str, responses))) < len(responses):
        fields.bad("responses", "holds the same response twice", "remove one")
    return tuple(
        PreferencePair(
            id=f"{fields.where}[{i}>{j}]",
            prompt=prompt,
            chosen=responses[i],
            rejected=responses[j],
            source=source,
        )
        for i, j in combinations(range(len(responses)), 2)
    )


def read_rating(fields: Fields, source: str) -> Rated:
    name = _first(fields, "response", "completion") or "response"
    by = _first(fields, *RATINGS) or "score"
    prompt, (response,) = matched(fields, given_prompt(fields) or fields.text("prompt"), name)
    return Rated(fields.where, prompt, response, fields.label(by), source, by)


def pairs_of(rated: Sequence[Rated]) -> tuple[PreferencePair, ...]:
    """Every two responses to one prompt with different scores, the higher one chosen."""
    pairs = []
    for a, b in combinations(rated, 2):
        better, worse = (a, b) if a.score > b.score else (b, a)
        if a.score != b.score and a.response != b.response:
            pairs.append(
                PreferencePair(
                    id=f"{better.id}>{worse.id.rpartition(':')[2]}",
                    prompt=better.prompt,
                    chosen=better.response,
                    rejected=worse.response,
                    margin=better.score - worse.score,
                    source=better.source,
                )
            )
    return tuple(pairs)


def _first(fields: Fields, *names: str) -> str | None:
    return next((name for name in names if name in fields), None)
