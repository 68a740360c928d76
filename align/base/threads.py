"""Whether torch's waiting threads spin or sleep, chosen before torch is imported.

Between two parallel regions the threads of OpenMP spin, which is fastest on an idle machine. Beside
one busy process a spinning thread takes the time that the working one waits for: a run on two cores
was then 3.5 times as slow, and with sleeping threads 1.4 times. Sleeping threads cost a tenth on an
idle machine, so they sleep only where others are busy when the run starts. The runtime reads its
variables once, when torch loads it, so the choice holds for the run.
"""

from __future__ import annotations

import os
import time
from collections.abc import MutableMapping
from dataclasses import dataclass

THEIRS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables by which a user has chosen already."""
BUSY = 0.25
"""Processors that others keep busy from which on threads sleep: above the noise of a desktop."""
WINDOW = 0.2
"""Seconds of measurement: processor times are counted in hundredths."""


@dataclass(frozen=True)
class Load:
    """Processor seconds since boot on the processors that this process may use.

    Attributes:
        at: Monotonic time of the reading, seconds.
        busy: Seconds in which the processors worked, summed over them.
        own: Seconds of these that this process and its finished children used.
    """

    at: float
    busy: float
    own: float


def read_load() -> Load | None:
    """Read the processor times, or None where the system does not tell them."""
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
    """Processors that other processes kept busy between two readings, on average."""
    seconds = max(after.at - before.at, 1e-9)
    return max(0.0, (after.busy - before.busy) - (after.own - before.own)) / seconds


def choose_wait_policy(before: Load | None, environ: MutableMapping[str, str]) -> None:
    """Set ``OMP_WAIT_POLICY=passive`` where other processes have been busy since ``before``.

    Does nothing where the user has chosen, or where the run has one thread, which waits for none.
    Sleeps until `WINDOW` seconds have passed since ``before``.
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
    """Numbers of the processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(number for number in os.sched_getaffinity(0) if number < count)
    return list(range(count))
