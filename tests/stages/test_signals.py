"""Signals that come where a run is in the middle of something, in this process."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file

from align.config.keys import DPORecipe, RewardRecipe, SFTRecipe
from align.rollout import sampler
from align.stages import dpo, reward_model, sft
from align.stages.ppo.rollouts import RolloutWorker
from align.stages.ppo.update import Update
from align.training import loop
from align.types import Interrupted

Row = dict[str, Any]
ReadJsonl = Callable[[Path], list[Row]]
RunPPO = Callable[..., Path]
RunStage = Callable[..., Path]


def kill_at(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, *, after: bool = False
) -> list[int]:
    """Send SIGTERM to this process before or after the call-th call (from 1) of a function.

    Returns a list that grows by the number of every call that ends.
    """
    original, calls, ended = getattr(owner, name), 0, list[int]()

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        now = calls == call
        if now and not after:
            os.kill(os.getpid(), signal.SIGTERM)
        found = original(*args, **options)
        if now and after:
            os.kill(os.getpid(), signal.SIGTERM)
        ended.append(calls)
        return found

    monkeypatch.setattr(owner, name, counted)
    return ended


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_while_an_adapter_is_switched_every_trained_tensor_is_saved(
    run_ppo: RunPPO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """Peft takes requires_grad from adapters that are off, and bf16 gives it to frozen weights."""
    options = ("lora.r=4", f"precision={precision}", "data.test_fraction=0", "ppo.iterations=1")
    whole = run_ppo("whole", *options, "train.save_every=1")
    sample = sampler._Sampler.run

    def sampling(*args: Any) -> None:
        sample(*args)
        kill_at(patch, torch.nn.Parameter, "requires_grad_", 5, after=True)

    with monkeypatch.context() as patch:
        if precision == "fp32":
            kill_at(patch, BaseTunerLayer, "enable_adapters", 20, after=True)
        else:
            patch.setattr(sampler._Sampler, "run", sampling)
        with pytest.raises(Interrupted) as caught:
            run_ppo("run", *options)
    assert caught.value.number == signal.SIGTERM
    names = {}
    for folder, step in ((whole, 1), (tmp_path / "run", 0)):
        names[step] = set(load_file(folder / f"checkpoints/step-{step}/actor.safetensors"))
    assert names[0] == names[1]
    run_ppo("run", *options, "resume=auto")


STAGES = {"sft": (sft, SFTRecipe), "rm": (reward_model, RewardRecipe), "dpo": (dpo, DPORecipe)}


@pytest.fixture
def run_stage(
    tiny: Path, tmp_path: Path, make_recipe: Callable[..., Any], write_rows: Callable[..., Path],
    demonstrations: list[Row], preferences: list[Row],
) -> RunStage:  # fmt: skip
    """``run_stage("sft", "name", "key=value", ...)``: four steps of 8 rows; gives the folder."""
    files = {"sft": write_rows("sft.jsonl", demonstrations)}
    files["rm"] = files["dpo"] = write_rows("pairs.jsonl", preferences)

    def run(stage: str, name: str, *overrides: str) -> Path:
        tree = {
            "model": str(tiny),
            "output_dir": str(tmp_path / name),
            "precision": "fp32",
            "data": {"train": str(files[stage]), "test_fraction": 0.2},
            "train": {"max_steps": 4, "minibatch": 8},
            "optim": {"lr": 0.01},
        }
        module, kind = STAGES[stage]
        module.run(make_recipe(kind, tree, *overrides))
        return tmp_path / name

    return run


def states(folder: Path) -> list[str]:
    return sorted(place.name for place in (folder / "checkpoints").glob("*"))


def timeless(folder: Path, read_jsonl: ReadJsonl) -> list[Row]:
    rows = read_jsonl(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


@pytest.mark.parametrize("stage", list(STAGES))
def test_in_the_last_step_it_saves_what_was_trained(
    run_stage: RunStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_jsonl: ReadJsonl,
    assert_same_weights: Any, stage: str,
) -> None:  # fmt: skip
    whole = run_stage(stage, "whole")
    with monkeypatch.context() as patch:
        kill_at(patch, loop.Trainer, "accumulate", 4)
        with pytest.raises(Interrupted, match=r"saved in .* \(4 steps done\)") as caught:
            run_stage(stage, "run")
    assert caught.value.number == signal.SIGTERM
    assert states(tmp_path / "run") == ["step-4"]
    resumed = run_stage(stage, "run", "resume=auto")
    assert_same_weights(whole / "model", resumed / "model")
    assert timeless(whole, read_jsonl) == timeless(resumed, read_jsonl)


@pytest.mark.parametrize(("call", "step"), [(1, None), (2, 2), (3, 4)])
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_an_evaluation_stops_at_once_and_is_done_when_the_run_resumes(
    run_stage: RunStage, run_ppo: RunPPO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    read_jsonl: ReadJsonl, assert_same_weights: Any, stage: str, call: int, step: int | None,
) -> None:  # fmt: skip
    """Before the first step, after two of four, and after the last."""

    def run(name: str, *more: str) -> Path:
        if stage == "sft":
            return run_stage("sft", name, "train.eval_every=2", *more)
        return run_ppo(name, "train.eval_every=2", "ppo.iterations=4", *more)

    whole = run("whole")
    with monkeypatch.context() as patch:
        if stage == "sft":
            ended = kill_at(patch, loop, "evaluate_groups", call)
        else:
            ended = kill_at(patch, RolloutWorker, "evaluate", call)
        said = "nothing was to save" if step is None else rf"\({step} steps done\)"
        with pytest.raises(Interrupted, match=said):
            run("run")
    assert len(ended) == call - 1
    assert states(tmp_path / "run") == ([] if step is None else [f"step-{step}"])
    resumed = run("run", "resume=auto")
    assert_same_weights(whole / "model", resumed / "model")
    assert timeless(whole, read_jsonl) == timeless(resumed, read_jsonl)


def test_in_the_last_update_of_ppo_it_saves_what_was_trained(
    run_ppo: RunPPO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        kill_at(patch, Update, "_step", 2)
        with pytest.raises(Interrupted, match=r"saved in .* \(1 steps done\)"):
            run_ppo("run", "ppo.iterations=1", "ppo.epochs=2", "ppo.num_minibatches=1")
    assert states(tmp_path / "run") == ["step-1"]


def test_the_best_is_not_measured_twice(
    run_stage: RunStage, monkeypatch: pytest.MonkeyPatch, read_jsonl: ReadJsonl
) -> None:
    """Its numbers are in the checkpoints, so no signal can come while it is measured again."""
    options = ("train.keep_best=loss", "train.save_every=1", "optim.lr=0.2")
    ended = kill_at(monkeypatch, loop, "evaluate_groups", 99)
    folder = run_stage("sft", "run", *options, "optim.schedule=constant")
    assert len(ended) == 5
    rows = {r["step"]: r for r in read_jsonl(folder / "metrics.jsonl") if "eval_loss" in r}
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    best = rows[manifest["best"]["step"]]
    assert manifest["best"]["step"] < 4
    assert {f"eval_{k}": v for k, v in manifest["held_out"].items()} == {
        k: v for k, v in best.items() if k.startswith("eval_")
    }
