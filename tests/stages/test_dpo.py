from __future__ import annotations

import gc
import json
import math
import shutil
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.config.keys import DPORecipe
from align.losses.dpo import LOSSES
from align.models.policy import Policy
from align.stages import dpo
from align.training import loop
from align.types import AlignError
from tools.trust import Trust

ReadJsonl = Callable[[Path], list[dict[str, Any]]]
Row = dict[str, Any]
RunDPO = Callable[..., Path]
LOG2 = 0.69314718


@pytest.fixture
def run_dpo(
    tiny: Path,
    tmp_path: Path,
    make_recipe: Callable[..., DPORecipe],
    write_rows: Callable[..., Path],
    preferences: list[Row],
) -> RunDPO:
    tree = {
        "model": str(tiny),
        "data": {"train": str(write_rows("pairs.jsonl", preferences)), "test_fraction": 0.2},
        "precision": "fp32",
        "train": {"max_steps": 4, "minibatch": 8},
        "optim": {"lr": 0.003, "schedule": "constant", "warmup_fraction": 0.0},
    }

    def run(name: str, *overrides: str) -> Path:
        folder = tmp_path / name
        dpo.run(make_recipe(DPORecipe, tree, f"output_dir={folder}", *overrides))
        return folder

    return run


def start(folder: Path, read_jsonl: ReadJsonl) -> Row:
    """The held-out numbers before the first step."""
    return next(row for row in read_jsonl(folder / "metrics.jsonl") if "eval_loss" in row)


def first_step(folder: Path, read_jsonl: ReadJsonl) -> Row:
    return next(row for row in read_jsonl(folder / "metrics.jsonl") if "loss" in row)


@cache
def loaded(model: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)


def token_logprobs(model: Path, prompt: str, response: str) -> torch.Tensor:
    """``[2, tokens]``: log p of the response's tokens and log sum p^2, by transformers alone."""
    plain, tokenizer = loaded(model)
    before = tokenizer(prompt)["input_ids"]
    answer = tokenizer(response + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logprobs = plain(torch.tensor([before + answer])).logits[0].log_softmax(-1)
    logprobs = logprobs[len(before) - 1 : -1]
    chosen = logprobs.gather(-1, torch.tensor(answer)[:, None])[:, 0]
    return torch.stack([chosen, (2 * logprobs).logsumexp(-1)])


# ---------------------------------------------------------------- the start


@pytest.mark.parametrize(
    "options",
    [
        ["dpo.reference=cached"],
        ["dpo.reference=online"],
        ["dpo.reference=cached", "lora.r=4"],
        ["dpo.reference=adapter_off", "lora.r=4"],
    ],
    ids=["cached", "online", "cached lora", "adapter off"],
)
def test_starts_at_log_2_with_strict_accuracy(
    options: list[str], run_dpo: RunDPO, read_jsonl: ReadJsonl
) -> None:
    folder = run_dpo("run", *options)
    found = start(folder, read_jsonl)
    assert found["eval_loss"] == pytest.approx(LOG2, abs=1e-6)
    # the same model twice: no margin is above 0
    assert found["eval_accuracy"] == 0.0
    assert found["eval_rewards_margin"] == pytest.approx(0, abs=1e-6)
    assert first_step(folder, read_jsonl)["loss"] == pytest.approx(LOG2, abs=1e-5)


def test_where_the_reference_comes_from_changes_nothing(
    run_dpo: RunDPO, read_jsonl: ReadJsonl
) -> None:
    """Four steps, so that policy and reference differ."""
    full = [run_dpo(n, f"dpo.reference={n}") for n in ("cached", "online")]
    lora = [run_dpo(f"{n}_lora", f"dpo.reference={n}", "lora.r=4") for n in ("online", "cached")]
    lora.append(run_dpo("off", "dpo.reference=adapter_off", "lora.r=4"))
    for same in (full, lora):
        curves = [
            [row["loss"] for row in read_jsonl(folder / "metrics.jsonl") if "loss" in row]
            for folder in same
        ]
        assert abs(curves[0][-1] - LOG2) > 0.01
        for curve in curves[1:]:
            assert curve == pytest.approx(curves[0], abs=1e-5)


def test_another_reference_model(
    run_dpo: RunDPO, tiny: Path, tmp_path: Path, preferences: list[Row], read_jsonl: ReadJsonl
) -> None:
    """-log sigmoid(beta D) with both models' log-probs by transformers alone."""
    other = Path(shutil.copytree(tiny, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    save_file(
        {k: v * 1.05 for k, v in weights.items()}, other / "model.safetensors", {"format": "pt"}
    )
    losses, wins = [], []
    for row in preferences:
        ratio = {
            side: (
                token_logprobs(tiny, row["prompt"], row[side])[0].sum()
                - token_logprobs(other, row["prompt"], row[side])[0].sum()
            ).item()
            for side in ("chosen", "rejected")
        }
        margin = 0.3 * (ratio["chosen"] - ratio["rejected"])
        losses.append(math.log1p(math.exp(-margin)))
        wins.append(margin > 0)
    for reference in ("cached", "online"):
        folder = run_dpo(
            reference,
            f"dpo.reference={reference}",
            f"dpo.reference_model={other}",
            "dpo.beta=0.3",
            "data.test_fraction=0",
            "train.minibatch=30",
            "train.max_steps=1",
            "train.tokens_per_microbatch=60",
        )
        found = first_step(folder, read_jsonl)
        assert found["loss"] == pytest.approx(np.mean(losses), abs=1e-5)
        assert found["accuracy"] == pytest.approx(np.mean(wins))
        assert abs(found["loss"] - LOG2) > 1e-3


# ---------------------------------------------------------------- the cache


def cached(folder: Path) -> set[str]:
    return {p.name for p in (folder.parent / "reference_cache").iterdir()}


def test_cache_is_keyed_by_weights_and_token_ids(
    run_dpo: RunDPO,
    tiny: Path,
    tmp_path: Path,
    write_rows: Callable[..., Path],
    preferences: list[Row],
) -> None:
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    options = ("data.test_fraction=0", f"model={model}")
    first = cached(run_dpo("a", *options))
    assert len(first) == 1
    # another beta, another seed, another name of the same weights: nothing is computed again
    again = cached(run_dpo("b", "data.test_fraction=0", "dpo.beta=0.3", "seed=1"))
    assert again == first
    # nor for new adapters on them, which change nothing yet
    assert cached(run_dpo("l", "data.test_fraction=0", "lora.r=4", "seed=2")) == first
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.01
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    second = cached(run_dpo("c", *options))
    assert len(second - first) == 1
    edited = [{**preferences[0], "rejected": "bad moon"}, *preferences[1:]]
    path = write_rows("pairs2.jsonl", edited)
    third = cached(run_dpo("d", *options, f"data.train={path}"))
    assert len(third - second) == 1


def test_cache_is_read(
    run_dpo: RunDPO, read_jsonl: ReadJsonl, monkeypatch: pytest.MonkeyPatch
) -> None:
    forwards = 0
    original = Policy.forward

    def counting(self: Policy, *args: Any, **options: Any) -> Any:
        nonlocal forwards
        forwards += 1
        return original(self, *args, **options)

    monkeypatch.setattr(Policy, "forward", counting)
    options = ("data.test_fraction=0", "train.max_steps=1")
    folder = run_dpo("a", *options)
    computing, forwards = forwards, 0
    run_dpo("b", *options)
    assert (computing, forwards) == (2, 1)  # one microbatch each for reference and step
    # what lies in the file is what is used
    (path,) = (folder.parent / "reference_cache").iterdir()
    logprobs = load_file(path)["logprobs"]
    logprobs[0::2] += 10.0
    save_file({"logprobs": logprobs}, path)
    shifted = first_step(run_dpo("c", *options), read_jsonl)
    # -log sigmoid(.1 * -10) = log(1 + e) = 1.313262
    assert shifted["loss"] == pytest.approx(1.313262, abs=1e-4)


def test_a_damaged_cache_is_made_again(
    run_dpo: RunDPO, read_jsonl: ReadJsonl, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("data.test_fraction=0", "train.max_steps=1")
    folder = run_dpo("a", *options)
    (path,) = (folder.parent / "reference_cache").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    again = run_dpo("b", *options)
    assert first_step(again, read_jsonl)["loss"] == first_step(folder, read_jsonl)["loss"]
    assert "cannot be read" in capsys.readouterr().err
    assert path.read_bytes() == whole


def test_a_reference_that_is_cached_does_not_stay_in_memory(
    run_dpo: RunDPO, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, alive = [], []
    load, train = dpo.load_policy, dpo.train

    def loading(*args: Any, **options: Any) -> Policy:
        policy = load(*args, **options)
        loaded.append(weakref.ref(policy))
        return policy

    def training(*args: Any, **options: Any) -> Any:
        gc.collect()
        alive.extend(reference() is not None for reference in loaded)
        return train(*args, **options)

    monkeypatch.setattr(dpo, "load_policy", loading)
    monkeypatch.setattr(dpo, "train", training)
    run_dpo("a", f"dpo.reference_model={tiny}", "train.max_steps=1")
    assert alive == [True, False]  # the policy; the reference


# ---------------------------------------------------------------- losses and options


@pytest.mark.parametrize("loss_type", sorted(LOSSES))
def test_every_loss_takes_a_step(
    loss_type: str, run_dpo: RunDPO, read_jsonl: ReadJsonl, tiny: Path
) -> None:
    smoothing = 0.1 if loss_type in ("exo_pair", "robust") else 0.0
    folder = run_dpo(
        "run",
        f"dpo.loss_type={loss_type}",
        f"dpo.label_smoothing={smoothing}",
        "train.max_steps=2",
    )
    steps = [row for row in read_jsonl(folder / "metrics.jsonl") if "loss" in row]
    assert len(steps) == 2
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in steps)
    assert {"rewards_chosen", "rewards_rejected", "rewards_margin", "accuracy"} <= steps[0].keys()
    margin = steps[1]["rewards_chosen"] - steps[1]["rewards_rejected"]
    assert steps[1]["rewards_margin"] == pytest.approx(margin, abs=1e-5)
    reference_free = loss_type in ("simpo", "orpo")
    assert (folder.parent / "reference_cache").exists() != reference_free


@pytest.mark.parametrize(
    "options",
    [
        ["dpo.f_divergence=forward_kl"],
        ["dpo.f_divergence=js_divergence"],
        ["dpo.f_divergence=alpha_divergence", "dpo.f_alpha=0.3"],
        ["dpo.label_smoothing=0.2"],
    ],
)
def test_options_of_sigmoid_start_at_log_2_and_train(
    options: list[str], run_dpo: RunDPO, read_jsonl: ReadJsonl
) -> None:
    folder, plain = run_dpo("run", *options), run_dpo("plain")
    losses = [row["loss"] for row in read_jsonl(folder / "metrics.jsonl") if "loss" in row]
    assert losses[0] == pytest.approx(LOG2, abs=1e-5)
    want = [row["loss"] for row in read_jsonl(plain / "metrics.jsonl") if "loss" in row]
    assert losses[-1] != pytest.approx(want[-1], abs=1e-5)


def test_sft_term_and_wpo_weights(
    run_dpo: RunDPO, tiny: Path, preferences: list[Row], read_jsonl: ReadJsonl
) -> None:
    """Against transformers alone: log 2 + .5 * NLL per token, and log 2 weighted by WPO."""
    nll, weights = [], []
    for row in preferences:
        sides = {s: token_logprobs(tiny, row["prompt"], row[s]) for s in ("chosen", "rejected")}
        nll.append(-sides["chosen"][0].mean().item())
        gaps = [(logprobs - collision).mean().item() for logprobs, collision in sides.values()]
        weights.append(math.exp(sum(gaps)))
    options = ("data.test_fraction=0", "train.minibatch=30", "train.max_steps=1")
    found = first_step(run_dpo("sft", *options, "dpo.sft_coef=0.5"), read_jsonl)
    assert found["loss"] == pytest.approx(LOG2 + 0.5 * np.mean(nll), rel=1e-5)
    found = first_step(run_dpo("wpo", *options, "dpo.wpo_weights=true"), read_jsonl)
    assert found["loss"] == pytest.approx(LOG2 * np.mean(weights), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["dpo.loss_type=hinge", "dpo.label_smoothing=0.1"], "label_smoothing=0.1 means nothing"),
        (["dpo.loss_type=ipo", "dpo.label_smoothing=0.1"], "label_smoothing=0.1 means nothing"),
        (["dpo.loss_type=exo_pair"], "infinite at label_smoothing=0"),
        (["dpo.loss_type=ipo", "dpo.f_divergence=forward_kl"], "f_divergence='forward_kl' means"),
        (["dpo.loss_type=sigmod"], r"dpo.loss_type: got 'sigmod'; allowed are sigmoid"),
        (["dpo.reference=adapter_off"], "adapter_off needs `lora`"),
    ],
)
def test_meaningless_options_are_refused_before_anything_runs(
    options: list[str], match: str, run_dpo: RunDPO, tmp_path: Path
) -> None:
    with pytest.raises(AlignError, match=match):
        run_dpo("run", *options)
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("lora", ["lora=null", "lora.r=4"])
def test_learns_and_the_saved_model_is_the_trained_one(
    lora: str, run_dpo: RunDPO, read_jsonl: ReadJsonl, write_rows: Callable[..., Path]
) -> None:
    pairs = [
        {"prompt": "sun moon: ", "chosen": "cat good", "rejected": "bad tac"},
        {"prompt": "one sea: ", "chosen": "blue dog good", "rejected": "bad god"},
    ]
    folder = run_dpo(
        "run", lora, f"data.test={write_rows('test.jsonl', pairs)}", "train.max_steps=25"
    )
    found = json.loads((folder / "manifest.json").read_text())["held_out"]
    assert found["accuracy"] == 1.0
    assert found["rewards_margin"] > 0.5
    assert found["loss"] < 0.6
    want = [token_logprobs(folder / "model", p["prompt"], p["chosen"])[0].sum() for p in pairs]
    assert found["logprobs_chosen"] == pytest.approx(float(np.mean(want)), abs=1e-4)
    assert (folder / "model_adapter").exists() == (lora != "lora=null")


def test_microbatches_change_nothing(run_dpo: RunDPO, trust: Trust) -> None:
    options = ("optim.lr=0.3", "optim.eps=1", "train.minibatch=15", "train.max_steps=3")
    whole = run_dpo("whole", *options)
    cut = run_dpo("cut", *options, "train.tokens_per_microbatch=40")
    first, second = (load_file(f / "model" / "model.safetensors") for f in (whole, cut))
    apart = max(((t - second[n]).abs().max() / t.abs().max()).item() for n, t in first.items())
    trust.at_most("equivalences", "DPO: microbatches = one batch, weights, relative", apart, 1e-6)


@pytest.mark.parametrize(
    "options",
    [["dpo.reference=cached"], ["dpo.reference=online"], ["lora.r=4", "dpo.reference=adapter_off"]],
)
def test_resumed_run_is_the_whole_run(
    options: list[str],
    run_dpo: RunDPO,
    stop_at: Callable[..., Any],
    assert_same_weights: Callable[..., None],
) -> None:
    options = [*options, "train.save_every=2"]
    whole = run_dpo("whole", *options)
    with stop_at(loop.Trainer, "take_step", 4):
        run_dpo("cut", *options)
    assert_same_weights(whole / "model", run_dpo("cut", *options, "resume=auto") / "model")
