"""Run folders -> what a report needs. Only reads, and takes a run that still goes on as it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from align.files import read_logged
from align.run_files import status_of
from align.types import AlignError

Row = dict[str, Any]

ORDER = ("sft", "generate", "rm", "dpo", "ppo", "eval")
"""In which stages are told; others come after them."""


@dataclass(frozen=True)
class RunRecord:
    """One run's folder, read.

    Attributes:
        name: Its folder relative to what all reported runs share, such as ``tiny/ppo``.
        metrics: Lines of metrics.jsonl.
        evaluation: eval.json; None of other stages.
        outputs: Model -> rows of outputs/NAME.jsonl.
        samples: Rows of samples.jsonl.
    """

    name: str
    folder: Path
    stage: str
    manifest: Row
    config: Row
    metrics: list[Row]
    evaluation: Row | None = None
    outputs: dict[str, list[Row]] = field(default_factory=dict)
    samples: list[Row] = field(default_factory=list)

    @property
    def status(self) -> str:
        return str(self.manifest.get("status", "unknown"))

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of one key, where it was logged as a number."""
        found = [(r["step"], r[key]) for r in self.metrics if isinstance(r.get(key), int | float)]
        return [float(s) for s, _ in found], [float(v) for _, v in found]


def find_runs(places: Sequence[str]) -> list[Path]:
    """The run folders among ``places`` and inside them, in the order of the stages.

    Raises:
        AlignError: A place is no folder, or holds no run.
    """
    found: dict[Path, None] = {}
    for place in places:
        folder = Path(place)
        if not folder.is_dir():
            what = "is a file" if folder.is_file() else "no such folder"
            raise AlignError(f"report: {place}: {what}; name a folder such as runs/tiny/ppo")
        here = [folder] if (folder / "manifest.json").is_file() else []
        inside = sorted(p.parent for p in folder.rglob("manifest.json") if p.parent != folder)
        if not here + inside:
            raise AlignError(f"report: {place}: no run in it; a run's folder has a manifest.json")
        found |= dict.fromkeys(here + inside)
    return sorted(found, key=lambda p: _rank(_read_json(p / "manifest.json").get("stage", "")))


def read_run(folder: Path, root: Path) -> RunRecord:
    """Everything that one run has written."""
    manifest = _read_json(folder / "manifest.json")
    manifest["status"] = status_of(folder, manifest)
    evaluation = _read_json(folder / "eval.json") if (folder / "eval.json").is_file() else None
    outputs = {p.stem: read_logged(p) for p in sorted((folder / "outputs").glob("*.jsonl"))}
    if evaluation is not None:  # in the recipe's order
        named = [m["name"] for m in evaluation["models"]]
        outputs = {name: outputs[name] for name in named if name in outputs}
    try:
        text = (folder / "config.yaml").read_text(encoding="utf-8")
    except OSError:
        text = ""
    config = yaml.safe_load(text) or {}
    return RunRecord(
        name=str(folder.relative_to(root)) if folder != root else folder.name,
        folder=folder,
        stage=str(manifest.get("stage", "?")),
        manifest=manifest,
        config=config,
        metrics=read_logged(folder / "metrics.jsonl"),
        evaluation=evaluation,
        outputs=outputs,
        samples=read_logged(folder / "samples.jsonl"),
    )


def _rank(stage: str) -> tuple[int, str]:
    return (ORDER.index(stage) if stage in ORDER else len(ORDER), stage)


def _read_json(path: Path) -> Row:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise AlignError(f"report: {path}: cannot be read: {error}") from error
