"""Run folders as the stages leave them, made without training anything."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align.run.files import claim

NASTY = "<script>alert('out')</script> & \"quoted\" {{ 7 * 7 }} \u2028 end"


def write_run(
    folder: Path, stage: str, *, metrics: list[dict[str, Any]] = (), **facts: Any
) -> Path:
    folder.mkdir(parents=True)
    data = {
        "train": [{"path": "data/kjv.jsonl", "sha256": "ab" * 32, "rows_read": 9, "rows_kept": 8}]
    }
    manifest = {"stage": stage, "status": "done", "seed": 0, "seconds": 71.5, "data": data, **facts}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    if manifest["status"] == "running":
        claim(folder)
    (folder / "config.yaml").write_text(
        facts.get("config", f"model: models/tiny\noutput_dir: {folder}\n")
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    return folder


def evaluation(names: list[str], num_prompts: int) -> dict[str, Any]:
    """eval.json in which PPO gains by being longer, and its gold reward falls."""
    models = []
    for number, name in enumerate(names):
        models.append(
            {
                "name": name,
                "model": f"runs/tiny/{name}/model",
                "bleu": 40.0 + number,
                "bleu_ci95": [38.0 + number, 42.0 + number],
                "bleu_signature": "nrefs:1|tok:13a",
                "reward_mean": 0.1 * number,
                "reward_ci95": [0.1 * number - 0.05, 0.1 * number + 0.05],
                "sample_reward_mean": 0.1 * number,
                "sample_reward_ci95": [0.1 * number - 0.05, 0.1 * number + 0.05],
                "sample_gold_mean": 1.0 - 0.1 * (number - 1) ** 2,
                "sample_gold_ci95": None,
                "kl": 0.8 * number,
                "kl_per_token": 0.03 * number,
                "length_mean": 20.0 + 4 * number,
                "eos_rate": 0.98,
            }
        )
    tests = [
        {
            "a": "ppo",
            "b": "sft",
            "metric": "reward",
            "difference": 0.2,
            "p": 0.001,
            "ci95": [0.1, 0.3],
            "verdict": "better, p = .001",
            "at_equal_length": {"difference": 0.02, "ci95": [-0.1, 0.14], "per_100_characters": 1},
        },
        {
            "a": "ppo",
            "b": "sft",
            "metric": "gold",
            "difference": -0.3,
            "p": 0.002,
            "ci95": [-0.5, -0.1],
            "verdict": "worse, p = .002",
        },
    ]
    return {
        "models": models,
        "pooled": [],
        "comparisons": tests,
        "win_rates": [],
        "copy_baseline": {"bleu": 41.0, "bleu_signature": "nrefs:1|tok:13a"},
        "best_of_n": [
            {"n": n, "kl": math.log(n) - (n - 1) / n, "reward": 0.1 * n, "gold": 0.9 + 0.02 * n}
            for n in range(1, 5)
        ],
        "gold_agreement": None,
        "reward_model": {
            "reward": "model:runs/tiny/rm/model",
            "pairs": 80,
            "accuracy": 0.6,
            "accuracy_ci95": [0.49, 0.7],
            "longer_wins": 0.64,
            "length_correlation": 0.4,
            "by_source": {
                "pairs.jsonl": {"pairs": 80, "accuracy": 0.6, "accuracy_ci95": [0.49, 0.7]}
            },
            "by_margin": None,
            "accuracy_longer_chosen": 0.8,
            "accuracy_shorter_chosen": 0.3,
            "ece": 0.12,
            "temperature": 2.1,
            "ece_at_temperature": 0.04,
            "reliability": [
                {"confidence": 0.55, "right": 0.5, "pairs": 30},
                {"confidence": 0.75, "right": 0.6, "pairs": 50},
            ],
            "broken": {"repeated": {"score_change": 0.4, "preferred": 0.7, "responses": 80}},
            "gaps": [random.Random(i).gauss(0.3, 1) for i in range(80)],
        },
    }


def write_suite(root: Path) -> Path:
    """A folder with a run of every stage and an evaluation whose outputs try to break the page."""
    sft = [{"step": s, "seconds": s, "loss": 3 / s, "lr": 1e-3} for s in range(1, 40)]
    write_run(root / "sft", "sft", metrics=[*sft, {"step": 39, "eval_loss": 1.5}])
    ppo = [
        {"step": s, "seconds": s, "score_mean": 0.1 * s, "kl": 0.2 * s, "explained_variance": 0.5}
        for s in range(1, 12)
    ]
    held_out = [{"step": s, "eval_score": 0.1 * s, "eval_kl": 0.2 * s} for s in (0, 11)]
    folder = write_run(root / "ppo", "ppo", metrics=[*ppo, *held_out], held_out={"score": 0.5})
    samples = [
        {"iteration": 11, "prompt": f"p{i}", "response": NASTY, "score": i / 8} for i in range(8)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in samples))
    names = ["sft", "dpo", "ppo", "best-of-4"]
    folder = write_run(
        root / "eval",
        "eval",
        prompts=200,
        config="models: {sft: runs/tiny/sft/model}\nreference_model: runs/tiny/sft/model\n",
    )
    (folder / "eval.json").write_text(json.dumps(evaluation(names, 200)))
    (folder / "outputs").mkdir()
    rng = random.Random(0)
    for name in names:
        rows = [
            {
                "id": f"test.jsonl:{i}",
                "prompt": f"Rewrite verse {i}: <b>And</b> it came to pass",
                "response": NASTY if i == 3 else f"and it happened {name} number{i}",
                "references": ["and it happened so"],
                "reward": rng.random(),
                "finished": True,
            }
            for i in range(200)
        ]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / "outputs" / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return root


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    return write_suite(tmp_path / "runs" / "tiny")


@pytest.fixture(scope="session")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the suite, which tests read only: its figures take most of a second."""
    from align.report.page import write_report

    folder = tmp_path_factory.mktemp("report")
    suite = write_suite(folder / "runs" / "tiny")
    return write_report([str(suite)], str(folder / "report.html"))


WriteRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> WriteRun:
    return lambda name, stage, **facts: write_run(tmp_path / name, stage, **facts)
