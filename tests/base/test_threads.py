"""Waiting threads sleep only beside busy processes, and never against the user's word."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from align.base import threads
from align.base.threads import Load, busy_processors, choose_wait_policy, read_load


def test_own_work_is_not_somebody_elses() -> None:
    # 3 processor seconds in 2 seconds, 2.5 of them ours: 0.5 / 2 of a processor is theirs
    assert busy_processors(Load(10.0, 100.0, 7.0), Load(12.0, 103.0, 9.5)) == pytest.approx(0.25)
    # clocks differ by a tick: never below zero
    assert busy_processors(Load(0.0, 0.0, 0.0), Load(1.0, 1.0, 1.01)) == 0.0


@pytest.mark.parametrize(("theirs", "wanted"), [(0.0, None), (0.2, None), (0.3, "passive")])
def test_threads_sleep_beside_busy_processes_only(
    theirs: float, wanted: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Load(time.monotonic() - 1.0, 0.0, 0.0)
    monkeypatch.setattr(threads, "read_load", lambda: Load(before.at + 1.0, theirs, 0.0))
    environ: dict[str, str] = {}
    choose_wait_policy(before, environ)
    assert environ.get("OMP_WAIT_POLICY") == wanted


@pytest.mark.parametrize(
    "chosen", [{"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "10"}, {"OMP_NUM_THREADS": "1"}]
)
def test_a_users_choice_is_kept(chosen: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "read_load", lambda: Load(2.0, 9.0, 0.0))
    environ = dict(chosen)
    choose_wait_policy(Load(0.0, 0.0, 0.0), environ)
    assert environ == chosen


def test_a_busy_process_is_seen() -> None:
    before = read_load()
    if before is None:
        pytest.skip("this system does not tell processor times")
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            time.sleep(0.3)
            after = read_load()
            assert after is not None
            if busy_processors(before, after) >= threads.BUSY:
                return
        pytest.fail("a process that computes all the time was not seen")
    finally:
        busy.kill()
        busy.wait()


def test_the_choice_comes_before_torch() -> None:
    code = (
        "import sys, align.base.threads as t\n"
        "t.choose_wait_policy = lambda *_: sys.exit(9 if 'torch' in sys.modules else 7)\n"
        "from align.cli import main\n"
        "main(['sft', 'tiny/sft'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == 7
