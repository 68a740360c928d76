from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from align.config import RewardRecipe, SFTRecipe
from align.model_card import model_card
from align.stages import reward_model, sft


@pytest.fixture
def manifest() -> dict[str, Any]:
    report = {"path": "data/a.jsonl", "sha256": "ab" * 32, "rows_read": 10, "rows_kept": 9}
    hub = {"path": "org/set/train", "sha256": None, "rows_read": 5, "rows_kept": 5}
    return {
        "stage": "dpo",
        "seed": 3,
        "command": "align dpo tiny/dpo",
        "seconds": 12.0,
        "versions": {"torch": "2.9"},
        "recipe": {"model": "org/base", "dpo.beta": 0.1, "data.columns": {}},
        "data": {"train": [report, hub], "test": []},
        "held_out": {"accuracy": 0.75, "loss": 0.5},
    }


def test_the_hub_reads_it(manifest: dict[str, Any]) -> None:
    text = model_card("model", Path("runs/tiny/dpo"), manifest)
    data = ModelCard(text).data
    assert data.base_model == "org/base"
    assert data.datasets == ["org/set"]
    assert data.pipeline_tag == "text-generation"
    assert {"align", "dpo"} <= set(data.tags)
    assert {r.metric_type: r.metric_value for r in data.eval_results} == {
        "accuracy": 0.75,
        "loss": 0.5,
    }
    assert "| train | `data/a.jsonl` | 9 of 10 | `abababababababab` |" in text
    assert "dpo.beta: 0.1" in text
    assert "`align dpo tiny/dpo`, seed 3" in text


def test_a_folder_is_no_hub_id(manifest: dict[str, Any], tmp_path: Path) -> None:
    manifest["recipe"]["model"] = "/models/base"
    assert ModelCard(model_card("model", tmp_path, manifest)).data.base_model is None


def test_a_critic_claims_no_results(manifest: dict[str, Any]) -> None:
    data = ModelCard(model_card("critic", Path("runs/x"), manifest)).data
    assert data.pipeline_tag == "text-classification"
    assert data.eval_results is None


def test_every_stage_writes_one(
    tiny: Path,
    tmp_path: Path,
    make_recipe: Callable[..., Any],
    write_rows: Callable[..., Path],
    demonstrations: list[dict[str, str]],
    preferences: list[dict[str, Any]],
) -> None:
    tree = {
        "model": str(tiny),
        "output_dir": str(tmp_path / "run"),
        "data": {"train": str(write_rows("d.jsonl", demonstrations)), "test_fraction": 0.3},
        "train": {"max_steps": 1},
        "precision": "fp32",
    }
    sft.run(make_recipe(SFTRecipe, tree))
    card = ModelCard.load(tmp_path / "run" / "model" / "README.md")
    assert {r.metric_type for r in card.data.eval_results} == {"loss", "perplexity"}
    tree["data"]["train"] = str(write_rows("p.jsonl", preferences))
    reward_model.run(make_recipe(RewardRecipe, tree, "overwrite=true", "lora.r=2"))
    for name in ("model", "model_adapter"):
        card = ModelCard.load(tmp_path / "run" / name / "README.md")
        assert card.data.pipeline_tag == "text-classification"
