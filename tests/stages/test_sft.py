from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.config.keys import SFTRecipe
from align.stages import sft
from align.training import checkpoint, loop
from align.types import AlignError

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
    tree = {
        "model": str(tiny),
        "data": {"train": str(write_rows("sft.jsonl", demonstrations)), "test_fraction": 0.2},
        "precision": "fp32",
        "train": {"max_steps": 6, "minibatch": 8},
        "optim": {"lr": 0.01},
    }

    def run(name: str, *overrides: str) -> Path:
        folder = tmp_path / name
        sft.run(make_recipe(SFTRecipe, tree, f"output_dir={folder}", *overrides))
        return folder

    return run


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def nll(folder: Path, ids: list[int], counted: list[int]) -> float:
    """Sum over the counted columns of minus log-probability, by the saved model in transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return -sum(logprobs[column - 1, ids[column]].item() for column in counted)


# ---------------------------------------------------------------- what is learned


def test_learns_and_says_so(run_sft: RunSFT, read_jsonl: ReadJsonl) -> None:
    folder = run_sft("run", "train.max_steps=60")
    rows = read_jsonl(folder / "metrics.jsonl")
    first, last = rows[1], [row for row in rows if "loss" in row][-1]
    assert last["loss"] < first["loss"] - 2
    assert {"loss", "grad_norm", "tokens", "lr", "epoch", "step"} <= first.keys()
    found = manifest(folder)
    assert found["status"] == "done"
    assert found["held_out"]["loss"] == rows[-1]["eval_loss"] < rows[0]["eval_loss"]
    assert len(found["start_weights"]) == 64
    assert found["parameters"] == found["parameters_trained"] > 10_000
    assert found["train_rows"] + found["test_rows"] == 30
    assert found["data"]["train"][0]["rows_kept"] == 30
    assert len(found["data"]["train"][0]["sha256"]) == 64


def test_held_out_loss_is_that_of_the_saved_model(
    run_sft: RunSFT, write_rows: Callable[..., Path], read_jsonl: ReadJsonl
) -> None:
    rows = [{"prompt": "red cat: ", "completion": "good dog"}, {"prompt": "a", "completion": "sea"}]
    folder = run_sft("run", f"data.test={write_rows('test.jsonl', rows)}")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    total, count = 0.0, 0
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"] + "</s>", add_special_tokens=False)["input_ids"]
        ids = prompt + answer
        total += nll(folder / "model", ids, list(range(len(prompt), len(ids))))
        count += len(answer)
    found = read_jsonl(folder / "metrics.jsonl")[-1]
    assert found["eval_loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize(("loss_on", "everything"), [("auto", False), ("all", True)])
def test_dialogue_learns_every_assistant_turn(
    loss_on: str,
    everything: bool,
    run_sft: RunSFT,
    tiny_chat: Path,
    write_rows: Callable[..., Path],
    read_jsonl: ReadJsonl,
) -> None:
    """The start's held-out loss, against a mask written down here by hand."""
    texts = [("user", "red cat?"), ("assistant", "good"), ("user", "sun?"), ("assistant", "bad")]
    row = {"messages": [{"role": role, "content": text} for role, text in texts]}
    path = write_rows("chat.jsonl", [row])
    folder = run_sft("run", f"model={tiny_chat}", f"data.test={path}", f"data.loss_on={loss_on}")
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat)
    ids: list[int] = []
    counted: list[int] = []
    for role, text in texts:
        opening = f"<|im_start|>{role}\n" if role == "user" else "<|im_start|>assistant\n"
        for piece, counts in ((opening, False), (f"{text}<|im_end|>", role == "assistant")):
            new = tokenizer(piece, add_special_tokens=False)["input_ids"]
            counted += [len(ids) + i for i in range(len(new)) if counts]
            ids += new
        ids += tokenizer("\n", add_special_tokens=False)["input_ids"]
    if ids[-1] != tokenizer.eos_token_id:
        ids.pop()  # nothing is learned behind the last end token
    assert [i for i in counted if ids[i] == tokenizer.eos_token_id]
    counted = list(range(1, len(ids))) if everything else counted
    want = nll(tiny_chat, ids, counted) / len(counted)
    assert read_jsonl(folder / "metrics.jsonl")[0]["eval_loss"] == pytest.approx(want, rel=1e-5)


def test_plain_text_counts_all_and_long_text_loses_nothing(
    run_sft: RunSFT, tiny: Path, write_rows: Callable[..., Path], read_jsonl: ReadJsonl
) -> None:
    text = "red cat good dog sun moon blue sea one two bad green"
    path = write_rows("text.jsonl", [{"text": text}])
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    whole = run_sft("whole", f"data.test={path}")
    want = nll(tiny, ids, list(range(1, len(ids)))) / (len(ids) - 1)
    assert read_jsonl(whole / "metrics.jsonl")[0]["eval_loss"] == pytest.approx(want, rel=1e-5)
    cut = run_sft("cut", f"data={path}", "data.test_fraction=0", "data.max_tokens=6")
    assert manifest(cut)["train_rows"] == 1
    # pieces after the first repeat one token, which is not counted again
    assert manifest(cut)["train_tokens"] == len(ids) + -(-(len(ids) - 1) // 5) - 1


def test_lora_trains_little_and_saves_a_merged_model(
    run_sft: RunSFT, read_jsonl: ReadJsonl, write_rows: Callable[..., Path]
) -> None:
    rows = [{"prompt": "red cat: ", "completion": "good dog"}]
    test = write_rows("test.jsonl", rows)
    folder = run_sft("run", "lora.r=4", "train.max_steps=20", f"data.test={test}")
    found = manifest(folder)
    assert 0 < found["parameters_trained"] < 0.3 * found["parameters"]
    assert (folder / "model_adapter" / "adapter_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    ids = (
        tokenizer("red cat: ")["input_ids"]
        + tokenizer("good dog</s>", add_special_tokens=False)["input_ids"]
    )
    start = len(tokenizer("red cat: ")["input_ids"])
    want = nll(folder / "model", ids, list(range(start, len(ids)))) / (len(ids) - start)
    before, after = (read_jsonl(folder / "metrics.jsonl")[i]["eval_loss"] for i in (0, -1))
    assert after == pytest.approx(want, rel=1e-5)
    assert after != pytest.approx(before, rel=1e-2)


def test_from_scratch_starts_from_other_weights(run_sft: RunSFT) -> None:
    loaded, made = run_sft("a"), run_sft("b", "from_scratch=true", "seed=5")
    assert manifest(loaded)["start_weights"] != manifest(made)["start_weights"]


# ---------------------------------------------------------------- going on


def test_resumed_run_is_the_whole_run(
    run_sft: RunSFT,
    stop_at: Callable[..., Any],
    assert_same_weights: Callable[..., None],
    read_jsonl: ReadJsonl,
) -> None:
    options = ("train.save_every=2", "train.eval_every=3", "lora=null")
    whole = run_sft("whole", *options)
    with stop_at(loop.Trainer, "take_step", 6):
        run_sft("cut", *options)
    # the fifth step is lost: the newest checkpoint is of the fourth
    assert [row["step"] for row in read_jsonl(whole.parent / "cut" / "metrics.jsonl")][-1] == 5
    resumed = run_sft("cut", *options, "resume=auto")
    assert_same_weights(whole / "model", resumed / "model")
    timeless = [
        [{k: v for k, v in row.items() if "second" not in k} for row in read_jsonl(f)]
        for f in (whole / "metrics.jsonl", resumed / "metrics.jsonl")
    ]
    assert timeless[0] == timeless[1]
    assert manifest(whole)["held_out"] == manifest(resumed)["held_out"]


def test_resumed_lora_run_is_the_whole_run(
    run_sft: RunSFT, stop_at: Callable[..., Any], assert_same_weights: Callable[..., None]
) -> None:
    """With dropout on the adapters: its random numbers have to be drawn again alike."""
    options = ("train.save_every=2", "lora.r=4", "lora.dropout=0.3")
    whole = run_sft("whole", *options)
    with stop_at(loop.Trainer, "take_step", 4):
        run_sft("cut", *options)
    assert_same_weights(whole / "model", run_sft("cut", *options, "resume=auto") / "model")


def test_a_save_that_fails_leaves_the_one_before_it(
    run_sft: RunSFT, stop_at: Callable[..., Any], assert_same_weights: Callable[..., None]
) -> None:
    options = ("train.save_every=2",)
    whole = run_sft("whole", *options)
    # two files a checkpoint: the second checkpoint is half there
    with stop_at(checkpoint, "_save_tensors", 4):
        run_sft("cut", *options)
    found = sorted(p.name for p in (whole.parent / "cut" / "checkpoints").iterdir())
    assert found == ["step-2"]
    assert_same_weights(whole / "model", run_sft("cut", *options, "resume=auto") / "model")


def test_another_run_is_not_gone_on_with(
    run_sft: RunSFT, stop_at: Callable[..., Any], write_rows: Callable[..., Path]
) -> None:
    with stop_at(loop.Trainer, "take_step", 4):
        run_sft("run", "train.save_every=2")
    with pytest.raises(AlignError, match=r"optim.lr was 0.01 and is now 0.02"):
        run_sft("run", "resume=auto", "optim.lr=0.02")
    write_rows("sft.jsonl", [{"prompt": "red", "completion": "cat"}] * 9)
    with pytest.raises(AlignError, match="a data file has changed"):
        run_sft("run", "resume=auto")


def test_resume_without_a_checkpoint_starts_again(
    run_sft: RunSFT, stop_at: Callable[..., Any], assert_same_weights: Callable[..., None]
) -> None:
    whole = run_sft("whole")
    with stop_at(loop.Trainer, "take_step", 3):
        run_sft("cut")
    assert_same_weights(whole / "model", run_sft("cut", "resume=auto") / "model")


def test_a_folder_with_a_run_is_kept_unless_told(
    run_sft: RunSFT, assert_same_weights: Callable[..., None]
) -> None:
    first = run_sft("run")
    before = (first / "metrics.jsonl").read_text()
    with pytest.raises(AlignError, match=r"already holds a run; add resume=auto"):
        run_sft("run", "seed=1")
    assert (first / "metrics.jsonl").read_text() == before
    again = run_sft("run", "seed=1", "overwrite=true")
    assert_same_weights(again / "model", run_sft("other", "seed=1") / "model")


def test_checkpoints_are_kept_as_told(run_sft: RunSFT) -> None:
    folder = run_sft("run", "train.save_every=1", "train.keep_checkpoints=3")
    found = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert found == ["step-4", "step-5", "step-6"]
    assert not (run_sft("none") / "checkpoints").exists()
