"""Prove one CUDA machine in under nine minutes, without a hub: kernels, stages, memory, speed.

    python -m benchmarks.gpu                        everything that fits into 520 seconds
    python -m benchmarks.gpu kernels 0.6b tiny      these parts
    python -m benchmarks.gpu --list                 the parts and their cases
    python -m benchmarks.gpu --small                tiny shapes, for a CPU

Models have random weights of Qwen3's shapes (0.6B, 4B, 8B) and rows are real text, so nothing is
downloaded. Every case is a process of its own: one that fails, or runs out of memory or time, is
reported and the next one starts. ``results.json`` and ``table.md`` in ``--output`` are written anew
after each case, so that what was measured survives whatever comes. `benchmarks/gpu_cases.py` has
the cases themselves.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SIZES = ("0.6b", "4b", "8b")
FULL = ("sft-full", "rm-full", "dpo-full", "ppo-full")
LORA = ("sft-lora", "rm-lora", "dpo-lora", "ppo-lora")
PARTS: dict[str, tuple[str, ...]] = {
    "machine": ("machine",),
    "kernels": ("kernels",),
    "0.6b": ("make", *FULL, *LORA, "sample"),
    "tiny": ("tiny",),
    "4b": ("make", *LORA, "sample", "sft-full"),
    "8b": ("make", *LORA, "sample"),
    "trl": ("trl-sft", "trl-rm", "trl-dpo"),
}
"""In the order of worth: what the budget does not reach is at the end."""

LONGEST = {"tiny": 240.0}
"""Seconds of a case's limit, where it is not `USUAL`."""
USUAL = 120.0
LEAST = 8.0
"""Seconds that have to be left for a case to be started."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--small", action="store_true", help="tiny shapes, which a CPU can run")
    parser.add_argument("--budget", type=float, default=520.0, help="seconds in all")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/gpu"))
    parser.add_argument("--list", action="store_true", help="show the parts and stop")
    args = parser.parse_args(arguments)
    unknown = [part for part in args.parts if part not in PARTS]
    if unknown:
        parser.error(f"{unknown[0]}: no such part; there are {', '.join(PARTS)}")
    if args.list:
        for part, cases in PARTS.items():
            print(f"{part:<8} {' '.join(cases)}")
        return 0
    args.output.mkdir(parents=True, exist_ok=True)
    found: list[dict[str, Any]] = []
    deadline = time.monotonic() + args.budget
    for part, case in _planned(args.parts or list(PARTS)):
        result = _run(part, case, args.output, deadline, small=args.small)
        found.append(result)
        print(line(result), flush=True)
        (args.output / "results.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
        (args.output / "table.md").write_text(table(found), encoding="utf-8")
    print(f"\n{table(found)}\n{args.output}: results.json, table.md, a log of every case")
    return int(any(result["status"] == "failed" for result in found))


def _planned(parts: Sequence[str]) -> Iterator[tuple[str, str]]:
    for part in parts:
        for case in PARTS[part]:
            yield part, case


def _run(part: str, case: str, output: Path, deadline: float, *, small: bool) -> dict[str, Any]:
    """One case in a process of its own; whatever happens there becomes a row."""
    about: dict[str, Any] = {"part": part, "case": case}
    reason = _not_to_run(case, deadline)
    if reason:
        return {**about, "status": "not run", "reason": reason}
    name = f"{part}-{case}"
    asked, answer, log = (output / f"{name}{end}" for end in (".case.json", ".json", ".log"))
    asked.write_text(json.dumps({**about, "folder": str(output / "work"), "small": small}))
    answer.unlink(missing_ok=True)
    limit = min(LONGEST.get(case, USUAL), deadline - time.monotonic())
    command = [sys.executable, "-m", "benchmarks.gpu_cases", str(asked), str(answer)]
    started = time.monotonic()
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # of Ctrl-C too: the case has a session of its own
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    about["wall"] = round(time.monotonic() - started, 1)
    if code is None:
        return {**about, "status": "failed", "reason": f"not done after {limit:.0f} s"}
    if code or not answer.is_file():
        return {**about, "status": "failed", "reason": _last_line(log)}
    return {**about, "status": "done", **json.loads(answer.read_text("utf-8"))}


def _not_to_run(case: str, deadline: float) -> str:
    left = deadline - time.monotonic()
    if left < LEAST:
        return "the time is used up"
    if case.startswith("trl") and importlib.util.find_spec("trl") is None:
        return "TRL is not installed"
    return ""


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it printed nothing"


def line(result: dict[str, Any]) -> str:
    """What is said of a case when it has ended."""
    name = f"{result['part']:<8} {result['case']:<9}"
    if result["status"] != "done":
        return f"{name} {result['status']}: {result['reason']}"
    facts = ", ".join(f"{key} {_number(value)}" for key, value in shown(result).items())
    return f"{name} {result['wall']:.0f} s: {facts}"


def shown(result: dict[str, Any]) -> dict[str, Any]:
    """A result's figures, without what says which case it is."""
    named = ("part", "case", "status", "reason", "wall", "details")
    return {key: value for key, value in result.items() if key not in named}


COLUMNS = {
    "tokens_per_second": "tokens/s",
    "mfu": "MFU",
    "of_products": "of the bare products",
    "peak_gib": "peak, GiB",
    "estimate_gib": "`align check`, GiB",
    "estimate_ratio": "estimate / peak",
    "attention": "attention",
}
"""Figures of a stage that have a column of their own; all others are listed behind them."""


def table(found: Sequence[dict[str, Any]]) -> str:
    """All results as a Markdown table."""
    rows = [["part", "case", "wall, s", *COLUMNS.values(), "other"]]
    for result in found:
        facts = shown(result)
        cells = [_number(facts.pop(key, "")) for key in COLUMNS]
        more = ", ".join(f"{key} {_number(value)}" for key, value in facts.items())
        if result["status"] != "done":
            more = f"**{result['status']}**: {result['reason']}"
        rows.append([result["part"], result["case"], str(result.get("wall", "")), *cells, more])
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
