"""Say how to make files that shipped recipes read, for the line that says one is missing."""

from __future__ import annotations

from pathlib import Path

TARGETS = {
    "models/smollm2-135m-instruct": "smollm2",
    "runs/sentiment/data": "sentiment-data",
    "runs/tiny/base_init": "base",
    "runs/tiny/base": "base",
}
"""Folder -> its target in the Makefile."""

SHIPPED = ("models/tiny", "data/kjv_web")
"""Folders in a clone that are missing in an installed package."""

SUITES = ("tiny", "smollm2", "sentiment", "gpu")
RESULTS = {
    "sft/model": "sft",
    "rm/model": "rm",
    "ppo/model": "ppo",
    "ppo/critic": "ppo",
    "dpo/model": "dpo",
    "pairs/pairs.jsonl": "generate",
    "pairs/best.jsonl": "generate",
}
"""Output of a stage in ``runs/SUITE`` -> its command; the recipe is named like the folder."""


def how_to_make(path: str) -> str | None:
    """Say how to make a missing ``path``, as half a sentence; None if no shipped recipe reads it.

    A missing name inside an existing folder is misspelt, so nothing makes it.
    """
    parts = Path(path).parts
    in_clone = Path("Makefile").is_file() and Path("recipes").is_dir()
    for depth in (2, 3):
        folder = "/".join(parts[:depth])
        if folder in TARGETS and not Path(folder).is_dir():
            target = f"`make {TARGETS[folder]}`"
            return f"{target} makes it" if in_clone else f"{target} in a clone of align makes it"
        if folder in SHIPPED and not in_clone:
            return "it comes with a clone of align: run the command in the clone's folder"
    runs, suite, *result = parts if len(parts) == 4 else ("", "", "")
    command = RESULTS.get("/".join(result))
    if runs != "runs" or suite not in SUITES or command is None:
        return None
    stage = result[0]
    if in_clone and suite != "gpu":
        return f"`make {stage}{'' if suite == 'tiny' else f' SUITE={suite}'}` makes it"
    return f"`align {command} {suite}/{stage}` makes it"
