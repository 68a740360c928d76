"""Choose whether torch's waiting threads spin or sleep, before torch is imported.

Between two parallel regions the threads of OpenMP spin, which is fastest on an idle machine. Beside
one busy process a spinning thread takes the time of the working one: a run on two cores was then
3.5 times as slow, and with sleeping threads 1.4 times. Sleeping threads cost a tenth on an idle
machine, so they sleep only if other processes are busy when the run starts. The runtime reads its
variables once, when torch loads it, so the choice holds for the run.
"""

from __future__ import annotations

import os
import time
from collections.abc import MutableMapping
from dataclasses import dataclass

THEIRS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables with which the user may have chosen already."""
BUSY = 0.25
"""Processors kept busy by others above which threads sleep: above a desktop's noise."""
WINDOW = 0.2
"""Length of the measurement, seconds: processor times are counted in hundredths."""


@dataclass(frozen=True)
class Load:
    """Processor seconds since boot on the processors that this process may use.

    Attributes:
        at: Monotonic time of the reading, seconds.
        busy: Seconds of work, summed over the processors.
        own: Seconds of these that this process and its finished children used.
    """

    at: float
    busy: float
    own: float


def read_load() -> Load | None:
    """Read the processor times; None if the system does not report them."""
    try:
        import psutil

        per_cpu = psutil.cpu_times(percpu=True)
        ours = _usable(len(per_cpu))
    except (ImportError, OSError, RuntimeError):
        return None
    idle = ("idle", "iowait", "guest", "guest_nice")  # user time contains that of guests
    busy = sum(
        seconds
        for number in ours
        for name, seconds in per_cpu[number]._asdict().items()
        if name not in idle
    )
    return Load(time.monotonic(), busy, sum(os.times()[:4]))


def busy_processors(before: Load, after: Load) -> float:
    """Average number of processors that other processes kept busy between two readings."""
    seconds = max(after.at - before.at, 1e-9)
    return max(0.0, (after.busy - before.busy) - (after.own - before.own)) / seconds


def choose_wait_policy(before: Load | None, environ: MutableMapping[str, str]) -> None:
    """Set ``OMP_WAIT_POLICY=passive`` if other processes have been busy since ``before``.

    Nothing changes if the user has chosen, or if the run has only one thread. Sleeps until `WINDOW`
    seconds have passed since ``before``.
    """
    if before is None or any(name in environ for name in THEIRS):
        return
    if environ.get("OMP_NUM_THREADS", "").strip() == "1" or (os.cpu_count() or 1) == 1:
        return
    time.sleep(max(0.0, before.at + WINDOW - time.monotonic()))
    after = read_load()
    if after is not None and busy_processors(before, after) >= BUSY:
        environ["OMP_WAIT_POLICY"] = "passive"


def _usable(count: int) -> list[int]:
    """List the processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(number for number in os.sched_getaffinity(0) if number < count)
    return list(range(count))
