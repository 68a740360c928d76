"""What goes wrong in a run at night: named, written down, and never in the weights.

Bad input before a run is in test_bad_input.py, runs that are killed in stages/test_killed.py.
"""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from align.cli import main
from align.config.sections import GenerationOptions
from align.models import load_policy
from align.rollout.sampler import sample
from align.run.folder import Run
from align.stages import sft
from align.stages.ppo import update as ppo_update
from align.training.saver import Saver
from align.types import NonFiniteError
from tools.trust import Trust

Row = dict[str, Any]
Align = Callable[..., str]

REWARDS = """
import time, math, os
calls = 0

def counted(value, at):
    def f(prompts, responses, references):
        global calls
        calls += 1
        scores = [float(r.count("o")) for r in responses]
        if calls == at:
            scores[3] = value
        return scores
    return f

nan_once = counted(math.nan, 2)
nan_last = counted(math.nan, 7)
always_nan = lambda responses: [math.nan] * len(responses)

def hangs(prompts, responses, references):
    time.sleep(60)

def raises(prompts, responses, references):
    raise ValueError("no such key")

def leaves(prompts, responses, references):
    raise SystemExit(0)

def ends(prompts, responses, references):
    os._exit(0)

def one_short(prompts, responses, references):
    return [1.0] * (len(responses) - 1)
"""


@pytest.fixture
def align(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Align:
    """Run a command; its last line on stderr where it ends with ``code``, and no traceback."""

    def run(*argv: str, code: int = 2) -> str:
        found = main(list(argv))
        error = capsys.readouterr().err.strip()
        assert found == code, error
        assert "Traceback" not in error
        return error.splitlines()[-1] if error else ""

    return run


@pytest.fixture
def sft_recipe(tiny: Path, tmp_path: Path, write_rows: Any, demonstrations: list[Row]) -> str:
    tree = {
        "model": str(tiny),
        "output_dir": str(tmp_path / "run"),
        "precision": "fp32",
        "data": {"train": str(write_rows("sft.jsonl", demonstrations)), "test_fraction": 0.2},
        "train": {"max_steps": 4, "minibatch": 8, "save_every": 1},
        "optim": {"lr": 0.01},
    }
    (tmp_path / "sft.yaml").write_text(json.dumps(tree), encoding="utf-8")
    return str(tmp_path / "sft.yaml")


@pytest.fixture
def ppo_recipe(
    tiny_sft: Path, tmp_path: Path, write_rows: Any, demonstrations: list[Row],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[str]:  # fmt: skip

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    (tmp_path / "night_rewards.py").write_text(REWARDS, encoding="utf-8")
    rows = [{"prompt": r["prompt"], "references": [r["completion"]]} for r in demonstrations]
    tree = {
        "model": str(tiny_sft),
        "output_dir": str(tmp_path / "run"),
        "precision": "fp32",
        "data": {"train": str(write_rows("prompts.jsonl", rows)), "test_fraction": 0},
        "reward": {"function": "night_rewards:raises"},
        "generation": {"max_new_tokens": 6, "samples_per_prompt": 2},
        "ppo": {"iterations": 3, "rollout_batch": 8, "epochs": 1},
        "optim": {"lr": 0.001},
        "train": {"save_every": 1},
    }
    (tmp_path / "ppo.yaml").write_text(json.dumps(tree), encoding="utf-8")
    yield str(tmp_path / "ppo.yaml")
    sys.modules.pop("night_rewards", None)


@pytest.fixture
def nan_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """The SFT loss of the n-th training microbatch becomes NaN; one microbatch is one step."""

    def arrange(call: int) -> None:
        original, calls = sft.nll_loss, 0

        def loss(logprobs: torch.Tensor, **options: Any) -> torch.Tensor:
            nonlocal calls
            value = original(logprobs, **options)
            if logprobs.requires_grad:
                calls += 1
            return value * math.nan if calls == call and logprobs.requires_grad else value

        monkeypatch.setattr(sft, "nll_loss", loss)

    return arrange


def undone(folder: Path) -> None:
    """What a whole run left becomes what one that was killed leaves."""
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    (folder / "manifest.json").write_text(json.dumps({**manifest, "status": "running"}))
    shutil.rmtree(folder / "model")


def weights(folder: Path) -> list[torch.Tensor]:
    return list(load_file(folder / "model" / "model.safetensors").values())


# ---------------------------------------------------------------- NaN and infinity


def test_a_loss_that_is_nan_stops_the_run_with_its_rows_on_disk(
    align: Align, sft_recipe: str, tmp_path: Path, nan_at: Any, read_jsonl: Any, trust: Trust
) -> None:
    nan_at(3)
    line = align("sft", sft_recipe)
    assert line.startswith("align: sft: step 3: the loss became nan on ")
    assert "on_nonfinite=skip" in line
    (row,) = read_jsonl(tmp_path / "run" / "nonfinite.jsonl")
    # an epoch's last minibatch is what 8 + 8 left of the rows that are not held out
    assert (row["step"], row["what"], len(set(row["ids"]))) == (3, "loss", 6)
    assert all("sft.jsonl:" in place for place in row["ids"])
    kept = tmp_path / "run" / "checkpoints" / "step-2" / "model.safetensors"
    assert all(t.isfinite().all() for t in load_file(kept).values())
    trust.row(
        "faults", "NaN in a loss, on_nonfinite=stop",
        found="stopped in one line; its 6 ids in nonfinite.jsonl; step 2 kept", wanted="no loss",
    )  # fmt: skip


def test_a_step_that_is_nan_is_left_out_and_counted(
    align: Align, sft_recipe: str, tmp_path: Path, nan_at: Any, read_jsonl: Any, trust: Trust
) -> None:
    nan_at(3)
    align("sft", sft_recipe, "train.on_nonfinite=skip", code=0)
    rows = [r for r in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "lr" in r]
    assert [r["nonfinite_skipped"] for r in rows] == [0, 0, 1, 1]
    assert ["loss" in r for r in rows] == [True, True, False, True]
    assert all(w.isfinite().all() for w in weights(tmp_path / "run"))
    before, after = (
        load_file(tmp_path / "run" / "checkpoints" / f"step-{n}" / "model.safetensors")
        for n in (3, 4)
    )
    assert any(not t.equal(after[name]) for name, t in before.items())
    trust.row(
        "faults", "NaN in a loss, on_nonfinite=skip",
        found="that step left out and counted, the next ones taken", wanted="finite weights",
    )  # fmt: skip


def test_weights_that_are_broken_end_the_run_even_when_skipping(
    align: Align, sft_recipe: str, tiny: Path, tmp_path: Path, trust: Trust
) -> None:
    line = align("sft", sft_recipe, "train.on_nonfinite=skip", "optim.lr=1e30",
                 "train.max_steps=40", "train.save_every=0")  # fmt: skip
    assert "the 10th in a row to be left out" in line
    trust.row(
        "faults", "a learning rate of 1e30, on_nonfinite=skip",
        found="stopped after 10 steps in a row were left out", wanted="no endless run",
    )  # fmt: skip


def test_a_score_that_is_nan(
    align: Align, ppo_recipe: str, tmp_path: Path, read_jsonl: Any, trust: Trust
) -> None:
    reward = "reward={function: night_rewards:nan_once}"
    line = align("ppo", ppo_recipe, reward)
    assert line.startswith("align: ppo: step 2: the score became nan on ")
    (row,) = read_jsonl(tmp_path / "run" / "nonfinite.jsonl")
    assert (row["what"], len(row["ids"])) == ("score", 1)
    assert "prompts.jsonl:" in row["ids"][0]
    assert len(row["responses"]) == 1
    assert "(all, with the responses, in " in line
    assert "mend reward night_rewards:nan_once, which gave it" in line
    assert "optim.lr" not in line
    # its second call gives NaN no more: the run goes on where it stopped
    align("ppo", ppo_recipe, reward, "resume=auto", code=0)
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in rows if "policy_loss" in r] == [1, 2, 3]
    trust.row(
        "faults", "NaN in a reward, on_nonfinite=stop",
        found="stopped in one line, prompt's id on disk; resumed after mending", wanted="named",
    )  # fmt: skip


def test_a_score_that_is_nan_before_the_first_step_is_no_matter_of_the_learning_rate(
    align: Align, ppo_recipe: str, tmp_path: Path, write_rows: Any, read_jsonl: Any
) -> None:
    held_out = write_rows("held_out.jsonl", [{"prompt": "one"}, {"prompt": "two"}])
    reward = "reward={function: night_rewards:always_nan}"
    line = align("ppo", ppo_recipe, reward, f"data.test={held_out}")
    assert line.startswith("align: ppo: step 0: the score became nan on ")
    assert "mend reward night_rewards:always_nan, which gave it" in line
    assert "optim.lr" not in line
    (row,) = read_jsonl(tmp_path / "run" / "nonfinite.jsonl")
    assert len(row["responses"]) == len(row["ids"]) == 4  # two prompts, two samples of each


def test_a_rollout_with_a_score_that_is_nan_is_left_out(
    align: Align, ppo_recipe: str, tmp_path: Path, read_jsonl: Any, trust: Trust
) -> None:
    options = ("reward={function: night_rewards:nan_once}", "train.on_nonfinite=skip")
    align("ppo", ppo_recipe, *options, code=0)
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [(r["step"], r["nonfinite_skipped"]) for r in rows] == [(1, 0), (2, 1), (3, 1)]
    assert ["policy_loss" in r for r in rows] == [True, False, True]
    assert {r["iteration"] for r in read_jsonl(tmp_path / "run" / "samples.jsonl")} == {1, 3}
    trust.row(
        "faults", "NaN in a reward, on_nonfinite=skip",
        found="that rollout left out and counted", wanted="counted",
    )  # fmt: skip


def test_updates_that_are_all_nan_end_a_ppo_run_too(
    align: Align, ppo_recipe: str, monkeypatch: pytest.MonkeyPatch, trust: Trust
) -> None:
    """Each rollout is finite; that it could be scored does not end the row of steps left out."""
    original = ppo_update.ppo_policy_loss
    monkeypatch.setattr(ppo_update, "ppo_policy_loss", lambda *a, **k: original(*a, **k) * math.nan)
    options = ("reward={metric: chrf}", "train.on_nonfinite=skip", "ppo.iterations=12")
    line = align("ppo", ppo_recipe, *options, "train.save_every=0")
    assert "ppo: step 10: " in line
    assert "the 10th in a row to be left out" in line
    trust.row(
        "faults", "PPO's loss always NaN, on_nonfinite=skip",
        found="stopped after 10 updates in a row were left out", wanted="no endless run",
    )  # fmt: skip


def test_a_last_held_out_score_that_is_nan_keeps_the_best(
    align: Align, ppo_recipe: str, tmp_path: Path, write_rows: Any, trust: Trust
) -> None:
    """Calls: held out, then each rollout with what is held out behind it; the last one is NaN."""
    rows = [{"prompt": "one", "references": ["a"]}, {"prompt": "two", "references": ["b"]}]
    held_out = write_rows("held_out.jsonl", rows)
    options = ("reward={function: night_rewards:nan_last}", "train.on_nonfinite=skip",
               "train.keep_best=score")  # fmt: skip
    align("ppo", ppo_recipe, *options, f"data.test={held_out}", code=0)
    found = json.loads((tmp_path / "run" / "manifest.json").read_text("utf-8"))
    assert found["status"] == "done"
    assert found["best"]["step"] in (1, 2)
    assert (tmp_path / "run" / "model" / "config.json").is_file()
    trust.row(
        "faults", "NaN in the last held-out score, keep_best",
        found="counted; the best checkpoint became the model", wanted="a model",
    )  # fmt: skip


def test_a_replaced_run_is_not_brought_back_over_checkpoints(
    align: Align, sft_recipe: str, tmp_path: Path, nan_at: Any, trust: Trust
) -> None:
    options = ("data.test_fraction=0", "train.log_every=50")
    align("sft", sft_recipe, *options, code=0)
    nan_at(3)
    align("sft", sft_recipe, *options, "overwrite=true", "train.keep_checkpoints=9")
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-1", "step-2"]
    assert (tmp_path / "run" / "nonfinite.jsonl").is_file()
    trust.row(
        "faults", "a run that replaces another fails after its first checkpoint",
        found="its own checkpoints are kept", wanted="no loss",
    )  # fmt: skip


def test_weights_that_hold_nan(
    align: Align, ppo_recipe: str, tiny_sft: Path, tmp_path: Path, trust: Trust
) -> None:

    broken = Path(shutil.copytree(tiny_sft, tmp_path / "broken"))
    held = load_file(broken / "model.safetensors")
    name = next(n for n in held if "down_proj" in n)
    held[name][0, 0] = math.nan
    save_file(held, broken / "model.safetensors", {"format": "pt"})
    line = align("ppo", ppo_recipe, f"model={broken}", "reward={metric: chrf}")
    assert "its numbers become NaN or infinite" in line
    trust.row(
        "faults", "a model whose weights hold NaN", found="refused in one line", wanted="named"
    )


def test_logits_that_become_nan_are_never_drawn_from(tiny_sft: Path, trust: Trust) -> None:
    policy = load_policy(str(tiny_sft), device=torch.device("cpu"), precision="fp32")
    with torch.no_grad():
        next(p for n, p in policy.named_parameters() if "down_proj" in n)[0, 0] = math.nan
    options = GenerationOptions(max_new_tokens=2)
    with pytest.raises(NonFiniteError, match="the logits became nan on response 0") as caught:
        sample(policy, [np.array([5, 6]), np.array([7])], options, end_ids=[1], seed=0)
    assert (caught.value.what, caught.value.rows) == ("logits", (0, 1))
    trust.row(
        "faults", "NaN in logits", found="stopped in one line, no token drawn", wanted="named"
    )


# ---------------------------------------------------------------- rewards


@pytest.mark.parametrize(
    ("name", "said", "what"),
    [
        ("raises", "raised ValueError: no such key", "raises"),
        ("one_short", "returned 7 scores for 8 responses", "returns too few scores"),
        ("leaves", "raised SystemExit: 0", "leaves the program"),
        ("ends", "raised os._exit(0)", "ends the process with code 0"),
        ("hangs", "no answer within 0.2 s for 8 responses", "hangs"),
    ],
)
def test_a_reward_function_that(
    align: Align, ppo_recipe: str, name: str, said: str, what: str, trust: Trust
) -> None:
    started = time.monotonic()
    line = align("ppo", ppo_recipe, f"reward={{function: night_rewards:{name}, timeout: 0.2}}")
    assert said in line
    assert f"night_rewards:{name}" in line
    assert time.monotonic() - started < 50
    trust.row("faults", f"a reward function that {what}", found="one line", wanted="one line")


# ---------------------------------------------------------------- disks and files


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system refuses to make any file larger: what a full disk does, without filling one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_room_for_a_checkpoint(
    align: Align, sft_recipe: str, tmp_path: Path, assert_same_weights: Any, trust: Trust
) -> None:
    align("sft", sft_recipe, "train.max_steps=4", f"output_dir={tmp_path / 'whole'}", code=0)
    align("sft", sft_recipe, "train.keep_checkpoints=4", code=0)  # what a run leaves, to take from
    undone(tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    for number in (3, 4):
        shutil.rmtree(folder / f"step-{number}")
    with files_of_at_most(20_000):
        line = align("sft", sft_recipe, "resume=auto")
    assert "step-3: cannot be written: " in line
    assert "File too large" in line
    assert "resume=auto" in line
    assert sorted(p.name for p in folder.iterdir()) == ["step-1", "step-2"]
    align("sft", sft_recipe, "resume=auto", code=0)
    assert_same_weights(tmp_path / "whole" / "model", tmp_path / "run" / "model")
    trust.row(
        "faults", "no room for a checkpoint",
        found="one line; the checkpoint before it goes on, equal bit for bit", wanted="no loss",
    )  # fmt: skip


def test_no_room_for_metrics(align: Align, sft_recipe: str, tmp_path: Path, trust: Trust) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    original = Run.begin

    def begin(run: Run) -> None:
        original(run)
        (run.folder / "metrics.jsonl").symlink_to("/dev/full")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "begin", begin)
        line = align("sft", sft_recipe)
    assert "metrics.jsonl: cannot be written: No space left on device" in line
    trust.row("faults", "no room for metrics", found="one line", wanted="one line")


def test_too_little_room_for_a_checkpoint_is_told_at_the_start(
    align: Align, sft_recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert align("sft", sft_recipe, "train.max_steps=1", code=0) == ""
    total, used, _ = shutil.disk_usage(tmp_path)
    found = type(shutil.disk_usage(tmp_path))(total, used, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: found)
    line = align("sft", sft_recipe, "train.max_steps=1", "overwrite=true", code=0)
    assert "a checkpoint needs about " in line
    assert "1 kB are free in " in line


def test_no_room_for_a_tracker(align: Align, sft_recipe: str, tmp_path: Path) -> None:
    original = Run.log

    def log(run: Run, step: int, metrics: Any) -> None:
        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        run.trackers[:] = [full]
        original(run, step, metrics)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "log", log)
        line = align("sft", sft_recipe)
    assert f"{tmp_path / 'run' / 'tracking'}: cannot be written: No space left on device" in line
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 1


def test_a_checkpoint_cut_short(
    align: Align, sft_recipe: str, tmp_path: Path, assert_same_weights: Any, trust: Trust
) -> None:
    align("sft", sft_recipe, f"output_dir={tmp_path / 'whole'}", code=0)
    align("sft", sft_recipe, "train.keep_checkpoints=4", code=0)
    undone(tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step-4"
    held = newest / "model.safetensors"
    held.write_bytes(held.read_bytes()[:500])
    shutil.copytree(tmp_path / "run", tmp_path / "without")
    shutil.rmtree(tmp_path / "without" / "checkpoints" / "step-4")
    line = align("sft", sft_recipe, "resume=auto", code=0)
    assert f"resume: checkpoint {newest}: cannot be read: " in line
    assert "; kept as damaged-step-4, going on from step-3" in line
    assert (newest.with_name("damaged-step-4") / "model.safetensors").stat().st_size == 500

    # as if the damaged one had never been, and as if nothing had happened
    align("sft", sft_recipe, "resume=auto", f"output_dir={tmp_path / 'without'}", code=0)
    for other in ("without", "whole"):
        assert_same_weights(tmp_path / other / "model", tmp_path / "run" / "model")
        assert losses_of(tmp_path / other) == losses_of(tmp_path / "run")
    trust.row(
        "faults", "a checkpoint cut short",
        found="said in one line; the one before it goes on", wanted="no loss",
    )  # fmt: skip


def losses_of(run: Path) -> list[tuple[int, float]]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


@pytest.mark.parametrize("file", ["state.json", "model.safetensors", "model.optimizer.safetensors"])
def test_every_checkpoint_damaged(align: Align, sft_recipe: str, tmp_path: Path, file: str) -> None:
    align("sft", sft_recipe, "train.keep_checkpoints=4", code=0)
    undone(tmp_path / "run")
    places = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert len(places) == 4
    for place in places:
        (place / file).unlink()
    line = align("sft", sft_recipe, "resume=auto")
    assert f"resume: checkpoint {places[-1]}: cannot be read: " in line
    assert "no other checkpoint is whole; start anew with overwrite=true" in line
    assert sorted((tmp_path / "run" / "checkpoints").iterdir()) == places, "nothing was renamed"


def test_data_that_change_under_a_resumed_run(
    align: Align, sft_recipe: str, tmp_path: Path, trust: Trust
) -> None:
    align("sft", sft_recipe, code=0)
    assert "is done, so there is nothing to resume" in align("sft", sft_recipe, "resume=auto")
    undone(tmp_path / "run")
    path = tmp_path / "sft.jsonl"
    path.write_text(path.read_text().replace("red", "blue"), encoding="utf-8")
    line = align("sft", sft_recipe, "resume=auto")
    assert "a data file has changed since the run began (sha256" in line
    trust.row("faults", "data that change under a resumed run", found="refused", wanted="refused")


# ---------------------------------------------------------------- a terminal that is closed


@pytest.fixture
def hung_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[signal.Signals]]:
    """These signals come after the second step."""
    signals: list[signal.Signals] = [signal.SIGHUP, signal.SIGHUP]
    original = Run.log

    def log(run: Run, step: int, metrics: Any) -> None:
        original(run, step, metrics)
        if step == 2 and "loss" in metrics:
            for number in signals:
                signal.raise_signal(number)

    monkeypatch.setattr(Run, "log", log)
    before = signal.getsignal(signal.SIGHUP)
    yield signals
    signal.signal(signal.SIGHUP, before)


def test_a_closed_terminal_saves_as_a_stop_does(
    align: Align, sft_recipe: str, tmp_path: Path, hung_up: list[signal.Signals],
    assert_same_weights: Any, trust: Trust,
) -> None:  # fmt: skip
    """SIGHUP comes from the shell and from the system: the second one is no hurry."""
    line = align("sft", sft_recipe, "train.save_every=0", code=129)
    assert "interrupted and saved in" in line
    assert "(2 steps done); the same command with resume=auto goes on from there" in line
    found = json.loads((tmp_path / "run" / "manifest.json").read_text("utf-8"))
    assert found["status"] == "interrupted"
    hung_up.clear()
    align("sft", sft_recipe, "train.save_every=0", "resume=auto", code=0)
    align("sft", sft_recipe, f"output_dir={tmp_path / 'whole'}", code=0)
    assert_same_weights(tmp_path / "whole" / "model", tmp_path / "run" / "model")
    trust.row(
        "faults", "SIGHUP, twice",
        found="saved, exit code 129, one line; goes on equal bit for bit", wanted="no loss",
    )  # fmt: skip


def test_a_logout_is_one_stop(align: Align, sft_recipe: str, hung_up: list[signal.Signals]) -> None:
    hung_up[:] = [signal.SIGTERM, signal.SIGHUP]
    assert "interrupted and saved in" in align("sft", sft_recipe, code=143)
    hung_up[:] = [signal.SIGHUP, signal.SIGTERM, signal.SIGTERM]
    line = align("sft", sft_recipe, "overwrite=true", code=143)
    assert "interrupted twice; left at once, without saving" in line


def test_nohup_is_respected(
    align: Align, sft_recipe: str, tmp_path: Path, hung_up: list[signal.Signals]
) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    align("sft", sft_recipe, code=0)
    found = json.loads((tmp_path / "run" / "manifest.json").read_text("utf-8"))
    assert found["status"] == "done"


# ---------------------------------------------------------------- the best checkpoint


def test_a_best_checkpoint_that_is_damaged_does_not_cost_the_run(
    align: Align, sft_recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Saver.take_best

    def take_best(saver: Saver, last: Any) -> Any:
        (path,) = saver.folder.glob(f"step-{int(saver.best['step'])}/model.safetensors")
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        return original(saver, last)

    monkeypatch.setattr(Saver, "take_best", take_best)
    options = ("train.max_steps=6", "train.keep_best=loss", "optim.schedule=constant",
               "optim.lr=0.05")  # fmt: skip
    line = align("sft", sft_recipe, *options, code=0)
    assert "the best checkpoint " in line
    assert "its content has changed since it was saved (sha256)" in line
    assert line.endswith("; the model of the last step is saved instead")
    assert (tmp_path / "run" / "model" / "config.json").is_file()


def test_the_best_checkpoint_is_kept_and_becomes_the_model(
    align: Align, sft_recipe: str, tmp_path: Path, read_jsonl: Any
) -> None:
    options = ("train.max_steps=6", "train.keep_checkpoints=1", "train.keep_best=loss",
               "optim.schedule=constant", "optim.lr=0.05")  # fmt: skip
    align("sft", sft_recipe, *options, code=0)
    run = tmp_path / "run"
    losses = {
        r["step"]: r["eval_loss"] for r in read_jsonl(run / "metrics.jsonl") if "eval_loss" in r
    }
    assert list(losses) == [0, 1, 2, 3, 4, 5, 6]
    best = min(range(1, 6), key=losses.__getitem__)
    assert losses[best] < losses[6], "the test needs a run that gets worse"
    kept = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert kept == sorted({f"step-{best}", "step-6"})
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["best"] == {"step": best, "value": losses[best]}
    assert manifest["held_out"]["loss"] == pytest.approx(losses[best], rel=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["train.save_every=0", "train.keep_best=loss"], "set train.save_every above 0"),
        (["train.keep_best=accuracy"], "not measured on held-out rows here; there is loss"),
        (["train.keep_best=loss", "data.test_fraction=0"], "hold some out"),
    ],
)
def test_a_best_that_cannot_be_known(
    align: Align, sft_recipe: str, options: list[str], said: str
) -> None:
    assert said in align("sft", sft_recipe, *options)
