"""FSDP2 over gloo: a model sharded over two processes ends where one process ends.

Minibatches of five rows, each a microbatch of its own, are three for one process and two for the
other; three held-out rows are two and one. So every run needs what keeps the processes in step.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from align.cli import main
from align.training.distributed import check_sharding, make_accelerator
from align.types import AlignError
from tools.trust import Trust

ROOT = Path(__file__).parents[2]
Rows = Sequence[Mapping[str, Any]]

pytestmark = pytest.mark.slow

TRAIN = (
    *("train.max_steps=3", "train.minibatch=5", "train.tokens_per_microbatch=1"),
    *("train.eval_every=1", "train.log_every=1"),
    *("optim.lr=1e-3", "optim.warmup_fraction=0", "optim.max_grad_norm=0.5"),
)
LORA = ("lora.r=4", "optim.lr=1e-2")
MEMORY, SPEED = ({"FSDP_RESHARD_AFTER_FORWARD": value} for value in ("true", "false"))
# name -> stage, its overrides, what FSDP saves
RUNS: dict[str, tuple[str, tuple[str, ...], dict[str, str]]] = {
    "sft": ("sft", ("train.save_every=1", "gradient_checkpointing=true"), MEMORY),
    "rm": ("rm", ("gradient_checkpointing=true",), SPEED),
    "dpo, online reference": ("dpo", ("dpo.reference=online",), MEMORY),
    "sft, LoRA": ("sft", (*LORA, "train.save_every=1", "train.keep_best=loss"), MEMORY),
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
    with subprocess.Popen(
        [
            *(*command, "--config_file", folder / "accelerate.yaml", "--main_process_port", "0"),
            *(ROOT / "tests" / "training" / "launched.py", folder / "runs.json"),
        ],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as launcher:
        try:
            said, _ = launcher.communicate(timeout=600)
        except subprocess.TimeoutExpired:
            launcher.terminate()  # it ends the processes that wait for each other
            raise
    assert launcher.returncode == 0, said[-4000:]


@dataclass(frozen=True)
class Done:
    """Where every run lies, by one process and by two, and two that were cut short."""

    folder: Path

    def by(self, processes: int, name: str) -> Path:
        return self.folder / name / str(processes)

    def arguments(self, name: str, output_dir: Path) -> list[str]:
        stage, options, _ = RUNS[name]
        recipe = self.folder / f"{stage}.yaml"
        return [stage, str(recipe), f"output_dir={output_dir}", *TRAIN, *options]

    @property
    def resumed(self) -> Path:
        """Of ``sft``, stopped in its second step and gone on with by two processes."""
        return self.folder / "resumed"

    @property
    def stopped(self) -> Path:
        """The same before it went on."""
        return self.folder / "stopped"


@pytest.fixture(scope="module")
def done(
    tiny_sft: Path,
    demonstrations: list[dict[str, str]],
    preferences: list[dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Done:
    folder = tmp_path_factory.mktemp("fsdp")
    done = Done(folder)
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
        assert main(done.arguments(name, done.by(1, name))) == 0
    cut_short = done.arguments("sft", done.resumed)
    launch(
        [
            *({"arguments": done.arguments(n, done.by(2, n)), "env": RUNS[n][2]} for n in RUNS),
            {
                "arguments": cut_short,
                "env": MEMORY,
                "stop": 1,
                "copy": [str(done.resumed), str(done.stopped)],
            },
            {"arguments": [*cut_short, "resume=auto"], "env": MEMORY},
        ],
        folder,
    )
    return done


def apart(one: Path, two: Path, *, start: Path) -> float:
    """Distance of two runs' weights as a share of the way that the first has come."""
    a, b = (load_file(folder / "model" / "model.safetensors") for folder in (one, two))
    before = load_file(start / "model.safetensors")
    assert a.keys() == b.keys()
    shared = [name for name in a if name in before]
    assert max((a[n] - before[n]).abs().max().item() for n in shared) > 1e-3
    way = sum((a[n] - before[n]).pow(2).sum() for n in shared) ** 0.5
    return float(sum((a[n] - b[n]).pow(2).sum() for n in a) ** 0.5 / way)


@pytest.mark.parametrize("name", RUNS)
def test_sharded_over_two_processes_is_one(
    name: str,
    done: Done,
    tiny_sft: Path,
    read_jsonl: Callable[[Path], list[dict[str, Any]]],
    trust: Trust,
) -> None:
    folders = [done.by(processes, name) for processes in (1, 2)]
    manifests = [json.loads((folder / "manifest.json").read_text("utf-8")) for folder in folders]
    # a launcher that shards nothing would make this test pass for nothing
    assert [(m["processes"], m["sharded"]) for m in manifests] == [(1, False), (2, True)]
    bests = [manifest.get("best", {}).get("step") for manifest in manifests]
    assert bests == ([1, 1] if "train.keep_best=loss" in RUNS[name][1] else [None, None])
    what = f"{name}: FSDP of 2 processes against 1, how far apart the weights end, share of the way"
    trust.at_most("equivalences", what, apart(*folders, start=tiny_sft), 5e-4)
    first, second = (read_jsonl(folder / "metrics.jsonl") for folder in folders)
    assert len(first) == 3 + 4  # three steps; held out before the first and after each
    for a, b in zip(first, second, strict=True):
        names = a.keys() - {"seconds", "tokens_per_second"}
        assert names == b.keys() - {"seconds", "tokens_per_second"}
        for key in names:
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-4), key


def test_resumed_is_the_uninterrupted_run(
    done: Done, assert_same_weights: Callable[[Path, Path], None], trust: Trust
) -> None:
    """One of the two processes was told to stop; both saved, and both went on."""
    manifest = json.loads((done.stopped / "manifest.json").read_text("utf-8"))
    assert manifest["status"] != "done"
    assert not (done.stopped / "model").exists()
    assert_same_weights(done.by(2, "sft") / "model", done.resumed / "model")
    what = "sft, sharded over 2 processes (FSDP), SIGTERM to one of them"
    trust.row("resume", what, found="weights equal", wanted="equal weights")


def test_one_process_goes_on_with_what_two_have_saved(
    done: Done, tiny_sft: Path, trust: Trust
) -> None:
    saved = sorted(path.name for path in (done.stopped / "checkpoints").iterdir())
    assert saved == ["step-1", "step-2"]
    assert main([*done.arguments("sft", done.stopped), "resume=auto"]) == 0
    what = "sft: saved by 2 processes (FSDP), gone on with by 1, against 1, share of the way"
    measured = apart(done.by(1, "sft"), done.stopped, start=tiny_sft)
    trust.at_most("equivalences", what, measured, 5e-4)


def test_the_adapter_is_kept_whole(done: Done) -> None:
    """Beside the merged model, as by one process."""
    one, two = (
        load_file(done.by(n, "rm, LoRA") / "model_adapter" / "adapter_model.safetensors")
        for n in (1, 2)
    )
    assert {name: t.shape for name, t in one.items()} == {name: t.shape for name, t in two.items()}
    for name, tensor in one.items():
        assert (tensor - two[name]).norm() <= 1e-3 * tensor.norm(), name


@pytest.mark.parametrize("stage", ["ppo", "generate"])
def test_what_samples_is_refused(
    stage: str,
    tiny: Path,
    demonstrations: list[dict[str, str]],
    write_rows: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = write_rows("rows.jsonl", demonstrations)
    recipe = {"model": str(tiny), "data": {"train": str(data)}, "reward": {"metric": "chrf"}}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe), "utf-8")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    code = main([stage, str(path), f"output_dir={tmp_path / 'out'}"])
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert lines[-1].startswith(f"align: {stage}: FSDP trains sft, rm and dpo only")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [("FSDP_VERSION", "1"), ("FSDP_OFFLOAD_PARAMS", "true"), ("FSDP_VERSION", None)],
)
def test_settings_without_effect_are_refused(
    name: str, value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    check_sharding("sft")
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    with pytest.raises(AlignError, match=f"accelerate: {name.lower()}: is .*; set it to"):
        check_sharding("sft")


def test_offloaded_activations_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(AlignError, match="FSDP: activation_offload is not supported with it"):
        check_sharding("sft", activation_offload=True)


def test_processes_that_do_not_know_each_other_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Started by torchrun on a machine without a GPU, without a word of the CPU."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(AlignError, match=r"2 processes were started .*, but this one knows of 1"):
        make_accelerator([], str(tmp_path))
