"""Runs that are killed for real (`kill -9`, SIGTERM, Ctrl-C) and resumed, against the whole run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tools.trust import Trust

ROOT = Path(__file__).parents[2]
Row = dict[str, Any]

# it draws from Python's and NumPy's generators, which a resumed run must go on with
REWARD = """
import os
import random
import signal
import time
from pathlib import Path

import numpy as np

def noisy(prompts, responses, references):
    return [r.count("o") + random.random() + np.random.rand() for r in responses]

def stuck(prompts, responses, references):
    if len(responses) == 16 and not Path("asked").exists():
        Path("asked").touch()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        Path("answered").touch()
    return noisy(prompts, responses, references)
"""

PPO = "align.stages.ppo.rollouts:RolloutWorker."
CHECKPOINT = "align.training.checkpoint:"
# phase -> (function, its call, before or after); three iterations, two epochs of two minibatches
KILLS = {
    "after sampling": (PPO + "decode", 5, "before"),
    "after scoring": (PPO + "values", 3, "before"),
    "between minibatches": ("align.stages.ppo.update:Update._step", 10, "before"),
    "after the last minibatch": ("align.stages.ppo.run:sample_rows", 3, "before"),
    "between its samples and its numbers": ("align.run.folder:Run.log", 5, "before"),
    "in the middle of a save": (CHECKPOINT + "_save_tensors", 8, "before"),
    "before a save is renamed": (CHECKPOINT + "replace_folder", 3, "before"),
    "after its last evaluation": ("align.training.saver:Saver.take_best", 1, "before"),
    "after a save": (CHECKPOINT + "replace_folder", 3, "after"),
}
SIGNALS = {
    "after sampling": (PPO + "sample", 2, "after", signal.SIGTERM),
    "after scoring": (PPO + "score", 3, "after", signal.SIGTERM),
    "between minibatches": (
        "align.stages.ppo.update:Update._step", 10, "before", signal.SIGINT
    ),
    "between iterations": ("align.stages.ppo.run:adapt_kl_coef", 2, "before", signal.SIGINT),
}  # fmt: skip


@dataclass
class Commands:
    """Commands to run in one go, and then their exit codes."""

    folder: Path
    commands: list[Row] = field(default_factory=list)

    def add(self, name: str, argv: Sequence[str], hit: Sequence[Any] = ()) -> Path:
        run = self.folder / name.replace(" ", "_")
        command: Row = {
            "argv": [*argv, f"output_dir={run}"],
            "log": f"{run}-{len(self.commands)}.log",
        }
        command |= dict(zip(("at", "call", "when", "signal"), hit, strict=False))
        self.commands.append(command)
        return run

    def go(self, expected: list[int]) -> None:
        """Run them all; each must end with its exit code."""
        done = subprocess.run(
            [sys.executable, str(ROOT / "tests" / "killing.py")],
            input=json.dumps(self.commands),
            capture_output=True,
            text=True,
            cwd=self.folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 0, done.stderr
        codes = json.loads(done.stdout)
        wrong = [self.told(i) for i, code in enumerate(codes) if code != expected[i]]
        assert codes == expected, wrong[0]

    def told(self, number: int) -> str:
        return Path(self.commands[number]["log"]).read_text(encoding="utf-8")


def timeless(path: Path, read_jsonl: Callable[[Path], list[Row]]) -> list[Row]:
    return [{k: v for k, v in r.items() if "second" not in k} for r in read_jsonl(path)]


def write_recipe(folder: Path, tree: Mapping[str, Any]) -> str:
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(tree), encoding="utf-8")  # JSON is YAML
    return str(path)


@pytest.fixture
def ppo_recipe(tiny_sft: Path, tmp_path: Path, write_rows: Any, demonstrations: list[Row]) -> str:
    rows = [{"prompt": r["prompt"], "references": [r["completion"]]} for r in demonstrations]
    (tmp_path / "noisy_reward.py").write_text(REWARD, encoding="utf-8")
    return write_recipe(
        tmp_path,
        {
            "model": str(tiny_sft),
            "data": {"train": str(write_rows("prompts.jsonl", rows)), "test_fraction": 0.1},
            "precision": "fp32",
            "reward": {"function": "noisy_reward:noisy"},
            "generation": {"max_new_tokens": 8, "temperature": 0.7, "samples_per_prompt": 2},
            "ppo": {"iterations": 3, "rollout_batch": 16, "epochs": 2, "num_minibatches": 2},
            "kl": {"coef": 0.05, "adaptive": True, "target": 0.01, "horizon": 64},
            "optim": {"lr": 0.003},
            "train": {"eval_every": 2},
        },
    )


@pytest.fixture
def same_run(assert_same_weights: Any, read_jsonl: Any) -> Callable[[Path, Path], None]:
    def check(whole: Path, resumed: Path) -> None:
        for part in ("model", "critic"):
            if (whole / part).is_dir():
                assert_same_weights(whole / part, resumed / part)
        for file in ("metrics.jsonl", "samples.jsonl"):
            if (whole / file).is_file():
                assert timeless(whole / file, read_jsonl) == timeless(resumed / file, read_jsonl)

    return check


def test_ppo_killed_at_every_phase_is_the_whole_run(
    ppo_recipe: str, tmp_path: Path, same_run: Any, trust: Trust
) -> None:
    commands = Commands(tmp_path)
    saving = ["ppo", ppo_recipe, "train.save_every=1"]
    whole = commands.add("whole", saving)
    runs = {}
    for phase, hit in KILLS.items():
        commands.add(phase, saving, (*hit, signal.SIGKILL))
        runs[phase] = commands.add(phase, [*saving, "resume=auto"])
    commands.go([0] + [-signal.SIGKILL, 0] * len(KILLS))
    for number, (phase, run) in enumerate(runs.items()):
        assert "resumed from" in commands.told(2 + 2 * number), phase
        same_run(whole, run)
        trust.row(
            "resume",
            f"ppo, kill -9 {phase}",
            found="weights, metrics and samples equal bit for bit",
            wanted="equal",
        )


def test_ppo_told_to_stop_saves_at_once_and_goes_on_there(
    ppo_recipe: str, tmp_path: Path, same_run: Any, trust: Trust
) -> None:
    """Nothing is saved but for the signal: an iteration that is done again has to be the same."""
    commands = Commands(tmp_path)
    whole = commands.add("whole", ["ppo", ppo_recipe])
    runs = {}
    for phase, hit in SIGNALS.items():
        commands.add(phase, ["ppo", ppo_recipe], hit)
        runs[phase] = commands.add(phase, ["ppo", ppo_recipe, "resume=auto"])
    expected = [128 + hit[3] for hit in SIGNALS.values()]
    commands.go([0] + [c for code in expected for c in (code, 0)])
    for number, (phase, run) in enumerate(runs.items()):
        last = commands.told(1 + 2 * number).strip().splitlines()[-1]
        assert last.startswith("align: interrupted and saved in"), last
        assert last.endswith("the same command with resume=auto goes on from there")
        same_run(whole, run)
        name = signal.Signals(SIGNALS[phase][3]).name
        trust.row(
            "resume",
            f"ppo, {name} {phase}",
            found=f"exit code {expected[number]}, one line; equal bit for bit",
            wanted="saved and equal",
        )


def test_ppo_does_not_wait_for_a_reward_to_stop(
    ppo_recipe: str, tmp_path: Path, same_run: Any
) -> None:
    commands = Commands(tmp_path)
    argv = ["ppo", ppo_recipe, "reward={function: noisy_reward:stuck}", "ppo.iterations=1"]
    run = commands.add("stopped", argv)
    commands.add("stopped", [*argv, "resume=auto"])
    whole = commands.add("whole", argv)
    commands.go([143, 0, 0])
    assert "interrupted and saved in" in commands.told(0)
    assert not (tmp_path / "answered").exists()
    same_run(whole, run)


def test_the_other_stages_killed_in_a_save_are_the_whole_run(
    tiny: Path, tmp_path: Path, write_rows: Any, same_run: Any, trust: Trust,
    demonstrations: list[Row], preferences: list[Row],
) -> None:  # fmt: skip
    commands = Commands(tmp_path)
    files = {
        "sft": write_rows("sft.jsonl", demonstrations),
        "rm": write_rows("pairs.jsonl", preferences),
        "dpo": tmp_path / "pairs.jsonl",
    }
    recipe = write_recipe(
        tmp_path,
        {
            "model": str(tiny),
            "precision": "fp32",
            "data": {"test_fraction": 0.2},
            "train": {"max_steps": 6, "minibatch": 8, "save_every": 2, "eval_every": 3},
            "optim": {"lr": 0.01},
        },
    )
    wholes, runs = {}, {}
    for stage, file in files.items():
        argv = [stage, recipe, f"data.train={file}"]
        wholes[stage] = commands.add(f"{stage} whole", argv)
        commands.add(stage, argv, (CHECKPOINT + "_save_tensors", 4, "before", signal.SIGKILL))
        runs[stage] = commands.add(stage, [*argv, "resume=auto"])
    commands.go([0, -signal.SIGKILL, 0] * 3)
    for number, stage in enumerate(files):
        assert "step-2 " in commands.told(2 + 3 * number)
        same_run(wholes[stage], runs[stage])
        trust.row(
            "resume",
            f"{stage}, kill -9 in the middle of a save",
            found="weights and metrics equal bit for bit",
            wanted="equal",
        )


def test_nothing_to_save_before_the_first_step(ppo_recipe: str, tmp_path: Path) -> None:
    commands = Commands(tmp_path)
    hit = ("align.stages.ppo.run:PPO.evaluate", 1, "after", signal.SIGTERM)
    run = commands.add("run", ["ppo", ppo_recipe], hit)
    commands.go([143])
    assert "interrupted before the first step; nothing was to save" in commands.told(0)
    assert not (run / "checkpoints").exists()
