"""``align doctor RUN``: what is wrong with a run, from what it has written."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


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
    from align.types import AlignError

    folder = Path(args.folder)
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
        print(line)
    return 1 if findings else 0
