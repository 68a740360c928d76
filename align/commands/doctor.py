"""``align doctor RUN``: what is wrong with a run, from what it has written."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from align.console import say
from align.nearest import did_you_mean
from align.types import AlignError

SHOWN = 6
"""Runs that are named of a folder with more."""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor", help="say what is wrong with a run; exits with 1 if something is"
    )
    parser.add_argument("folder", metavar="RUN", help="a run's folder, such as runs/tiny/ppo")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from align.doctor import closing_lines, diagnose
    from align.doctor_rules import RULES
    from align.files import read_logged, reason
    from align.run_files import status_of

    folder = Path(args.folder)
    _require_run(folder)
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        stage = manifest["stage"]
        rows = read_logged(folder / "metrics.jsonl")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AlignError(
            f"doctor: {folder} holds no run that can be read: {reason(error)}"
        ) from error
    if stage not in RULES:
        raise AlignError(f"doctor: {folder} is a run of {stage}; it knows {', '.join(RULES)}")
    manifest["status"] = status_of(folder, manifest)
    findings = diagnose(stage, rows, manifest)
    for line in closing_lines(stage, rows, findings):
        say(line)
    return 1 if findings else 0


def _require_run(folder: Path) -> None:
    """Refuse what is no run's folder, and name the run that was meant where one is near."""
    if (folder / "manifest.json").exists():
        return
    if not folder.is_dir():
        what = "a file" if folder.exists() else "no such folder"
        hint = "" if folder.exists() else did_you_mean(folder)
        raise AlignError(f"doctor: {folder}: {what}{hint or '; name a run, such as runs/tiny/ppo'}")
    inside = sorted(str(p.parent) for p in folder.rglob("manifest.json"))
    around = [p for p in folder.parents if (p / "manifest.json").is_file()]
    if inside:
        more = f" and {len(inside) - SHOWN} more" if len(inside) > SHOWN else ""
        hint = f"it holds runs, name one of them: {', '.join(inside[:SHOWN])}{more}"
    elif around:
        hint = f"it is inside a run: name {around[0]}"
    else:
        hint = "name a run, such as runs/tiny/ppo"
    raise AlignError(f"doctor: {folder}: holds no run (manifest.json); {hint}")
