"""Range, unit and condition of a recipe's key, written in the annotation of its field:

beta: Annotated[float, Range("(0, 10000]"), Unit("reward units per nat")] = 0.1
"""

from __future__ import annotations

from dataclasses import dataclass, is_dataclass
from typing import Any, get_args, get_type_hints


@dataclass(frozen=True)
class Range:
    """Interval of the numbers that a key may hold; a round bracket leaves the end out.

    An upper end is far above every sensible value: it catches 1e12 and a number that slipped into
    the wrong key.
    """

    interval: str

    def __contains__(self, value: float) -> bool:
        low, high = (float(end) for end in self._ends())
        above = value >= low if self.interval[0] == "[" else value > low
        return above and (value <= high if self.interval[-1] == "]" else value < high)

    def __str__(self) -> str:
        low, high = self._ends()
        words = []
        if low != "-inf":
            words.append(f"{'at least' if self.interval[0] == '[' else 'above'} {low}")
        if high != "inf":
            words.append(f"{'at most' if self.interval[-1] == ']' else 'below'} {high}")
        return " and ".join(words)

    def _ends(self) -> list[str]:
        return [end.strip() for end in self.interval[1:-1].split(",")]


@dataclass(frozen=True)
class Unit:
    """Unit of a number."""

    name: str


class When:
    """Condition under which a key has an effect: a key of the same section has one of these values.

    At its default the key is accepted anyway.
    """

    def __init__(self, key: str, *values: Any) -> None:
        self.key, self.values = key, values

    def __str__(self) -> str:
        shown = [str(v).lower() if isinstance(v, bool) else str(v) for v in self.values]
        return f"{self.key}={' or '.join(shown)}"


def notes(cls: type, kind: type) -> dict[str, Any]:
    """Field -> its `Range`, `Unit` or `When`, for the fields that have one."""
    hints = get_type_hints(cls, include_extras=True)
    return {
        name: note
        for name, hint in hints.items()
        for note in getattr(hint, "__metadata__", ())
        if isinstance(note, kind)
    }


def section_class(hint: Any) -> type | None:
    """The dataclass of a field, of its items, or of its value where it may be null."""
    parts = (part for part in (hint, *get_args(hint)) if is_dataclass(part))
    return next((part for part in parts if isinstance(part, type)), None)
