"""Two processes over gloo give what one gives, with rows of unequal length."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.trust import Trust

ROOT = Path(__file__).parents[2]
WriteRows = Callable[[str, Sequence[Mapping[str, Any]]], Path]

pytestmark = pytest.mark.slow

TRAIN = ("train.max_steps=3", "train.minibatch=10", "optim.lr=1e-3", "optim.warmup_fraction=0")
PPO = (
    *("ppo.iterations=2", "ppo.rollout_batch=16", "ppo.num_minibatches=2", "ppo.epochs=2"),
    *("generation.samples_per_prompt=2", "generation.max_new_tokens=8", "optim.lr=1e-3"),
    *("reward={function: tests.oracles.language:reward}", "ppo.missing_eos_score=null"),
)


def launch(processes: int, *arguments: str) -> None:
    """As README says it, by torchrun for two of them."""
    together = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, *(together if processes == 2 else []), "-m", "align", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[:2000]


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo", "ppo"])
def test_two_processes_are_one(
    stage: str,
    tiny_sft: Path,
    demonstrations: list[dict[str, str]],
    preferences: list[dict[str, Any]],
    write_rows: WriteRows,
    tmp_path: Path,
    read_jsonl: Callable[[Path], list[dict[str, Any]]],
    trust: Trust,
) -> None:
    rows = {"sft": demonstrations, "ppo": [{"prompt": r["prompt"]} for r in demonstrations]}
    data = write_rows("rows.jsonl", rows.get(stage, preferences))
    recipe = tmp_path / f"{stage}.yaml"
    recipe.write_text(
        json.dumps(
            {
                "model": str(tiny_sft),
                "data": {"train": str(data), "test_fraction": 0.2},
                "precision": "fp32",
            }
        ),
        "utf-8",
    )
    runs = [tmp_path / "one", tmp_path / "two"]
    for processes, folder in enumerate(runs, start=1):
        options = PPO if stage == "ppo" else TRAIN
        launch(processes, stage, str(recipe), f"output_dir={folder}", "seed=1", *options)
    # a launcher that starts one process only would make this test pass for nothing
    manifests = [json.loads((folder / "manifest.json").read_text("utf-8")) for folder in runs]
    assert [manifest["processes"] for manifest in manifests] == [1, 2]
    one, two = (load_file(folder / "model" / "model.safetensors") for folder in runs)
    start = load_file(tiny_sft / "model.safetensors")
    shared = [name for name in one if name in start]
    moved = max((one[name] - start[name]).abs().max().item() for name in shared)
    apart = max((one[name] - two[name]).abs().max().item() for name in one)
    assert moved > 1e-3
    what = f"{stage}: 2 processes against 1, largest difference of a weight, share of its way"
    trust.at_most("equivalences", what, apart / moved, 1e-2)
    first, second = (read_jsonl(folder / "metrics.jsonl") for folder in runs)
    assert [row["step"] for row in first] == [row["step"] for row in second]
    name = "policy_loss" if stage == "ppo" else "loss"
    for a, b in zip(first, second, strict=True):
        assert a.get(name, 0.0) == pytest.approx(b.get(name, 0.0), rel=1e-4, abs=1e-5)
        assert a.get("tokens") == b.get("tokens")
