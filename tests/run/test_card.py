from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from align.config.keys import RewardRecipe, SFTRecipe
from align.run.card import model_card
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


HOSTILE = "a|b`c``d\n\n---\n# <script>alert(1)</script> [x](http://x) *b* ${y}: - \x1b[31m\u202e"


def test_names_are_text_in_markdown_and_in_yaml(manifest: dict[str, Any]) -> None:
    """A hostile name ends no cell, no code span, no fence and no front matter."""
    manifest["data"]["train"][0]["path"] = HOSTILE
    manifest["data"][HOSTILE] = [manifest["data"]["train"][0]]
    manifest["recipe"] |= {"model": HOSTILE, "data.columns": {HOSTILE: "```"}, "a: b\n```": 1}
    manifest |= {"command": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    manifest["held_out"] = {HOSTILE: 0.25}
    text = model_card("model", Path(f"runs/{HOSTILE.replace('/', '')}"), manifest)
    data = ModelCard(text).data
    assert (data.base_model, data.pipeline_tag) == (None, "text-generation")
    assert [r.metric_type for r in data.eval_results] == [HOSTILE]
    assert not {"\x1b", "\u202e"} & set(text)
    body = text.partition("\n---\n")[2]
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    inline = [part for token in tokens for part in token.children or []]
    assert not {"html_block", "hr"} & {token.type for token in tokens}
    assert not {"html_inline", "link_open", "em_open", "image"} & {part.type for part in inline}
    headings = [tokens[i + 1].content for i, t in enumerate(tokens) if t.type == "heading_open"]
    assert headings[1:] == ["Data", "Results", "Recipe", "How it was made"]
    shown = " ".join(HOSTILE.split()).replace("\x1b", r"\u001b").replace("\u202e", r"\u202e")
    assert sum(part.content == shown for part in inline) == 6  # model, command, paths, cells
    assert [t.type for t in tokens].count("td_open") == 3 * 4 + 2  # rows of data, and of results
    (recipe,) = [token for token in tokens if token.type == "fence"]
    values = yaml.safe_load(recipe.content)
    assert values["data.columns"] == {HOSTILE: "```"}
    assert values["a: b\n```"] == 1


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
