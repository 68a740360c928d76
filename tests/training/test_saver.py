"""Signals between and inside steps; several processes that resume together, each played alone."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from align.training import saver as module
from align.training.checkpoint import checkpoints, save_checkpoint
from align.training.saver import Saver
from align.types import AlignError, Interrupted


@pytest.mark.parametrize("is_main", [True, False])
def test_a_refusal_of_one_process_ends_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_main: bool
) -> None:
    model = torch.nn.Linear(2, 1)
    trained = {"model": (model, torch.optim.AdamW(model.parameters()))}
    save_checkpoint(tmp_path / "checkpoints", 1, trained, {"run": "a"}, keep=1)
    told: list[bool] = []

    def require_rows(*_: Any) -> None:
        if is_main:
            raise AlignError("resume: metrics.jsonl: has changed")

    def sum_over_processes(values: dict[str, float], _: Any) -> dict[str, float]:
        told.append(bool(values["here"]))
        refusals_elsewhere = len(told) == 2 and not is_main  # first all ask for damage
        return {"here": values["here"] + refusals_elsewhere}

    def wait_for_everyone() -> None:
        raise AssertionError("waits for a process that has left")

    monkeypatch.setattr(module, "sum_over_processes", sum_over_processes)
    monkeypatch.setattr(module, "broadcast_object_list", lambda listed: None)
    run: Any = SimpleNamespace(
        is_main=is_main, folder=tmp_path, previous_id="a", stage="sft",
        require_rows=require_rows, require_unfinished=lambda: None, resume=lambda: None,
    )  # fmt: skip
    several: Any = SimpleNamespace(num_processes=2, wait_for_everyone=wait_for_everyone)
    saver = Saver(run, several, trained, keep=1, best_by=None)
    said = "metrics.jsonl: has changed" if is_main else "another process refuses"
    with pytest.raises(AlignError, match=said):
        saver.resume(wanted=True)
    assert told == [False, is_main]


def test_other_tensors_are_passed_over_for_an_older_whole_checkpoint(
    open_saver: Any, tmp_path: Path
) -> None:
    saver: Saver = open_saver()
    saver.save(1, {"n": 1})
    other = torch.nn.Linear(1, 1, bias=False)
    wrong = {"model": (other, torch.optim.AdamW(other.parameters()))}
    save_checkpoint(tmp_path / "checkpoints", 2, wrong, {"run": "a"}, keep=9)
    state = saver.resume(wanted=True)
    assert state is not None
    assert (state["step"], state["n"]) == (1, 1)
    held = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert held == ["damaged-step-2", "step-1"]


@pytest.fixture
def open_saver(tmp_path: Path) -> Any:
    """``open_saver(processes)`` with a model of one weight, in a folder of its own."""

    def make(processes: int = 1) -> Saver:
        model = torch.nn.Linear(1, 1)
        run: Any = SimpleNamespace(
            is_main=True, folder=tmp_path, id="a", stage="ppo", marks=dict, keep=lambda: None,
            previous_id="a", require_unfinished=lambda: None, require_rows=lambda *a: None,
            resume=lambda: None, rewind=lambda state: None,
        )  # fmt: skip
        accelerator: Any = SimpleNamespace(num_processes=processes, wait_for_everyone=lambda: None)
        trained = {"model": (model, torch.optim.AdamW(model.parameters()))}
        return Saver(run, accelerator, trained, keep=9, best_by=None)

    return make


def kill(number: signal.Signals = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def names(folder: Path) -> list[str]:
    return [place.name for place in checkpoints(folder / "checkpoints")]


def interrupted(saver: Saver, work: Callable[[Saver], None]) -> Interrupted:
    """How the work ends, which a signal has to end."""
    with pytest.raises(Interrupted) as caught, saver:
        work(saver)
    return caught.value


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_block_that_changes_nothing_is_left_at_once(
    open_saver: Any, tmp_path: Path, number: signal.Signals
) -> None:
    def work(saver: Saver) -> None:
        with saver.interruptible(4, {"kl_coef": 0.5}):
            try:
                kill(number)
            except Exception:
                pytest.fail("it is no error that a reward or an engine might handle")
            pytest.fail("the block went on")

    error = interrupted(open_saver(), work)
    assert error.number == number
    assert "saved in" in str(error)
    assert "(4 steps done)" in str(error)
    assert names(tmp_path) == ["step-4"]
    assert '"kl_coef": 0.5' in (tmp_path / "checkpoints/step-4/state.json").read_text()


def test_a_signal_just_before_the_block_is_not_lost(open_saver: Any, tmp_path: Path) -> None:
    def work(saver: Saver) -> None:
        kill()  # here it is only noted
        with saver.interruptible(2, {}):
            pytest.fail("the block began")

    interrupted(open_saver(), work)
    assert names(tmp_path) == ["step-2"]


def test_the_checkpoint_of_its_start_is_not_written_twice(open_saver: Any, tmp_path: Path) -> None:
    def work(saver: Saver) -> None:
        saver.save(2, {"n": 1})
        with saver.interruptible(2, {"n": 2}):
            kill()

    interrupted(open_saver(), work)
    assert '"n": 1' in (tmp_path / "checkpoints/step-2/state.json").read_text()


def test_outside_such_a_block_a_step_is_finished(open_saver: Any, tmp_path: Path) -> None:
    done = []

    def work(saver: Saver) -> None:
        with saver.interruptible(2, {}):
            done.append("sampled")
        kill()
        done.append("updated")
        saver.checkpoint_if_signalled(3, {})

    interrupted(open_saver(), work)
    assert done == ["sampled", "updated"]
    assert names(tmp_path) == ["step-3"]


@pytest.mark.parametrize("signalled", [True, False])
def test_several_processes_finish_the_block(
    open_saver: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signalled: bool
) -> None:
    """One that left alone would be waited for in the next exchange; all learn of the signal."""
    monkeypatch.setattr(module, "sum_over_processes", lambda values, _: {"here": 1.0})
    done = []

    def work(saver: Saver) -> None:
        with saver.interruptible(1, {}):
            if signalled:
                kill()
            done.append("sampled")

    assert interrupted(open_saver(2), work).number == signal.SIGTERM
    assert done == ["sampled"]
    assert names(tmp_path) == ["step-1"]


def test_a_second_signal_leaves_without_saving(
    open_saver: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes while the first one's checkpoint is written, which may take long."""

    def work(saver: Saver) -> None:
        with saver.interruptible(1, {}):
            kill()

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(module, "save_checkpoint", lambda *a, **k: kill())
    assert "interrupted twice" in str(interrupted(open_saver(), work))
    assert names(tmp_path) == []
    assert signal.getsignal(signal.SIGTERM) is before
