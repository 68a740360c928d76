"""A run's folder: configuration, data, measurements and outputs.

``config.yaml``, ``manifest.json`` and ``metrics.jsonl`` are written during the run, so that a run
that dies has left all its numbers. An existing run is never overwritten unless asked, and it is
kept until the new run has its first numbers.
"""

from __future__ import annotations

import json
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from align.base import locks
from align.base.files import RESUME, read_metrics, reason, require_writable, write_whole, writing
from align.base.growing import GrowingFiles, Marks
from align.base.machine import hardware, versions
from align.base.progress import duration, say, table, warn
from align.run import doctor
from align.run.card import write_cards
from align.run.doctor_rules import FEWEST
from align.run.files import (
    GROWING,
    MANIFEST,
    OURS,
    REPLACED,
    claim,
    read_manifest,
    remove,
    set_aside,
    stillborn,
    write_manifest,
)
from align.run.identity import lasting, plain, require_same
from align.types import AlignError, SourceReport

CALLER: ContextVar[Mapping[str, Any]] = ContextVar("CALLER", default=MappingProxyType({}))
"""Facts about a call from Python that the manifests of its runs hold: ``command``, ``given``."""


class Run:
    """An open run folder; every rank has one, only the main process writes."""

    def __init__(
        self,
        stage: str,
        output_dir: str,
        *,
        config_yaml: str,
        seed: int,
        resume: str = "never",
        overwrite: bool = False,
        resumable: bool = True,
        is_main: bool = True,
    ) -> None:
        self.stage, self.folder, self.is_main = stage, Path(output_dir), is_main
        self._resumable = resumable
        self.started = time.time()
        self.trackers: list[Callable[[dict[str, float], int], None]] = []
        self._manifest: dict[str, Any] = {
            "stage": stage,
            "run": uuid.uuid4().hex,
            "status": "running",
            "seed": seed,
            "command": " ".join(sys.argv),
            **CALLER.get(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "versions": versions(),
            "hardware": hardware(),
            "recipe": lasting(config_yaml),
        }
        # manifest of the run that is resumed
        self._previous: dict[str, Any] | None = None
        self._begun = False
        self._growing = GrowingFiles(self.folder, GROWING)
        # rows logged by this process, the next count at which the doctor looks, its reports so far
        self._logged, self._next_look = 0, FEWEST
        self._told: set[str] = set()
        self._config_yaml = config_yaml
        self._rows: Callable[[], Iterable[tuple[str, int]]] | None = None
        self._inputs = _inputs(yaml.safe_load(config_yaml))
        if is_main:
            self._open(resume, overwrite)

    def _open(self, resume: str, overwrite: bool) -> None:
        """Refuse an unusable folder; nothing is written or removed before `begin`."""
        held = os.path.lexists(self.folder / MANIFEST)
        if self.folder.exists() and not self.folder.is_dir():
            raise AlignError(f"output_dir: {self.folder} is a file; name a folder")
        for path in self._inputs:
            if any(_lies_in(path, self.folder / name) for name in OURS):
                raise AlignError(
                    f"output_dir: {self.folder} holds {path}, which this run reads and would write "
                    "over; name another output_dir"
                )
        foreign = [] if held or overwrite else [n for n in OURS if (self.folder / n).exists()]
        if foreign:
            raise AlignError(
                f"output_dir: {self.folder} holds {foreign[0]}, but no run (manifest.json); name "
                "another output_dir, or add overwrite=true to replace it"
            )
        if held and resume == "never" and not overwrite and not stillborn(self.folder):
            resuming = "resume=auto to resume it, " if self._resumable else ""
            raise AlignError(
                f"output_dir: {self.folder} already holds a run; add {resuming}"
                "overwrite=true to replace it, or another output_dir"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            claim(self.folder)
        except OSError as error:
            raise AlignError(f"output_dir: {self.folder}: {reason(error)}") from error
        require_writable(self.folder / "config.yaml", "output_dir:")
        if held and resume == "auto":
            self._previous = self._read_manifest()

    def _read_manifest(self) -> dict[str, Any]:
        remedy = "so the run cannot resume; restore it, or start anew with overwrite=true"
        try:
            return read_manifest(self.folder, remedy)
        except AlignError as error:
            raise AlignError(f"resume: {error}") from error

    @property
    def id(self) -> str:
        """Id shared by the run and its checkpoints; a resumed run keeps it."""
        return str(self._manifest["run"])

    @property
    def previous_id(self) -> str | None:
        """Id of the folder's run; old runs have none."""
        return (self._previous or {}).get("run")

    def begin(self) -> None:
        """Start anew, after model and data are loaded; remove an earlier run's files.

        Raises:
            AlignError: The folder's run is done and has no checkpoint to resume from, or the run to
                resume is another one.
        """
        self.require_unfinished()
        self._require_same()
        if self.is_main:
            set_aside(self.folder)
        self._go()

    def resume(self) -> None:
        """Resume the folder's run, if it is still the same run.

        Raises:
            AlignError: The recipe, the data or the starting weights have changed.
        """
        self._require_same()
        self._manifest.update(run=self.previous_id or self.id)
        self.keep()
        self._go()

    def require_unfinished(self) -> None:
        """Refuse to resume a run that is done."""
        if self._previous is not None and self._previous.get("status") == "done":
            raise AlignError(
                f"resume: the run in {self.folder} is done, so there is nothing to resume; "
                "replace it with overwrite=true, or name another output_dir"
            )

    def _require_same(self) -> None:
        require_same(self.folder, self.stage, self._previous or {}, plain(self._manifest))

    def _go(self) -> None:
        self._begun = True
        if self.is_main:
            write_whole(self.folder / "config.yaml", self._config_yaml, again=RESUME)
            if self._rows is not None:
                lines = (f"{name}\t{tokens}\n" for name, tokens in self._rows())
                write_whole(self.folder / "train_rows.tsv", lines, again=RESUME)
            self._write_manifest()

    def describe(self, **facts: Any) -> None:
        """Add facts to the manifest: data reports, hashes, parameter counts."""
        self._manifest.update(facts)
        self._write_manifest()

    def trace_rows(self, rows: Callable[[], Iterable[tuple[str, int]]]) -> None:
        """Set (file:line, tokens) of every training row, for ``train_rows.tsv``: row N is line
        N.
        """
        self._rows = rows

    def describe_data(self, **reports: Sequence[SourceReport]) -> None:
        self.describe(data={k: [asdict(r) for r in v] for k, v in reports.items()})

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append numbers to metrics.jsonl, and pass them to every live tracker."""
        if not metrics:
            return
        if self.is_main:
            self.keep()
            line = {"step": step, "seconds": round(time.time() - self.started, 3), **metrics}
            self.append("metrics.jsonl", [line])
        for tracker in self.trackers:
            with writing(self.folder / "tracking", "trackers=[] needs no room there"):
                tracker(dict(metrics), step)
        if self.is_main:
            self._logged += 1
            if self._logged >= self._next_look:
                self._next_look = self._logged + 1 + self._logged // 10
                self._look()

    def _look(self) -> None:
        """Run the doctor, and report each kind of trouble once."""
        rows = read_metrics(self.folder / "metrics.jsonl")
        for finding in doctor.diagnose(self.stage, rows, self._manifest):
            if finding.kind not in self._told:
                self._told.add(finding.kind)
                warn(f"{self.stage}, step {rows[-1]['step']}: {finding}")

    def marks(self) -> dict[str, Any]:
        """Return sizes and hashes of the growing files, for a checkpoint and for `rewind`."""
        return self._growing.marks() if self.is_main else {}

    def require_rows(self, marks: Marks, checkpoint: Path) -> None:
        """Refuse a checkpoint if the growing files have changed since."""
        if self.is_main:
            self._growing.require(marks, checkpoint)

    def rewind(self, marks: Marks) -> None:
        """Drop rows of steps that a resumed run will repeat, and a row cut short by a crash."""
        if self.is_main:
            self._growing.cut_back(marks)

    def append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows to one of the growing files."""
        if self.is_main:
            self._growing.append(name, rows)

    def write_rows(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write a JSONL file of the folder atomically."""
        if self.is_main:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_whole(self.folder / name, lines)

    def count(self, name: str) -> int:
        """Count the rows of a JSONL file in the folder; 0 without the file."""
        path = self.folder / name
        return path.read_bytes().count(b"\n") if path.is_file() else 0

    def keep(self) -> None:
        """Remove the replaced run, now that this run has numbers or a checkpoint of its own."""
        if self.is_main:
            remove(self.folder / REPLACED)

    def finish(self, rows: Sequence[Sequence[str]], **facts: Any) -> None:
        """Mark the run as done and print its closing table."""
        seconds = time.time() - self.started
        self.describe(status="done", seconds=round(seconds, 1), **facts)
        if self.is_main:
            write_cards(self.folder, plain(self._manifest))
            self.keep()
            locks.release(self.folder)
            say(table(rows, title=f"\n{self.stage}: done in {duration(seconds)}"))
            if self.stage in doctor.judged_stages():
                self._tell_findings()
            say(f"  -> {self.folder}")

    def _tell_findings(self) -> None:
        logged = read_metrics(self.folder / "metrics.jsonl")
        findings = doctor.diagnose(self.stage, logged, self._manifest)
        self.describe(doctor=[asdict(finding) for finding in findings])
        for line in doctor.closing_lines(self.stage, logged, findings):
            say(f"  {line}")

    def _write_manifest(self) -> None:
        if self.is_main and self._begun:
            write_manifest(self.folder, plain(self._manifest))


def _inputs(recipe: Any, key: str = "") -> list[Path]:
    """List every existing file and folder that the recipe reads."""
    if isinstance(recipe, dict):
        return [path for k, v in recipe.items() for path in _inputs(v, str(k))]
    if isinstance(recipe, list):
        return [path for value in recipe for path in _inputs(value, key)]
    named = isinstance(recipe, str) and key not in ("output_dir", "config_yaml")
    return [Path(recipe)] if named and os.path.exists(recipe) else []


def _lies_in(path: Path, place: Path) -> bool:
    """Tell whether one of the two paths is or contains the other."""
    inner, outer = path.resolve(), place.resolve()
    return inner == outer or outer in inner.parents
