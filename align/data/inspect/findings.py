"""Findings of ``align data check``, and the texts that it looks at."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from align.data.formats.columns import Example
from align.types import PreferencePair, SFTExample, Text

Level = Literal["error", "warning", "note"]
PLACES = 5
"""Rows that a finding names."""


@dataclass(frozen=True)
class Finding:
    """One thing to know: ``count`` rows, the first of them in ``places``.

    An ``error`` spoils training or its evaluation, a ``warning`` may, a ``note`` explains.
    """

    level: Level
    what: str
    count: int
    advice: str
    places: tuple[str, ...] = ()


def findings_of(level: Level, what: str, ids: Iterable[str], advice: str) -> Iterator[Finding]:
    """Yield a finding about these rows; none where there is no such row."""
    found = list(ids)
    if found:
        yield Finding(level, what, len(found), advice, tuple(found[:PLACES]))


_WORDS = ("reasoning_content", "reasoning", "thinking", "content")
"""Keys of a turn that hold its words."""


def plain(text: Text) -> str:
    """All words of a text, thoughts included."""
    if isinstance(text, str):
        return text
    said = (turn.get(key) for turn in text for key in _WORDS)
    return "\n".join(words for words in said if isinstance(words, str))


def parts_of(example: Example) -> list[Text]:
    """List the parts of an example, the prompt first: strings and conversations."""
    if isinstance(example, SFTExample):
        given = [example.prompt, example.completion, example.text, example.messages]
        return [part for part in given if part is not None]
    if isinstance(example, PreferencePair):
        return [example.prompt, example.chosen, example.rejected]
    return [example.prompt, *example.references]


def texts_of(example: Example) -> list[str]:
    """Every text of an example, the prompt first."""
    return [plain(part) for part in parts_of(example)]


def roles_of(example: Example) -> set[str]:
    """Collect the roles of an example's turns; strings have none."""
    turns = (part for part in parts_of(example) if not isinstance(part, str))
    return {turn["role"] for part in turns for turn in part}
