"""Read run folders for a report; runs in progress are read as they are."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.base.files import read_json, read_logged, read_metrics, read_yaml, reading
from align.run.files import MANIFEST, read_manifest, status_of
from align.types import AlignError

Row = dict[str, Any]

NOT_OURS = "its content is not what align writes there"

ORDER = ("sft", "generate", "rm", "dpo", "ppo", "eval")
"""Order of the stages in a report; others follow."""


@dataclass(frozen=True)
class RunRecord:
    """Contents of one run's folder.

    Attributes:
        name: Its folder relative to the reported runs' common folder, such as ``tiny/ppo``.
        metrics: Lines of metrics.jsonl.
        evaluation: eval.json; None for other stages.
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
        """Return steps and values of one key; non-finite values are omitted."""
        found = [(float(r["step"]), float(r[key])) for r in self.metrics if key in r]
        finite = [pair for pair in found if all(map(math.isfinite, pair))]
        return [s for s, _ in finite], [v for _, v in finite]


def find_runs(places: Sequence[str]) -> list[Path]:
    """Find the run folders in ``places`` and below, in the order of the stages.

    Raises:
        AlignError: A place is no folder, or holds no run.
    """
    found: dict[Path, None] = {}
    for place in places:
        folder = Path(place)
        if not folder.is_dir():
            what = "is a file" if folder.is_file() else "no such folder"
            raise AlignError(f"report: {place}: {what}; name a folder such as runs/tiny/ppo")
        here = [folder] if os.path.lexists(folder / MANIFEST) else []
        inside = sorted(p.parent for p in folder.rglob(MANIFEST) if p.parent != folder)
        if not here + inside:
            raise AlignError(f"report: {place}: no run in it; a run's folder has a manifest.json")
        found |= dict.fromkeys(here + inside)
    return sorted(found, key=lambda folder: _rank(_manifest(folder).get("stage", "")))


def read_run(folder: Path, root: Path) -> RunRecord:
    """Read a run's folder."""
    manifest = _manifest(folder)
    manifest["status"] = status_of(folder, manifest)
    with reading("report"):
        evaluation = _if_there(folder / "eval.json", read_json)
        outputs = {p.stem: read_logged(p) for p in sorted((folder / "outputs").glob("*.jsonl"))}
        config = _if_there(folder / "config.yaml", read_yaml) or {}
    if evaluation is not None:  # use the recipe's order
        with reading(folder / "eval.json", NOT_OURS):
            named = [m["name"] for m in evaluation["models"]]
            outputs = {name: outputs[name] for name in named if name in outputs}
    return RunRecord(
        name=str(folder.relative_to(root)) if folder != root else folder.name,
        folder=folder,
        stage=str(manifest.get("stage", "?")),
        manifest=manifest,
        config=config,
        metrics=read_metrics(folder / "metrics.jsonl"),
        evaluation=evaluation,
        outputs=outputs,
        samples=read_logged(folder / "samples.jsonl"),
    )


def _rank(stage: str) -> tuple[int, str]:
    return (ORDER.index(stage) if stage in ORDER else len(ORDER), stage)


def _manifest(folder: Path) -> Row:
    try:
        return read_manifest(folder)
    except AlignError as error:
        raise AlignError(f"report: {error}") from error


def _if_there(path: Path, read: Callable[[Path], Row]) -> Row | None:
    return read(path) if os.path.lexists(path) else None
