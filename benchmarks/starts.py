"""How long a reward model takes to its first step on many pairs, first and second time; its memory.

    python -m benchmarks.starts 1000 10000 100000 1000000

The shipped tiny model, rows of `benchmarks.data`, an empty token cache. A start is a process of its
own. CPU seconds are those of all its processes, imports included; memory is the largest resident
set of one of them, as the kernel reports it. Prints a Markdown table.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from align.models import load_tokenizer
from benchmarks import align_stage
from benchmarks.data import preference_rows, write_jsonl
from benchmarks.measure import Job
from benchmarks.plan import TINY


def starts(folder: Path, pairs: int) -> dict[str, Any]:
    """Lists of the first and the second start: ``seconds`` to the first step, ``cpu``, ``gib``."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "rows.jsonl"
    write_jsonl(data, preference_rows(load_tokenizer(TINY), pairs, seed=1))
    job = Job("rm", TINY, TINY, str(data), str(folder), batch=4, steps=2, lr=1e-5)
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(align_stage.recipe(job)), encoding="utf-8")
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        both = [_start(recipe, cache) for _ in range(2)]
    data.unlink()
    return {key: [start[key] for start in both] for key in both[0]}


def _start(recipe: Path, cache: str) -> dict[str, float]:
    command = [sys.executable, "-m", "align", "rm", str(recipe)]
    log = recipe.with_suffix(".log")
    with log.open("w") as stream:
        process = subprocess.Popen(
            command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, "ALIGN_CACHE": cache},
        )
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} failed:\n{log.read_text()[-3000:]}")
    lines = (recipe.parent / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
    steps = [line for line in map(json.loads, lines) if "tokens" in line]
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "seconds": steps[0]["seconds"],
        "cpu": usage.ru_utime + usage.ru_stime,
        "gib": usage.ru_maxrss * unit / 2**30,
    }


def main() -> None:
    print("| pairs | first start: s | CPU s | GiB | second start: s | CPU s | GiB |")
    print("|---|---|---|---|---|---|---|")
    for pairs in map(int, sys.argv[1:]):
        with tempfile.TemporaryDirectory() as folder:
            found = starts(Path(folder), pairs)
        cells = [
            f"{found['seconds'][i]:.1f} | {found['cpu'][i]:.0f} | {found['gib'][i]:.2f}"
            for i in range(2)
        ]
        print(f"| {pairs:,} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
