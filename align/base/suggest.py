"""What a user most likely meant by a name that does not exist."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import SequenceMatcher
from pathlib import Path

CUTOFF = 0.6
"""Likeness, from 0 to 1, from which on a name counts as near."""


def alike(a: str, b: str) -> float:
    """2 x characters in common / characters of both: 1 for equal names."""
    return SequenceMatcher(None, a, b).ratio()


def nearest(
    name: str, candidates: Iterable[str], *, likeness: Callable[[str, str], float] = alike
) -> str | None:
    """The likeliest candidate; None if none is near."""
    best = max(((likeness(name, c), c) for c in candidates), default=(0.0, ""))
    return best[1] if best[0] >= CUTOFF else None


def nearest_path(path: Path, *, wanted: Callable[[Path], bool] = lambda _: True) -> Path | None:
    """The likeliest existing path; where folders of ``path`` are missing too, the likeliest folder.

    Args:
        path: What does not exist.
        wanted: Says which neighbours may be meant; hidden ones never are.
    """
    while not path.parent.is_dir():
        path = path.parent
    there = [p.name for p in path.parent.iterdir() if not p.name.startswith(".") and wanted(p)]
    name = nearest(path.name, sorted(there), likeness=_alike_but_for_the_ending)
    return path.parent / name if name else None


def _alike_but_for_the_ending(a: str, b: str) -> float:
    """Two files are not near because both are called .jsonl."""
    same = Path(a).suffix == Path(b).suffix
    return alike(Path(a).stem, Path(b).stem) if same else alike(a, b)


def did_you_mean(path: Path) -> str:
    """``; did you mean a/b?``, or nothing where no path is near."""
    near = nearest_path(path)
    return f"; did you mean {near}?" if near else ""
