"""Several processes that resume together, each played alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from align.training import saver as module
from align.training.checkpoint import save_checkpoint
from align.training.saver import Saver
from align.types import AlignError


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
