"""The loop, through the SFT stage that ships: what is stepped, on what, and how often."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama import modeling_llama

from align.config.keys import SFTRecipe
from align.config.sections import TrainOptions
from align.stages import sft
from align.training import loop
from align.training.loop import num_steps
from align.types import AlignError
from tools.trust import Trust

ReadJsonl = Callable[[Path], list[dict[str, Any]]]
RunSFT = Callable[..., Path]


@pytest.fixture
def run_sft(
    tiny: Path,
    tmp_path: Path,
    make_recipe: Callable[..., SFTRecipe],
    write_rows: Callable[..., Path],
    demonstrations: list[dict[str, str]],
) -> RunSFT:
    """``run_sft("name", "key=value", ...)``: three steps of 8 rows; gives the run's folder."""
    tree = {
        "model": str(tiny),
        "data": {"train": str(write_rows("sft.jsonl", demonstrations)), "test_fraction": 0},
        "precision": "fp32",
        "train": {"max_steps": 3, "minibatch": 8},
        # near plain SGD: a rounding error in a tiny gradient is no full step
        "optim": {"lr": 1.0, "eps": 1.0, "schedule": "constant", "warmup_fraction": 0.0},
    }

    def run(name: str, *overrides: str) -> Path:
        folder = tmp_path / name
        sft.run(make_recipe(SFTRecipe, tree, f"output_dir={folder}", *overrides))
        return folder

    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def metrics(folder: Path, read_jsonl: ReadJsonl, key: str) -> list[float]:
    return [row[key] for row in read_jsonl(folder / "metrics.jsonl") if key in row]


# ---------------------------------------------------------------- accumulation


def test_microbatches_change_nothing(
    run_sft: RunSFT, read_jsonl: ReadJsonl, tiny: Path, trust: Trust
) -> None:
    """Lengths are ragged, so a mean of microbatch means would be another number."""
    whole, cut = run_sft("whole"), run_sft("cut", "train.tokens_per_microbatch=20")
    start = load_file(tiny / "model.safetensors")
    worst = 0.0
    for name, tensor in weights(whole).items():
        scale = tensor.abs().max()
        worst = max(worst, ((tensor - weights(cut)[name]).abs().max() / scale).item())
        moved = (tensor - start[name]).abs().max()
        assert moved > 1e-4 * scale, name  # it did train
    trust.at_most("equivalences", "SFT: microbatches = one batch, weights, relative", worst, 1e-6)
    for key in ("loss", "grad_norm", "tokens"):
        want = metrics(whole, read_jsonl, key)
        assert len(want) == 3
        assert metrics(cut, read_jsonl, key) == pytest.approx(want, rel=1e-5)


def test_loss_is_per_counted_token_of_the_minibatch(
    run_sft: RunSFT,
    read_jsonl: ReadJsonl,
    tiny: Path,
    demonstrations: list[dict[str, str]],
) -> None:
    """Loss and gradient norm of the first step against plain transformers, row by row."""
    folder = run_sft("run", "train.max_steps=1", "train.minibatch=30", "optim.max_grad_norm=100")
    model = AutoModelForCausalLM.from_pretrained(tiny, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    total, count = torch.zeros(()), 0
    for row in demonstrations:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[*prompt, *answer, tokenizer.eos_token_id]])
        logprobs = model(ids).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        total = total - logprobs.gather(-1, ids[0, len(prompt) :, None]).sum()
        count += len(answer) + 1
    (total / count).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert metrics(folder, read_jsonl, "loss") == pytest.approx([(total / count).item()], rel=1e-5)
    assert metrics(folder, read_jsonl, "grad_norm") == pytest.approx([norm.item()], rel=1e-4)


# ---------------------------------------------------------------- steps


@pytest.mark.parametrize(
    ("groups", "minibatch", "epochs", "steps"),
    # 10 rows by 4 are 3 steps an epoch; 1.5 of it rounds up; 1.1 * 10 is 11.000000000000002
    [(10, 4, 1.0, 3), (10, 4, 2.0, 6), (10, 4, 0.5, 2), (3, 8, 1.0, 1), (100, 10, 1.1, 11)],
)
def test_number_of_steps(groups: int, minibatch: int, epochs: float, steps: int) -> None:
    assert num_steps(groups, TrainOptions(epochs=epochs, minibatch=minibatch)) == steps
    assert num_steps(groups, TrainOptions(epochs=epochs, minibatch=minibatch, max_steps=7)) == 7


def test_the_optimizer_really_steps_that_often(
    run_sft: RunSFT, spy_steps: Callable[..., dict[str, list[float]]], read_jsonl: ReadJsonl
) -> None:
    norms = spy_steps(loop)
    # 30 rows by 8 are 4 steps an epoch
    folder = run_sft("run", "train.max_steps=null", "train.epochs=2", "train.log_every=3")
    assert len(norms["0"]) == 8
    logged = [row for row in read_jsonl(folder / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in logged] == [3, 6, 8]  # and the last one
    assert [row["epoch"] for row in logged] == [0.75, 1.5, 2.0]


def test_gradients_are_clipped_once_a_step(
    run_sft: RunSFT, spy_steps: Callable[..., dict[str, list[float]]], read_jsonl: ReadJsonl
) -> None:
    norms = spy_steps(loop)
    folder = run_sft("run", "optim.max_grad_norm=0.05", "train.tokens_per_microbatch=20")
    assert norms["0"] == pytest.approx([0.05] * 3, rel=1e-3)
    # what is logged is the norm before clipping
    assert min(metrics(folder, read_jsonl, "grad_norm")) > 0.1


def test_schedule_is_followed(run_sft: RunSFT, read_jsonl: ReadJsonl) -> None:
    folder = run_sft(
        "run",
        "train.max_steps=5",
        "optim.lr=0.5",
        "optim.schedule=linear",
        "optim.warmup_fraction=0.4",
    )
    # half, whole, then 1, 2/3, 1/3 of .5
    want = [0.25, 0.5, 0.5, 1 / 3, 1 / 6]
    assert metrics(folder, read_jsonl, "lr") == pytest.approx(want)


def test_gradient_checkpointing_acts_and_changes_nothing(
    run_sft: RunSFT, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    original = modeling_llama.LlamaAttention.forward

    def counting(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(*args, **options)

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", counting)
    plain = run_sft("plain")
    forwards, calls = calls, 0
    thrifty = run_sft("thrifty", "gradient_checkpointing=true")
    # three steps of two layers are recomputed; the rest is the same
    assert calls == forwards + 6
    assert all(torch.equal(w, weights(thrifty)[name]) for name, w in weights(plain).items())


# ---------------------------------------------------------------- what is written


def test_held_out_rows_are_measured_when_asked(run_sft: RunSFT, read_jsonl: ReadJsonl) -> None:
    folder = run_sft("run", "data.test_fraction=0.3", "train.max_steps=5", "train.eval_every=2")
    rows = [row for row in read_jsonl(folder / "metrics.jsonl") if "eval_loss" in row]
    assert [row["step"] for row in rows] == [0, 2, 4, 5]
    for row in rows:
        assert row["eval_perplexity"] == pytest.approx(2.718281828 ** row["eval_loss"], rel=1e-6)


def test_a_gradient_that_is_no_number_stops_the_run(run_sft: RunSFT) -> None:
    with pytest.raises(AlignError, match=r"step 2: the loss became nan on .*sft.jsonl:\d+"):
        run_sft("run", "optim.lr=1e30")


def test_same_seed_same_weights(run_sft: RunSFT, assert_same_weights: Callable[..., None]) -> None:
    first, again, other = run_sft("a"), run_sft("b"), run_sft("c", "seed=1")
    assert_same_weights(first / "model", again / "model")
    with pytest.raises(AssertionError):
        assert_same_weights(first / "model", other / "model")
