"""Side by side with TRL and with the limit: ``make bench``, or ``python -m benchmarks.run --help``.

Builds the peers' environments when they are missing, writes the same rows and starting weights for
all sides, and measures every side of every stage in a process of its own, one after another, round
by round: what else the machine does hits all of them alike. Results go to ``--folder``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from align.models.precision import has_fast_bf16
from benchmarks.measure import WARM_UP, Job, write_job
from benchmarks.plan import (
    BATCH,
    LONG,
    LR,
    PEER,
    PEER_SETTINGS,
    PEER_SETTINGS_BF16,
    SHORT,
    STAGES,
    TINY,
    Plan,
    points,
    rows_of,
)
from benchmarks.report import write_report

ROOT = Path(__file__).parents[1]
REQUIREMENTS = Path("benchmarks/requirements")
# what `align` sets by itself; a peer is given it, though its users have to know of it
MEMORY = {
    "THP_MEM_ALLOC_ENABLE": "1",
    "MALLOC_TRIM_THRESHOLD_": str(2**62),
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "512",
}
SMOLLM2 = "models/smollm2-135m-instruct"


def main() -> None:
    args = _arguments()
    plan = LONG if args.full else SHORT
    plan = dataclasses.replace(plan, steps=args.steps or plan.steps)
    model = Path(args.model)
    folder = Path(args.folder) / model.name
    folder.mkdir(parents=True, exist_ok=True)
    pythons = {
        name: peer_environment(Path(args.folder), name) for name in sorted(set(PEER.values()))
    }
    batches = {rows_of(s): (BATCH[s], plan.steps) for s in args.stages}
    command = [sys.executable, "-m", "benchmarks.prepare", str(model), str(folder)]
    run_logged([*command, json.dumps(batches)], folder / "prepare.log")
    bench = Bench(folder, plan, pythons, json.loads((folder / "prepared.json").read_text()))
    for number in range(plan.rounds):
        for stage in args.stages:
            bench.round(stage, number)
            bench.save(args)
    if not args.no_scaling:
        for name, job in points(folder, full=args.full):
            bench.measure(name, "align", [sys.executable, "-m", "benchmarks.scaling"], job, {})
            bench.save(args)
    print(write_report(folder / "results.json", folder))


class Bench:
    """Measurements as they come in, a list of dictionaries."""

    def __init__(
        self, folder: Path, plan: Plan, pythons: dict[str, str], facts: dict[str, Any]
    ) -> None:
        self.folder, self.plan, self.pythons, self.facts = folder, plan, pythons, facts
        self.found: list[dict[str, Any]] = []

    def round(self, stage: str, number: int) -> None:
        """`align`, the peer and the limit once each."""
        ours = [sys.executable, "-m", "benchmarks.align_stage"]
        self.measure(stage, "align", ours, self.job(stage, "align", {}), {})
        module = "benchmarks.trl_ppo" if stage == "ppo" else "benchmarks.trl_stage"
        theirs = [self.pythons[PEER[stage]], "-m", module]
        for settings in self.peer_settings(stage, number):
            job = self.job(stage, PEER[stage], settings)
            self.measure(stage, PEER[stage], theirs, job, settings)
        if stage != "ppo":  # most of its time is sampling, which no product of a step stands for
            limit = [sys.executable, "-m", "benchmarks.limit"]
            job = self.job(stage, "limit", {"tokens": self.facts[rows_of(stage)][WARM_UP:]})
            self.measure(stage, "limit", limit, job, {})

    def peer_settings(self, stage: str, number: int) -> Iterator[dict[str, Any]]:
        """All of them in the first round of the long form, then the fastest of these."""
        bf16 = has_fast_bf16(torch.device("cpu"))
        candidates = (PEER_SETTINGS_BF16 if bf16 else PEER_SETTINGS)[stage]
        if number == 0:
            yield from candidates if self.plan.all_settings else candidates[:1]
        else:
            mine = [m for m in self.found if m["name"] == stage and m["side"] == PEER[stage]]
            yield min(mine, key=lambda m: sum(m["seconds"]))["settings"]

    def job(self, stage: str, side: str, settings: dict[str, Any]) -> Job:
        ordered = "peer." if side.startswith("trl") and stage != "ppo" else ""
        return Job(
            stage=stage,
            model=str(self.folder / "policy"),
            reward_model=str(self.folder / "reward"),
            data=str(self.folder / f"{rows_of(stage)}.{ordered}jsonl"),
            folder=str(self.folder / "work" / f"{stage}-{side}"),
            batch=BATCH[stage],
            steps=self.plan.steps,
            lr=LR[stage],
            response_tokens=self.plan.response_tokens,
            settings=settings,
        )

    def measure(
        self, name: str, side: str, command: list[str], job: Job, settings: dict[str, Any]
    ) -> None:
        work = Path(job.folder)
        work.mkdir(parents=True, exist_ok=True)
        write_job(job, work / "job.json")
        started = time.monotonic()
        run_logged([*command, str(work / "job.json"), str(work / "result.json")], work / "log.txt")
        result = json.loads((work / "result.json").read_text())
        self.found.append({"name": name, "side": side, "settings": settings, **result})
        steps = ", ".join(f"{s:.2f}" for s in result["seconds"])
        took = time.monotonic() - started
        print(f"{name:12} {side:11} {settings or ''} {steps} s a step ({took:.0f} s)", flush=True)

    def save(self, args: argparse.Namespace) -> None:
        """After every stage, so that an interrupted run is not lost."""
        about = {
            "model": args.model,
            "form": "long" if args.full else "short",
            "batch": BATCH,
            "tokens": self.facts,
            "threads": os.environ["OMP_NUM_THREADS"],
            "processor": _processor(),
            "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
        }
        text = json.dumps({"about": about, "measurements": self.found}, indent=1)
        (self.folder / "results.json").write_text(text, encoding="utf-8")


def peer_environment(folder: Path, name: str) -> str:
    """The Python of a peer's environment, built when its requirements have changed."""
    venv = folder / "venvs" / name
    wanted = (ROOT / REQUIREMENTS / f"{name}.txt").read_text()
    stamp = venv / "built-from.txt"
    if not stamp.is_file() or stamp.read_text() != wanted:
        command = ["bash", "tools/make_venv.sh", str(venv), "-r", str(REQUIREMENTS / f"{name}.txt")]
        subprocess.run(command, check=True, env={**os.environ, "PYTHON": sys.executable})
        stamp.write_text(wanted)
    return str(venv / "bin" / "python")


def run_logged(command: list[str], log: Path) -> None:
    """All sides run under the same environment: huge pages, and freed memory is kept."""
    quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment = {**MEMORY, **quiet, **os.environ, "PYTHONPATH": str(ROOT)}
    with log.open("w", encoding="utf-8") as file:
        code = subprocess.run(command, stdout=file, stderr=file, env=environment).returncode
    if code:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise SystemExit(f"bench: {' '.join(command)} failed ({code}); {log} ends with\n{tail}")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), set())
    known = ("avx2", "avx512f", "avx512_bf16", "amx_tile")
    instructions = ", ".join(flag for flag in known if flag in flags)
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, {instructions}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.run", description=__doc__)
    found = SMOLLM2 if Path(SMOLLM2, "config.json").is_file() else TINY
    parser.add_argument("--model", default=found, help=f"folder; here {found}")
    parser.add_argument("--full", action="store_true", help="the long form")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument(
        "--steps", type=int, help=f"of one process; the first {WARM_UP} are warm-up"
    )
    parser.add_argument("--no-scaling", action="store_true", help="leave out how cost grows")
    parser.add_argument("--folder", default="runs/benchmarks", help="where results go")
    args = parser.parse_args()
    if args.steps is not None and args.steps <= WARM_UP:
        parser.error(f"--steps: got {args.steps}; the first {WARM_UP} are warm-up, so give more")
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    return args


if __name__ == "__main__":
    os.chdir(ROOT)
    main()
