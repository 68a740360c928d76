"""A small PPO run that several files of tests vary."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from align.config.keys import PPORecipe, RewardRecipe
from align.stages import reward_model
from align.stages.ppo import run as ppo
from align.types import Experience

Row = dict[str, Any]
MakeRecipe = Callable[..., Any]
RunPPO = Callable[..., Path]

REWARDS = """
def count_o(prompts, responses, references):
    return [float(r.count("o")) for r in responses]

def length(prompts, responses, references):
    return [len(r) / 10 for r in responses]

def beyond_float32(prompts, responses, references):
    return [1e39 for r in responses]
"""


@pytest.fixture
def rewards_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "tiny_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    yield
    sys.modules.pop("tiny_rewards", None)


@pytest.fixture
def prompts_file(write_rows: Callable[..., Path], demonstrations: list[Row]) -> Path:
    rows = [{"prompt": r["prompt"], "references": [r["completion"]]} for r in demonstrations]
    return write_rows("prompts.jsonl", rows)


@pytest.fixture
def run_ppo(
    tiny_sft: Path,
    tmp_path: Path,
    make_recipe: MakeRecipe,
    prompts_file: Path,
    rewards_module: None,
) -> RunPPO:
    """Three iterations of eight prompts with two samples each, two steps on each."""
    tree = {
        "model": str(tiny_sft),  # its responses differ in length
        "data": {"train": str(prompts_file), "test_fraction": 0.1},
        "precision": "fp32",
        "reward": {"function": "tiny_rewards:count_o"},
        "generation": {"max_new_tokens": 8, "temperature": 0.7, "samples_per_prompt": 2},
        "ppo": {"iterations": 3, "rollout_batch": 16, "epochs": 2},
        "kl": {"coef": 0.05},
        "optim": {"lr": 0.003, "schedule": "constant", "warmup_fraction": 0.0},
    }

    def run(name: str, *overrides: str) -> Path:
        folder = tmp_path / name
        ppo.run(make_recipe(PPORecipe, tree, f"output_dir={folder}", *overrides))
        return folder

    return run


@pytest.fixture
def reward_folder(
    tiny: Path,
    tmp_path: Path,
    make_recipe: MakeRecipe,
    write_rows: Callable[..., Path],
    preferences: list[Row],
) -> Path:
    """A reward model, trained by the stage that ships."""
    tree = {
        "model": str(tiny),
        "output_dir": str(tmp_path / "rm"),
        "precision": "fp32",
        "data": {"train": str(write_rows("pairs.jsonl", preferences)), "test_fraction": 0},
        "train": {"max_steps": 10, "minibatch": 16},
        "optim": {"lr": 0.01},
    }
    reward_model.run(make_recipe(RewardRecipe, tree))
    return tmp_path / "rm" / "model"


@pytest.fixture
def experiences(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Row, Experience]]:
    """Each iteration's experience, after the options that its rewards were shaped by."""
    found: list[tuple[Row, Experience]] = []
    shaping: Row = {}
    shaped_rewards = ppo.shaped_rewards

    def shape(*tensors: Any, **options: Any) -> Any:
        shaping.update(options)
        return shaped_rewards(*tensors, **options)

    def experience(*tensors: Any) -> Experience:
        found.append((dict(shaping), Experience(*tensors)))
        return found[-1][1]

    monkeypatch.setattr(ppo, "shaped_rewards", shape)
    monkeypatch.setattr(ppo, "Experience", experience)
    return found
