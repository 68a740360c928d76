"""Two processes over gloo give what one gives, with rows of unequal length."""

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
from safetensors.torch import load_file, save_file

from align.cli import main
from align.models import load_tokenizer
from tools.trust import Trust

ROOT = Path(__file__).parents[2]
WriteRows = Callable[[str, Sequence[Mapping[str, Any]]], Path]

pytestmark = pytest.mark.slow

TRAIN = ("train.max_steps=3", "train.minibatch=10", "optim.lr=1e-3", "optim.warmup_fraction=0")
PPO = (
    *("ppo.iterations=2", "ppo.rollout_batch=16", "ppo.num_minibatches=2", "ppo.epochs=2"),
    *("generation.samples_per_prompt=2", "generation.max_new_tokens=8", "optim.lr=1e-3"),
    *("reward={function: tests.oracles.language:reward}", "ppo.missing_eos_score=null"),
)


def launch(processes: int, *arguments: str, timeout: float = 600) -> None:
    """One process here; two as README says it, by torchrun."""
    if processes == 1:
        assert main(list(arguments)) == 0
        return
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node", str(processes), "-m", "align", *arguments),
        ],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
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
    assert moved > 1e-3
    # Adam divides by a root of squares: a weight whose gradient is nearly 0 moves by its rounding
    way = sum((one[n] - start[n]).pow(2).sum() for n in shared) ** 0.5
    apart = sum((one[n] - two[n]).pow(2).sum() for n in shared) ** 0.5
    what = f"{stage}: 2 processes against 1, how far apart the weights end, share of their way"
    trust.at_most("equivalences", what, float(apart / way), 5e-4)
    first, second = (read_jsonl(folder / "metrics.jsonl") for folder in runs)
    assert [row["step"] for row in first] == [row["step"] for row in second]
    name = "policy_loss" if stage == "ppo" else "loss"
    for a, b in zip(first, second, strict=True):
        assert a.get(name, 0.0) == pytest.approx(b.get(name, 0.0), rel=1e-4, abs=1e-5)
        assert a.get("tokens") == b.get("tokens")


def test_two_processes_stream_the_same_rows(
    tiny_sft: Path,
    preferences: list[dict[str, Any]],
    write_rows: WriteRows,
    tmp_path: Path,
    read_jsonl: Callable[[Path], list[dict[str, Any]]],
) -> None:
    """Across windows, and from the second pass on."""
    data = {"train": str(write_rows("rows.jsonl", preferences)), "test_fraction": 0.2}
    data |= {"streaming": True, "streaming_window": 8}
    recipe = tmp_path / "rm.yaml"
    recipe.write_text(json.dumps({"model": str(tiny_sft), "data": data, "precision": "fp32"}))
    rows, manifests = [], []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        launch(processes, "rm", str(recipe), f"output_dir={folder}", "seed=1", *TRAIN)
        rows.append(read_jsonl(folder / "metrics.jsonl"))
        manifests.append(json.loads((folder / "manifest.json").read_text("utf-8")))
    assert [manifest["processes"] for manifest in manifests] == [1, 2]
    assert manifests[0]["stream"] == manifests[1]["stream"]
    assert manifests[0]["stream"]["whole_passes"] == 1
    for a, b in zip(*rows, strict=True):
        assert a.get("tokens") == b.get("tokens")
        assert a.get("loss", 0.0) == pytest.approx(b.get("loss", 0.0), rel=1e-4, abs=1e-5)
        assert a.get("eval_loss", 0.0) == pytest.approx(b.get("eval_loss", 0.0), rel=1e-4)


def test_nan_on_one_process_is_known_to_both(
    tiny_sft: Path,
    demonstrations: list[dict[str, str]],
    write_rows: WriteRows,
    tmp_path: Path,
    read_jsonl: Callable[[Path], list[dict[str, Any]]],
) -> None:
    """One token has a NaN embedding, so the logits of a few prompts are NaN."""
    prompts = list(dict.fromkeys(row["prompt"] for row in demonstrations))
    tokenizer = load_tokenizer(str(tiny_sft))
    ids = [set(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    token = min(
        (t for t in set().union(*ids) if t >= 8), key=lambda t: (sum(t in i for i in ids), t)
    )
    broken = Path(shutil.copytree(tiny_sft, tmp_path / "broken"))
    held = load_file(broken / "model.safetensors")
    assert "lm_head.weight" in held
    held["model.embed_tokens.weight"][token] = float("nan")
    save_file(held, broken / "model.safetensors", {"format": "pt"})
    data = write_rows("prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    recipe = {"model": str(broken), "data": {"train": str(data), "test_fraction": 0}}
    (tmp_path / "ppo.yaml").write_text(json.dumps(recipe), "utf-8")
    left_out, named = [], []
    for processes in (1, 2):
        folder = tmp_path / f"by-{processes}"
        options = (*PPO, "ppo.iterations=4", "precision=fp32", "on_nonfinite=skip")
        arguments = (str(tmp_path / "ppo.yaml"), f"output_dir={folder}", *options)
        launch(processes, "ppo", *arguments, timeout=240)
        found = read_jsonl(folder / "nonfinite.jsonl")
        left_out.append([(row["step"], row["what"]) for row in found])
        # others may follow: a response may draw the token too
        named.append({name.rpartition("/")[2] for row in found for name in row["ids"]})
    assert left_out[0] == left_out[1] != []
    bad = {f"prompts.jsonl:{i + 1}" for i, own in enumerate(ids) if token in own}
    assert all(bad <= names for names in named)


REWARD = """
import os

def reward(prompts, responses, references):
    with open(os.environ["ALIGN_TEST_SCORED"], "a") as file:
        file.writelines(f"{prompt!r}\\n" for prompt in prompts)
    pairs = zip(prompts, responses)
    return [float("nan") if prompt == BAD else float(len(response)) for prompt, response in pairs]
"""


def test_processes_share_the_scoring_and_know_of_each_others_nan(
    tiny_sft: Path,
    demonstrations: list[dict[str, str]],
    write_rows: WriteRows,
    tmp_path: Path,
    read_jsonl: Callable[[Path], list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The reward of one prompt is NaN: only the process that scored it sees that by itself."""
    prompts = list(dict.fromkeys(row["prompt"] for row in demonstrations))[:16]
    data = write_rows("prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    recipe = {"model": str(tiny_sft), "data": {"train": str(data), "test_fraction": 0}}
    (tmp_path / "ppo.yaml").write_text(json.dumps(recipe), "utf-8")
    (tmp_path / "counted.py").write_text(f"BAD = {prompts[3]!r}\n{REWARD}", "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    options = [o for o in PPO if not o.startswith("reward=")] + ["reward=counted:reward"]
    left_out, scored = [], []
    for processes in (1, 2):
        folder = tmp_path / f"by-{processes}"
        monkeypatch.setenv("ALIGN_TEST_SCORED", str(folder) + ".txt")
        arguments = (str(tmp_path / "ppo.yaml"), f"output_dir={folder}", "seed=1", *options)
        launch(processes, "ppo", *arguments, "on_nonfinite=skip", "precision=fp32", timeout=240)
        rows = read_jsonl(folder / "nonfinite.jsonl")
        left_out.append([(r["step"], r["ids"], r["responses"]) for r in rows])
        scored.append(sorted(Path(f"{folder}.txt").read_text("utf-8").splitlines()))
    assert left_out[0] == left_out[1] != []
    assert scored[0] == scored[1] != []  # each response once
