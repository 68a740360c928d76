"""A run's folder: what was run on what, what was measured, and what lies where.

``config.yaml``, ``manifest.json`` and ``metrics.jsonl`` are written as the run goes on, so that a
run that dies has told all it knew. A folder that holds a run is never written over unasked, and
what is to be replaced is kept until model and data of the new run are loaded.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from align import doctor
from align.model_card import write_cards
from align.progress import say, table, warn
from align.types import AlignError, SourceReport

OURS = (
    "config.yaml", "manifest.json", "metrics.jsonl", "samples.jsonl", "pairs.jsonl", "best.jsonl",
    "eval.json",
    "model", "critic", "model_adapter", "critic_adapter", "checkpoints", "outputs", "tracking",
    "margins.png",
)  # fmt: skip
"""What a run writes, and so all that ``overwrite=true`` removes."""

RUNNING = ".running"
"""Which process writes in a folder, while it does."""

LIBRARIES = ("torch", "transformers", "accelerate", "peft", "datasets", "tokenizers", "sacrebleu")


class Run:
    """An open run folder; every process has one, only the main process writes."""

    def __init__(
        self,
        stage: str,
        output_dir: str,
        *,
        config_yaml: str,
        seed: int,
        resume: str = "never",
        overwrite: bool = False,
        is_main: bool = True,
    ) -> None:
        self.stage, self.folder, self.is_main = stage, Path(output_dir), is_main
        self.started = time.time()
        self.trackers: list[Callable[[dict[str, float], int], None]] = []
        self._manifest: dict[str, Any] = {
            "stage": stage,
            "status": "running",
            "seed": seed,
            "command": " ".join(sys.argv),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "versions": _versions(),
            "hardware": _hardware(),
            "recipe": lasting(config_yaml),
        }
        # of the run that is resumed
        self._previous: dict[str, Any] | None = None
        self._begun = False
        # rows logged by this process, after how many of them the doctor looks, what it has told
        self._logged, self._next_look = 0, doctor.FEWEST
        self._told: set[str] = set()
        self._config_yaml = config_yaml
        self._inputs = _inputs(yaml.safe_load(config_yaml))
        if is_main:
            self._open(resume, overwrite)

    def _open(self, resume: str, overwrite: bool) -> None:
        """Refuse what cannot be; nothing is written or removed before `begin`."""
        held = (self.folder / "manifest.json").is_file()
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
        if held and resume == "never" and not overwrite:
            raise AlignError(
                f"output_dir: {self.folder} already holds a run; add resume=auto to go on with it, "
                "overwrite=true to replace it, or another output_dir"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise AlignError(f"output_dir: {self.folder}: {error.strerror}") from error
        self._claim()
        if held and not overwrite:
            self._previous = self._read_manifest()

    def _claim(self) -> None:
        """Two runs in one folder would mix their rows: the second one is refused."""
        path = self.folder / RUNNING
        try:
            host, process, started = json.loads(path.read_text(encoding="utf-8"))
            elsewhere = host == platform.node() and process != os.getpid()
            alive = elsewhere and psutil.Process(process).create_time() == started
        except (OSError, ValueError, TypeError, psutil.Error):
            alive = False  # nobody, or a run that was killed
        if alive:
            raise AlignError(
                f"output_dir: {self.folder}: process {process} is running in it; wait for it, or "
                "name another output_dir"
            )
        mine = [platform.node(), os.getpid(), psutil.Process().create_time()]
        path.write_text(json.dumps(mine) + "\n", encoding="utf-8")

    def _read_manifest(self) -> dict[str, Any]:
        path = self.folder / "manifest.json"
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise AlignError(
                f"resume: {path}: cannot be read ({error}), so the run cannot go on; restore it, "
                "or start anew with overwrite=true"
            ) from error

    def begin(self) -> None:
        """Start anew, now that model and data are loaded: what an earlier run left goes.

        Raises:
            AlignError: The folder's run is done and left no checkpoint to go on from.
        """
        if self._previous is not None and self._previous.get("status") == "done":
            raise AlignError(
                f"resume: the run in {self.folder} is done and left no checkpoint; replace it with "
                "overwrite=true, or name another output_dir"
            )
        if self.is_main:
            held = (self.folder / "manifest.json").is_file()
            for name in OURS if held else ():
                _remove(self.folder / name)
        self._go()

    def resume(self) -> None:
        """Go on with the folder's run, if it is still the same run.

        Raises:
            AlignError: The recipe, the data or the starting weights are others than they were.
        """
        previous = self._previous or {}
        for key in ("recipe", "data", "start_weights"):
            before, now = previous.get(key), _plain(self._manifest.get(key))
            if before is not None and before != now:
                raise AlignError(
                    f"resume: {self.folder}: {_first_difference(key, before, now)}; restore it, or "
                    "start anew with overwrite=true"
                )
        self._go()

    def _go(self) -> None:
        self._begun = True
        if self.is_main:
            (self.folder / "config.yaml").write_text(self._config_yaml, encoding="utf-8")
            self._write_manifest()

    def describe(self, **facts: Any) -> None:
        """Add facts to the manifest: data reports, hashes, parameter counts."""
        self._manifest.update(facts)
        self._write_manifest()

    def describe_data(self, **reports: Sequence[SourceReport]) -> None:
        self.describe(data={k: [asdict(r) for r in v] for k, v in reports.items()})

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, and the same to every live tracker; numbers only."""
        if not metrics:
            return
        for tracker in self.trackers:
            tracker(dict(metrics), step)
        if self.is_main:
            line = {"step": step, "seconds": round(time.time() - self.started, 3), **metrics}
            with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            self._logged += 1
            if self._logged >= self._next_look:
                self._next_look = self._logged + 1 + self._logged // 10
                self._look()

    def _look(self) -> None:
        """Ask the doctor, and tell the user of each kind of trouble once."""
        rows = doctor.read_rows(self.folder)
        for finding in doctor.diagnose(self.stage, rows, self._manifest):
            if finding.kind not in self._told:
                self._told.add(finding.kind)
                warn(f"{self.stage}, step {rows[-1]['step']}: {finding}")

    def forget_after(self, step: int) -> None:
        """Drop the rows of steps that a resumed run will do again, and what a crash cut short."""
        for path in (self.folder / "metrics.jsonl", self.folder / "samples.jsonl"):
            if self.is_main and path.exists():
                # not splitlines: a sampled text may hold U+2028, which is a line end to it
                *lines, _cut_short = path.read_text(encoding="utf-8").split("\n")
                kept = [f"{line}\n" for line in lines if _step(line) <= step]
                partial = path.with_suffix(".tmp")
                partial.write_text("".join(kept), encoding="utf-8")
                os.replace(partial, path)

    def append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows of a JSONL file in the folder."""
        if self.is_main:
            with (self.folder / name).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def finish(self, rows: Sequence[Sequence[str]], **facts: Any) -> None:
        """Mark the run as done and print its closing table."""
        seconds = time.time() - self.started
        self.describe(status="done", seconds=round(seconds, 1), **facts)
        if self.is_main:
            write_cards(self.folder, _plain(self._manifest))
            (self.folder / RUNNING).unlink(missing_ok=True)
            say(table(rows, title=f"\n{self.stage}: done in {duration(seconds)}"))
            if self.stage in doctor.RULES:
                self._tell_findings()
            say(f"  -> {self.folder}")

    def _tell_findings(self) -> None:
        logged = doctor.read_rows(self.folder)
        findings = doctor.diagnose(self.stage, logged, self._manifest)
        self.describe(doctor=[asdict(finding) for finding in findings])
        for line in doctor.closing_lines(self.stage, logged, findings):
            say(f"  {line}")

    def _write_manifest(self) -> None:
        if self.is_main and self._begun:
            path = self.folder / "manifest.json"
            partial = path.with_suffix(".tmp")
            partial.write_text(json.dumps(self._manifest, indent=2) + "\n", encoding="utf-8")
            os.replace(partial, path)


VOLATILE = (
    "resume", "overwrite", "trackers", "save_every", "eval_every", "keep_checkpoints", "log_every",
    "output_dir",
)  # fmt: skip
"""Keys that may change when a run is resumed: they change nothing of what is learnt."""


def lasting(config_yaml: str) -> dict[str, Any]:
    """The recipe as ``a.b: value``, without what may change."""
    flat: dict[str, Any] = {}

    def walk(value: Any, key: str) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                if name not in VOLATILE:
                    walk(inner, f"{key}.{name}" if key else str(name))
        else:
            flat[key] = value

    walk(yaml.safe_load(config_yaml), "")
    return flat


def _inputs(recipe: Any, key: str = "") -> list[Path]:
    """Every file and folder here that the recipe names as something to read."""
    if isinstance(recipe, dict):
        return [path for k, v in recipe.items() for path in _inputs(v, str(k))]
    if isinstance(recipe, list):
        return [path for value in recipe for path in _inputs(value, key)]
    named = isinstance(recipe, str) and key not in ("output_dir", "config_yaml")
    return [Path(recipe)] if named and Path(recipe).exists() else []


def _lies_in(path: Path, place: Path) -> bool:
    """Whether ``path`` is ``place`` or inside it, or ``place`` is inside ``path``."""
    inner, outer = path.resolve(), place.resolve()
    return inner == outer or outer in inner.parents


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _first_difference(key: str, before: Any, now: Any) -> str:
    if key == "recipe":
        missing = object()
        names = {**before, **now}
        name = next(k for k in names if before.get(k, missing) != now.get(k, missing))
        return f"{name} was {before.get(name)!r} and is now {now.get(name)!r}"
    if key == "data":
        return "a data file has changed since the run began (sha256, or what was read from it)"
    return "the model that training starts from has other weights than when the run began"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def change(before: Mapping[str, float], after: Mapping[str, float]) -> list[list[str]]:
    """Rows of a closing table: every held-out number before and after."""
    if not after:
        return [
            ["held out", ""],
            ["nothing", "no row fell on that side; see data.test, data.test_fraction"],
        ]
    rows = [["held out", "before", "after"]]
    rows += [[name, f"{before[name]:.4g}", f"{after[name]:.4g}"] for name in after]
    return rows


def _step(line: str) -> int:
    """The step that a row of metrics or samples belongs to; a row without one belongs to none."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise AlignError(
            f"resume: a row of the run's own files is broken: {line[:60]!r}"
        ) from error
    return int(row.get("step", row.get("iteration", 0)))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("align", *LIBRARIES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _hardware() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "platform": platform.platform(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }
