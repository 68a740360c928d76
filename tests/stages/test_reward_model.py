from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from align.config.keys import RewardRecipe
from align.config.sections import DataSource
from align.data.examples import load_examples
from align.evaluation.reward import evaluate_reward
from align.models import ScalarModel, load_scalar_model, load_tokenizer
from align.rewards import FunctionReward
from align.rewards.model import reward_model_loader
from align.stages import reward_model
from align.training import loop
from align.types import AlignError, TokenGroup

CPU = torch.device("cpu")
ReadJsonl = Callable[[Path], list[dict[str, Any]]]
Row = dict[str, Any]
RunRM = Callable[..., Path]


@pytest.fixture
def run_rm(
    tiny: Path,
    tmp_path: Path,
    make_recipe: Callable[..., RewardRecipe],
    write_rows: Callable[..., Path],
    preferences: list[Row],
    monkeypatch: pytest.MonkeyPatch,
) -> RunRM:
    """``run_rm("name", "key=value", ..., plot=True)``: five steps; the plot is half the time."""
    tree = {
        "model": str(tiny),
        "data": {"train": str(write_rows("pairs.jsonl", preferences)), "test_fraction": 0.2},
        "precision": "fp32",
        "train": {"max_steps": 5, "minibatch": 8},
        "optim": {"lr": 0.01},
    }

    def run(name: str, *overrides: str, plot: bool = False) -> Path:
        folder = tmp_path / name
        with monkeypatch.context() as patch:
            if not plot:
                patch.setattr(reward_model, "_plot_margins", lambda *_: None)
            reward_model.run(make_recipe(RewardRecipe, tree, f"output_dir={folder}", *overrides))
        return folder

    return run


def read_stats(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "model" / "reward_stats.json").read_text())


def plain_scores(model: Path, rows: Sequence[tuple[str, str]]) -> list[float]:
    """By transformers alone, right-padded, as anybody would score with the saved folder."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    plain = AutoModelForSequenceClassification.from_pretrained(model).eval()
    ids = [
        tokenizer(prompt)["input_ids"]
        + tokenizer(response + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        for prompt, response in rows
    ]
    with torch.no_grad():
        return plain(**tokenizer.pad({"input_ids": ids}, return_tensors="pt")).logits[:, 0].tolist()


Recorded = list[tuple[Sequence[TokenGroup], np.ndarray]]


@pytest.fixture
def training_scores(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """What the stage itself computed: first on training pairs, before the head was scaled."""
    recorded: Recorded = []
    original = reward_model.scores_of

    def spying(scalar: ScalarModel, groups: Sequence[TokenGroup], budget: int) -> np.ndarray:
        found = original(scalar, groups, budget)
        recorded.append((groups, found.copy()))
        return found

    monkeypatch.setattr(reward_model, "scores_of", spying)
    return recorded


@pytest.mark.parametrize("lora", ["lora=null", "lora.r=4"])
def test_one_response_has_one_score(
    lora: str, run_rm: RunRM, training_scores: Recorded, preferences: list[Row]
) -> None:
    """Training, the saved folder in plain transformers, and our reward source agree."""
    folder = run_rm("run", lora)
    by_id = {f"{Path(folder).parent}/pairs.jsonl:{i + 1}": row for i, row in enumerate(preferences)}
    stats = read_stats(folder)
    for (groups, scores), gain in zip(training_scores, (stats["gain"], 1.0), strict=True):
        rows = [
            (by_id[g.id]["prompt"], by_id[g.id][side])
            for g in groups
            for side in ("chosen", "rejected")
        ]
        want = plain_scores(folder / "model", rows)
        assert (scores * gain).tolist() == pytest.approx(want, abs=1e-5)
        source = reward_model_loader(
            CPU,
            precision="fp32",
            attention="auto",
            trust_remote_code=False,
            tokens_per_microbatch=64,
        )(str(folder / "model"))
        prompts, responses = zip(*rows, strict=True)
        assert source(prompts, responses, [()] * len(rows)) == pytest.approx(want, abs=1e-5)
        assert np.std(want) > 0.1


@pytest.mark.parametrize("lora", ["lora=null", "lora.r=4"])
def test_learns_what_is_preferred(run_rm: RunRM, lora: str, read_jsonl: ReadJsonl) -> None:
    folder = run_rm("run", lora, "train.max_steps=40", "train.minibatch=16")
    held_out = json.loads((folder / "manifest.json").read_text())["held_out"]
    assert held_out["accuracy"] == 1.0
    assert held_out["loss"] < 0.2
    assert held_out["margin"] > 1.5
    rows = read_jsonl(folder / "metrics.jsonl")
    assert {"loss", "accuracy", "margin", "score_mean", "grad_norm"} <= rows[1].keys()
    assert rows[0]["eval_loss"] > 0.3
    rows = [("sun moon: ", "cat good"), ("sun moon: ", "bad tac")]
    good, bad = plain_scores(folder / "model", rows)
    assert good > bad + 0.5


def test_scores_are_normalised(
    run_rm: RunRM, training_scores: Recorded, read_jsonl: ReadJsonl
) -> None:
    folder = run_rm("run", plot=True)
    stats = read_stats(folder)
    raw = training_scores[0][1]
    assert stats["gain"] == pytest.approx(1 / raw.std())
    assert stats["std"] == pytest.approx(1.0)
    assert stats["mean"] == pytest.approx(raw.mean() / raw.std())
    assert stats["scores"] == len(raw) == 2 * len(training_scores[0][0])
    histogram = stats["held_out_margins"]
    assert sum(histogram["counts"]) == len(training_scores[1][0])
    assert (folder / "margins.png").stat().st_size > 1000
    # and not where it is not wanted
    plain = read_stats(run_rm("plain", "reward_model.normalize=false"))
    assert plain["gain"] == 1.0
    assert plain["std"] == pytest.approx(raw.std(), rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "use_margin", "center_coef"),
    [
        ([], False, 0.0),
        (["reward_model.use_margin=true"], True, 0.0),
        (["reward_model.center_coef=0.1"], False, 0.1),
    ],
)
@pytest.mark.parametrize("budget", [4096, 40])
def test_first_loss_is_bradley_terrys(
    overrides: list[str],
    use_margin: bool,
    center_coef: float,
    budget: int,
    run_rm: RunRM,
    tiny: Path,
    tmp_path: Path,
    preferences: list[Row],
    read_jsonl: ReadJsonl,
) -> None:
    """From a model with a head of its own, so that plain transformers can say what is right."""
    torch.manual_seed(3)
    scalar = load_scalar_model(str(tiny), device=CPU, precision="fp32")
    scalar.save(tmp_path / "start", load_tokenizer(str(tiny)))
    chosen = plain_scores(tmp_path / "start", [(r["prompt"], r["chosen"]) for r in preferences])
    rejected = plain_scores(tmp_path / "start", [(r["prompt"], r["rejected"]) for r in preferences])
    losses = []
    for c, r, row in zip(chosen, rejected, preferences, strict=True):
        gap = c - r - (row["margin"] if use_margin else 0.0)
        losses.append(math.log1p(math.exp(-gap)) + center_coef * (c + r) ** 2)
    folder = run_rm(
        "run",
        f"model={tmp_path / 'start'}",
        "data.test_fraction=0",
        "train.minibatch=30",
        "train.max_steps=1",
        f"train.tokens_per_microbatch={budget}",
        *overrides,
    )
    first = next(row for row in read_jsonl(folder / "metrics.jsonl") if "loss" in row)
    assert first["step"] == 1
    assert first["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    right = np.mean([c > r for c, r in zip(chosen, rejected, strict=True)])
    assert first["accuracy"] == pytest.approx(right)
    assert first["margin"] == pytest.approx(np.mean(chosen) - np.mean(rejected), abs=1e-5)
    assert first["score_mean"] == pytest.approx((np.mean(chosen) + np.mean(rejected)) / 2, abs=1e-5)


def test_equal_scores_are_half_right_and_accuracy_has_an_interval(
    tiny: Path, run_rm: RunRM, tmp_path: Path, read_jsonl: ReadJsonl
) -> None:
    """A head of zeros scores everything alike: a coin, not wrong each time."""
    start = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1)
    torch.nn.init.zeros_(start.score.weight)
    start.save_pretrained(tmp_path / "start")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "start")
    folder = run_rm("run", f"model={tmp_path / 'start'}")
    before, *_, after = (r for r in read_jsonl(folder / "metrics.jsonl") if "eval_accuracy" in r)
    assert before["eval_accuracy"] == 0.5
    low, high = read_stats(folder)["held_out_accuracy_ci95"]
    assert 0 <= low <= after["eval_accuracy"] <= high <= 1
    assert high - low > 0.1
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["held_out_accuracy_ci95"] == [low, high]
    assert [found["kind"] for found in manifest["doctor"]].count("reward_model_weak") == 1


def test_longer_answers_are_the_baseline(
    tiny: Path, run_rm: RunRM, write_rows: Callable[..., Path]
) -> None:
    """By characters, as `align eval` counts them: longer wins twice, loses once, ties once."""
    rows = [
        {"prompt": "red: ", "chosen": "good sun moon", "rejected": "bad"},
        {"prompt": "blue: ", "chosen": "good", "rejected": "bad sun moon"},
        {"prompt": "green: ", "chosen": "good", "rejected": "zqxj"},
        {"prompt": "sun: ", "chosen": "sun moon", "rejected": "zqxjk"},
    ]
    tokens = load_tokenizer(str(tiny)).tokenize
    # tokens would say that the last two answers lose
    assert all(len(tokens(r["chosen"])) < len(tokens(r["rejected"])) for r in rows[2:])
    held_out_rows = write_rows("test.jsonl", rows)
    folder = run_rm("run", f"data.test={held_out_rows}")
    held_out = json.loads((folder / "manifest.json").read_text())["held_out"]
    assert held_out["accuracy_of_longer"] == (1 + 0 + 0.5 + 1) / 4
    pairs = load_examples([DataSource(path=str(held_out_rows))], kind="preference").examples
    zero = FunctionReward("zero", lambda responses: [0.0] * len(responses))
    judged = evaluate_reward(zero, pairs)
    assert judged["longer_wins"] == held_out["accuracy_of_longer"]


def test_microbatches_change_nothing(run_rm: RunRM) -> None:
    options = ("optim.lr=0.5", "optim.eps=1", "train.minibatch=15", "reward_model.use_margin=true")
    whole, cut = (
        run_rm("whole", *options),
        run_rm("cut", *options, "train.tokens_per_microbatch=40"),
    )
    rows = [("sun moon: ", "cat good"), ("sun moon: ", "bad tac")]
    assert plain_scores(whole / "model", rows) == pytest.approx(
        plain_scores(cut / "model", rows), abs=2e-5
    )


@pytest.mark.parametrize("lora", ["lora=null", "lora.r=4"])
def test_resumed_run_is_the_whole_run(
    lora: str, run_rm: RunRM, stop_at: Callable[..., Any], assert_same_weights: Callable[..., None]
) -> None:
    """The new head included, which is drawn at random."""
    options = ("train.save_every=2", lora)
    whole = run_rm("whole", *options)
    with stop_at(loop.Trainer, "take_step", 5):
        run_rm("cut", *options)
    resumed = run_rm("cut", *options, "resume=auto")
    assert_same_weights(whole / "model", resumed / "model")
    assert read_stats(whole) == read_stats(resumed)


def test_no_held_out_pairs(run_rm: RunRM) -> None:
    folder = run_rm("run", "data.test_fraction=0")
    assert "held_out_margins" not in read_stats(folder)
    assert json.loads((folder / "manifest.json").read_text())["held_out"] == {}


def test_a_pooling_layer_is_trained_saved_and_read(run_rm: RunRM, preferences: list[Row]) -> None:
    plain, pooled = run_rm("plain"), run_rm("pooled", "reward_model.pooling_layer=true")
    layers = [
        json.loads((folder / "model" / "config.json").read_text())["num_hidden_layers"]
        for folder in (plain, pooled)
    ]
    assert layers == [2, 3]
    row = (preferences[0]["prompt"], preferences[0]["chosen"])
    loader = reward_model_loader(
        CPU, precision="fp32", attention="auto", trust_remote_code=False, tokens_per_microbatch=512
    )
    found = loader(str(pooled / "model"))([row[0]], [row[1]], [()])
    assert found[0] == pytest.approx(plain_scores(pooled / "model", [row])[0], abs=1e-4)


def test_a_pooling_layer_needs_a_new_head(run_rm: RunRM) -> None:
    first = run_rm("first")
    with pytest.raises(AlignError, match=r"pooling_layer: .* is a reward model already"):
        run_rm("second", f"model={first / 'model'}", "reward_model.pooling_layer=true")
