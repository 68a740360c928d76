"""What makes the files that shipped recipes read, for the line that says that one is missing."""

from __future__ import annotations

from pathlib import Path

TARGETS = {
    "models/smollm2-135m-instruct": "smollm2",
    "runs/sentiment/data": "sentiment-data",
    "runs/tiny/base_init": "base",
    "runs/tiny/base": "base",
}
"""Folder -> the target of the Makefile that makes it."""

SHIPPED = ("models/tiny", "data/kjv_web")
"""Folders that a clone has and an installed package has not."""

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
"""What a stage leaves in ``runs/SUITE`` -> its command; its recipe is named as its folder."""


def made_by(path: str) -> str | None:
    """What makes a missing ``path``, as half a sentence; None where no shipped recipe reads it.

    A name beside what is there already is not made by anything: it is misspelt.
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
