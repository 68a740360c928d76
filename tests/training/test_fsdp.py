"""FSDP2 over gloo: a model sharded over two processes ends where one process ends.

Minibatches of five rows, each a microbatch of its own, are three for one process and two for the
other; three held-out rows are two and one. So every run needs what keeps the processes in step.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from align.cli import main
from tests.trust import Trust

ROOT = Path(__file__).parents[2]
Rows = Sequence[Mapping[str, Any]]

pytestmark = pytest.mark.slow

TRAIN = (
    *("train.max_steps=3", "train.minibatch=5", "train.tokens_per_microbatch=1"),
    *("train.save_every=1", "train.eval_every=1", "train.log_every=1"),
    *("optim.lr=1e-3", "optim.warmup_fraction=0", "optim.max_grad_norm=0.5"),
)
LORA = ("lora.r=4", "optim.lr=1e-2")
MEMORY, SPEED = ({"FSDP_RESHARD_AFTER_FORWARD": value} for value in ("true", "false"))
# name -> stage, its overrides, what FSDP saves
RUNS: dict[str, tuple[str, tuple[str, ...], dict[str, str]]] = {
    "sft": ("sft", ("train.keep_best=loss", "gradient_checkpointing=true"), MEMORY),
    "rm": ("rm", (), SPEED),
    "dpo, online reference": ("dpo", ("dpo.reference=online",), MEMORY),
    "dpo, cached reference": ("dpo", ("gradient_checkpointing=true",), SPEED),
    "sft, LoRA": ("sft", LORA, MEMORY),
    "rm, LoRA": ("rm", LORA, MEMORY),
    "dpo, LoRA, adapter off": ("dpo", (*LORA, "dpo.reference=adapter_off"), SPEED),
}


def launch(runs: Rows, folder: Path) -> None:
    """Two processes, from the shipped configuration but for the device and their number."""
    path = ROOT / "recipes" / "accelerate" / "8gpu-fsdp.yaml"
    settings = yaml.safe_load(path.read_text("utf-8")) | {"use_cpu": True, "num_processes": 2}
    (folder / "accelerate.yaml").write_text(yaml.safe_dump(settings), "utf-8")
    (folder / "runs.json").write_text(json.dumps(runs), "utf-8")
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = (sys.executable, "-m", "accelerate.commands.launch")
    done = subprocess.run(
        [
            *(*command, "--config_file", folder / "accelerate.yaml", "--main_process_port", "0"),
            *(ROOT / "tests" / "training" / "launched.py", folder / "runs.json"),
        ],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]


class Both:
    """The folders of every run, by one process and by two."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, name: str, processes: int) -> Path:
        return self.folder / name / str(processes)


@pytest.fixture(scope="module")
def both(
    tiny_sft: Path,
    demonstrations: list[dict[str, str]],
    preferences: list[dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Both:
    folder = tmp_path_factory.mktemp("fsdp")
    both = Both(folder)

    def arguments(name: str, out: Path, *more: str) -> list[str]:
        stage, options, _ = RUNS[name]
        return [stage, str(folder / f"{stage}.yaml"), f"output_dir={out}", *TRAIN, *options, *more]

    for stage in ("sft", "rm", "dpo"):
        rows = demonstrations if stage == "sft" else preferences
        data, held_out = folder / f"{stage}.jsonl", folder / f"{stage}-held-out.jsonl"
        for path, part in ((data, rows[3:]), (held_out, rows[:3])):
            path.write_text("".join(json.dumps(row) + "\n" for row in part), "utf-8")
        tree = {
            "model": str(tiny_sft),
            "data": {"train": str(data), "test": str(held_out), "test_fraction": 0},
            "precision": "fp32",
            "seed": 1,
        }
        (folder / f"{stage}.yaml").write_text(json.dumps(tree), "utf-8")
    for name in RUNS:
        assert main(arguments(name, both(name, 1))) == 0
    stopped = folder / "stopped"
    runs: list[dict[str, Any]] = [
        {"arguments": arguments(name, both(name, 2)), "env": RUNS[name][2]} for name in RUNS
    ]
    runs.append({"arguments": arguments("sft", stopped), "env": MEMORY, "stop": 1})
    launch(runs, folder)
    return both


@pytest.mark.parametrize("name", RUNS)
def test_sharded_over_two_processes_is_one(
    name: str,
    both: Both,
    tiny_sft: Path,
    read_jsonl: Callable[[Path], list[dict[str, Any]]],
    trust: Trust,
) -> None:
    folders = [both(name, processes) for processes in (1, 2)]
    manifests = [json.loads((folder / "manifest.json").read_text("utf-8")) for folder in folders]
    # a launcher that shards nothing would make this test pass for nothing
    assert [(m["processes"], m["sharded"]) for m in manifests] == [(1, False), (2, True)]
    one, two = (load_file(folder / "model" / "model.safetensors") for folder in folders)
    start = load_file(tiny_sft / "model.safetensors")
    assert one.keys() == two.keys()
    shared = [n for n in one if n in start]
    assert max((one[n] - start[n]).abs().max().item() for n in shared) > 1e-3
    way = sum((one[n] - start[n]).pow(2).sum() for n in shared) ** 0.5
    apart = sum((one[n] - two[n]).pow(2).sum() for n in shared) ** 0.5
    what = f"{name}: FSDP of 2 processes against 1, how far apart the weights end, share of the way"
    trust.at_most("equivalences", what, float(apart / way), 5e-4)
    first, second = (read_jsonl(folder / "metrics.jsonl") for folder in folders)
    assert len(first) == 3 + 4  # three steps; held out before the first and after each
    for a, b in zip(first, second, strict=True):
        names = a.keys() - {"seconds", "tokens_per_second"}
        assert names == b.keys() - {"seconds", "tokens_per_second"}
        for key in names:
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-4), key
