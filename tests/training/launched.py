"""Runs of `python -m align`, one after another, in each process that a launcher started.

    accelerate launch ... tests/training/launched.py RUNS.json
    torchrun ... tests/training/launched.py RUNS.json

RUNS.json is a list of {"arguments": [...]}, and where wanted "env": {...}; "stop": a step in which
the last process, and no other, is told to leave (SIGTERM); "copy": [from, to], after
the run. Not a test: those of test_fsdp.py and test_processes.py read what it leaves.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from align.training import loop

TOLD_TO_STOP = 128 + signal.SIGTERM


def set_lr_and_stop(original: Any, stop: int) -> Any:
    """``set_lr``, which the loop calls once before each step, counted from 0."""

    def set_lr(optimizer: Any, peak: float, step: int, *rest: Any) -> float:
        if step == stop and os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
            signal.raise_signal(signal.SIGTERM)
        return original(optimizer, peak, step, *rest)

    return set_lr


def align(arguments: list[str]) -> int:
    """Exit code of ``python -m align``."""
    with mock.patch.object(sys, "argv", ["align", *arguments]):
        try:
            runpy.run_module("align", run_name="__main__")
        except SystemExit as end:
            return int(end.code or 0)
    return 0


for run in json.loads(Path(sys.argv[1]).read_text("utf-8")):
    os.environ.update(run.get("env", {}))
    stop = run.get("stop", -1)
    with mock.patch.object(loop, "set_lr", set_lr_and_stop(loop.set_lr, stop)):
        code = align(run["arguments"])
    wanted = TOLD_TO_STOP if stop >= 0 else 0
    assert code == wanted, f"{run['arguments']}: exit code {code}, wanted {wanted}"
    if "copy" in run and os.environ["RANK"] == "0":
        shutil.copytree(*run["copy"])
