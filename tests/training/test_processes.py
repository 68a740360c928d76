"""Two processes over gloo give what one gives, with rows of unequal length."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from align.cli import main
from align.models import load_tokenizer
from tools.trust import Trust

ROOT = Path(__file__).parents[2]
Rows = Sequence[Mapping[str, Any]]

pytestmark = pytest.mark.slow

TRAIN = ("train.max_steps=3", "train.minibatch=10", "optim.lr=1e-3", "optim.warmup_fraction=0")
PPO = (
    *("ppo.iterations=2", "ppo.rollout_batch=16", "ppo.num_minibatches=2", "ppo.epochs=2"),
    *("generation.samples_per_prompt=2", "generation.max_new_tokens=8", "optim.lr=1e-3"),
    "ppo.missing_eos_score=null",
)
REWARD = "reward={function: tests.oracles.language:reward}"
# name -> its overrides; the stage is the first word
RUNS: dict[str, tuple[str, ...]] = {
    "sft": TRAIN,
    "rm": TRAIN,
    "dpo": TRAIN,
    "ppo": (*PPO, REWARD),
    "rm, streamed": TRAIN,
    "ppo, broken model": (*PPO, REWARD, "ppo.iterations=4", "train.on_nonfinite=skip"),
    "ppo, NaN score": (*PPO, "reward=counted:reward", "train.on_nonfinite=skip"),
}
COUNTED = """
import os

def reward(prompts, responses, references):
    with open(os.environ["ALIGN_TEST_SCORED"], "a") as file:
        file.writelines(f"{prompt!r}\\n" for prompt in prompts)
    pairs = zip(prompts, responses)
    return [float("nan") if prompt == BAD else float(len(response)) for prompt, response in pairs]
"""


def launch(runs: Rows, folder: Path) -> None:
    """Two processes, by torchrun as README says it; one start for all runs."""
    (folder / "runs.json").write_text(json.dumps(runs), "utf-8")
    paths = os.pathsep.join(filter(None, (str(ROOT), str(folder), os.environ.get("PYTHONPATH"))))
    environment = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    launched = ROOT / "tests" / "training" / "launched.py"
    done = subprocess.run(
        [*command, "--nproc_per_node", "2", launched, folder / "runs.json"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[:2000]


@dataclass(frozen=True)
class Done:
    """Folder of every run, by one process and by two."""

    folder: Path
    broken_token: int

    def by(self, processes: int, name: str) -> Path:
        return self.folder / name / str(processes)

    def scored(self, processes: int) -> list[str]:
        """Prompts that the counting reward scored, sorted."""
        return sorted((self.folder / f"scored-{processes}").read_text("utf-8").splitlines())

    def run(self, processes: int, name: str) -> dict[str, Any]:
        recipe, output = self.folder / f"{name}.yaml", self.by(processes, name)
        overrides = (f"output_dir={output}", "seed=1", "precision=fp32", *RUNS[name])
        return {
            "arguments": [name.partition(",")[0], str(recipe), *overrides],
            "env": {"ALIGN_TEST_SCORED": str(self.folder / f"scored-{processes}")},
        }


def break_one_token(model: Path, prompts: Sequence[str], to: Path) -> int:
    """Give the token that stands in the fewest prompts a NaN embedding."""
    tokenizer = load_tokenizer(str(model))
    ids = [set(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    token = min(
        (t for t in set().union(*ids) if t >= 8), key=lambda t: (sum(t in i for i in ids), t)
    )
    shutil.copytree(model, to)
    held = load_file(to / "model.safetensors")
    assert "lm_head.weight" in held
    held["model.embed_tokens.weight"][token] = float("nan")
    save_file(held, to / "model.safetensors", {"format": "pt"})
    return token


@pytest.fixture(scope="module")
def prompts(demonstrations: list[dict[str, str]]) -> list[str]:
    return list(dict.fromkeys(row["prompt"] for row in demonstrations))


@pytest.fixture(scope="module")
def done(
    tiny_sft: Path,
    demonstrations: list[dict[str, str]],
    preferences: list[dict[str, Any]],
    prompts: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Done:
    folder = tmp_path_factory.mktemp("processes")
    done = Done(folder, break_one_token(tiny_sft, prompts, folder / "broken"))
    asked = [{"prompt": prompt} for prompt in prompts]
    streamed = {"streaming": True, "streaming_window": 8}
    # name -> rows, what else the recipe's data say, the model
    recipes: dict[str, tuple[Rows, dict[str, Any], Path]] = {
        "sft": (demonstrations, {}, tiny_sft),
        "rm": (preferences, {}, tiny_sft),
        "dpo": (preferences, {}, tiny_sft),
        "ppo": (asked, {}, tiny_sft),
        "rm, streamed": (preferences, streamed, tiny_sft),
        "ppo, broken model": (asked, {"test_fraction": 0}, folder / "broken"),
        "ppo, NaN score": (asked[:16], {"test_fraction": 0}, tiny_sft),
    }
    assert recipes.keys() == RUNS.keys()
    for name, (rows, options, model) in recipes.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        data = {"train": str(path), "test_fraction": 0.2, **options}
        recipe = json.dumps({"model": str(model), "data": data})
        (folder / f"{name}.yaml").write_text(recipe, "utf-8")
    (folder / "counted.py").write_text(f"BAD = {prompts[3]!r}\n{COUNTED}", "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        for name in RUNS:
            run = done.run(1, name)
            patch.setenv("ALIGN_TEST_SCORED", run["env"]["ALIGN_TEST_SCORED"])
            assert main(run["arguments"]) == 0
    launch([done.run(2, name) for name in RUNS], folder)
    return done


@pytest.fixture(scope="module")
def manifests(done: Done) -> dict[str, list[dict[str, Any]]]:
    """Run -> manifest by one process and by two.

    A launcher that starts one process only would make these tests pass for nothing.
    """
    read = {
        name: [json.loads((done.by(n, name) / "manifest.json").read_text("utf-8")) for n in (1, 2)]
        for name in RUNS
    }
    assert {tuple(m["processes"] for m in both) for both in read.values()} == {(1, 2)}
    return read


@pytest.mark.usefixtures("manifests")
@pytest.mark.parametrize("stage", ["sft", "rm", "dpo", "ppo"])
def test_two_processes_are_one(
    stage: str,
    done: Done,
    tiny_sft: Path,
    read_jsonl: Callable[[Path], list[dict[str, Any]]],
    trust: Trust,
) -> None:
    runs = [done.by(processes, stage) for processes in (1, 2)]
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
    done: Done,
    manifests: dict[str, list[dict[str, Any]]],
    read_jsonl: Callable[[Path], list[dict[str, Any]]],
) -> None:
    """Across windows, and from the second pass on."""
    one, two = manifests["rm, streamed"]
    assert one["stream"] == two["stream"]
    assert one["stream"]["whole_passes"] == 1
    rows = [read_jsonl(done.by(n, "rm, streamed") / "metrics.jsonl") for n in (1, 2)]
    for a, b in zip(*rows, strict=True):
        assert a.get("tokens") == b.get("tokens")
        assert a.get("loss", 0.0) == pytest.approx(b.get("loss", 0.0), rel=1e-4, abs=1e-5)
        assert a.get("eval_loss", 0.0) == pytest.approx(b.get("eval_loss", 0.0), rel=1e-4)


@pytest.mark.usefixtures("manifests")
def test_nan_on_one_process_is_known_to_both(
    done: Done,
    tiny_sft: Path,
    prompts: list[str],
    read_jsonl: Callable[[Path], list[dict[str, Any]]],
) -> None:
    """One token has a NaN embedding, so the logits of a few prompts are NaN."""
    broken, left_out, named = "ppo, broken model", [], []
    for processes in (1, 2):
        found = read_jsonl(done.by(processes, broken) / "nonfinite.jsonl")
        left_out.append([(row["step"], row["what"]) for row in found])
        # others may follow: a response may draw the token too
        named.append({name.rpartition("/")[2] for row in found for name in row["ids"]})
    assert left_out[0] == left_out[1] != []
    tokenizer = load_tokenizer(str(tiny_sft))
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    bad = {f"{broken}.jsonl:{i + 1}" for i, own in enumerate(ids) if done.broken_token in own}
    assert bad
    assert all(bad <= names for names in named)


@pytest.mark.usefixtures("manifests")
def test_processes_share_the_scoring_and_know_of_each_others_nan(
    done: Done, read_jsonl: Callable[[Path], list[dict[str, Any]]]
) -> None:
    """The reward of one prompt is NaN: only the process that scored it sees that by itself."""
    rows = [read_jsonl(done.by(n, "ppo, NaN score") / "nonfinite.jsonl") for n in (1, 2)]
    left_out = [[(r["step"], r["ids"], r["responses"]) for r in found] for found in rows]
    assert left_out[0] == left_out[1] != []
    assert done.scored(1) == done.scored(2) != []  # each response once
