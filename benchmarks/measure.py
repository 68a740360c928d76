"""What every measured process shares: its job, its peak memory, its result.

Standard library only: the peers' environments import it too, and they do not have `align`.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

WARM_UP = 2
"""Steps in which a process touches most of its memory for the first time."""


@dataclass(frozen=True)
class Job:
    """One measurement, done by one process.

    Attributes:
        stage: ``sft``, ``rm``, ``dpo``, ``dpo_cached`` or ``ppo``.
        model: Folder of the policy that training starts from.
        reward_model: Folder of the one-label model: what `rm` trains, PPO's reward and critic.
        data: JSONL in the order that this side reads it in.
        folder: Where the process may write.
        batch: Examples, pairs or episodes of one optimizer step.
        steps: Optimizer steps, the first `WARM_UP` of which are not reported.
        lr: Constant learning rate of AdamW.
        response_tokens: Longest response that PPO samples.
        settings: What this side alone understands.
    """

    stage: str
    model: str
    reward_model: str
    data: str
    folder: str
    batch: int
    steps: int
    lr: float
    response_tokens: int = 48
    settings: dict[str, Any] = field(default_factory=dict)


def main(measure: Callable[[Job], dict[str, Any]]) -> None:
    """``python -m benchmarks.x JOB.json RESULT.json``: run the job, write what it found."""
    job = Job(**json.loads(Path(sys.argv[1]).read_text("utf-8")))
    Path(job.folder).mkdir(parents=True, exist_ok=True)
    found = measure(job)
    result = {"peak_gib": peak_gib(), **found}
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


def write_job(job: Job, path: Path) -> None:
    path.write_text(json.dumps(dataclasses.asdict(job)), encoding="utf-8")


def peak_gib() -> float:
    """Largest resident memory that this process has had, GiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Clock:
    """When steps ended: by the wall, and in time that processors spent on this process.

    The latter says little about waiting, but it is not disturbed by what else the machine does.
    """

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def tick(self) -> None:
        self.wall.append(time.monotonic())
        self.cpu.append(time.process_time())

    def durations(self) -> dict[str, list[float]]:
        """Of the steps after the warm-up."""
        kinds = {"seconds": self.wall, "cpu_seconds": self.cpu}
        return {
            name: [b - a for a, b in pairwise(ends[WARM_UP - 1 :])] for name, ends in kinds.items()
        }
