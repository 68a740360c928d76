"""Suggest the name that a user most likely meant."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import SequenceMatcher
from pathlib import Path

CUTOFF = 0.6
"""Smallest likeness, from 0 to 1, of a suggestion."""


def alike(a: str, b: str) -> float:
    """Likeness: 2 x characters in common / characters of both, 1 for equal names."""
    return SequenceMatcher(None, a, b).ratio()


def suggest(
    name: str, candidates: Iterable[str], *, likeness: Callable[[str, str], float] = alike
) -> str | None:
    """Return the likeliest candidate; None if none is near."""
    best = max(((likeness(name, c), c) for c in candidates), default=(0.0, ""))
    return best[1] if best[0] >= CUTOFF else None


def suggest_path(path: Path, *, wanted: Callable[[Path], bool] = lambda _: True) -> Path | None:
    """Return the likeliest existing path; if parent folders are missing too, the likeliest folder.

    Args:
        path: A path that does not exist.
        wanted: Tells which neighbours may be meant; hidden ones never are.
    """
    while not path.parent.is_dir():
        path = path.parent
    there = [p.name for p in path.parent.iterdir() if not p.name.startswith(".") and wanted(p)]
    name = suggest(path.name, sorted(there), likeness=_alike_but_for_the_ending)
    return path.parent / name if name else None


def _alike_but_for_the_ending(a: str, b: str) -> float:
    """Compare names without their suffix: a shared .jsonl does not make two files alike."""
    same = Path(a).suffix == Path(b).suffix
    return alike(Path(a).stem, Path(b).stem) if same else alike(a, b)


def did_you_mean(path: Path) -> str:
    """Return ``; did you mean a/b?``, or "" if no path is near."""
    near = suggest_path(path)
    return f"; did you mean {near}?" if near else ""
