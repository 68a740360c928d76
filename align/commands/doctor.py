"""``align doctor RUN``: diagnose a run from its folder."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from align.base.console import say
from align.base.suggest import did_you_mean
from align.types import AlignError

SHOWN = 6
"""Most runs that a message lists."""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor", help="diagnose a run; exits with 1 if something is wrong"
    )
    parser.add_argument("folder", metavar="RUN", help="a run's folder, such as runs/tiny/ppo")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from align.base.files import read_metrics, reading
    from align.run.doctor import closing_lines, diagnose, judged_stages
    from align.run.files import read_manifest, status_of

    folder = Path(args.folder)
    _require_run(folder)
    try:
        manifest = read_manifest(folder)
        stage = manifest.get("stage")
        rows = read_metrics(folder / "metrics.jsonl")
    except AlignError as error:
        raise AlignError(f"doctor: {folder} holds no run that can be read: {error}") from error
    if stage not in judged_stages():
        raise AlignError(
            f"doctor: {folder} is a run of {stage}; it knows {', '.join(judged_stages())}"
        )
    manifest["status"] = status_of(folder, manifest)
    with reading(f"doctor: {folder} (manifest.json)", "it is not as a run writes it"):
        findings = diagnose(stage, rows, manifest)
    for line in closing_lines(stage, rows, findings):
        say(line)
    return 1 if findings else 0


def _require_run(folder: Path) -> None:
    """Refuse a folder that is no run's, and name the run that was probably meant."""
    if os.path.lexists(folder / "manifest.json"):
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
