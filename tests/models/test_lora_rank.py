"""A rank above the model's width is no low rank: refused before anything is trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from align.commands.check import check
from align.config.keys import SFTRecipe
from align.config.sections import DataConfig, DataSource, LoraOptions
from align.models.lora import add_lora
from align.types import AlignError


def test_a_rank_above_the_width_is_refused(tiny: Path, tmp_path: Path) -> None:
    """By the run, and by `align check`, which loads no weights."""
    model = AutoModelForCausalLM.from_pretrained(tiny)
    width = model.config.hidden_size
    with pytest.raises(AlignError, match=rf"lora.r: got {width + 1}, above the model's width of"):
        add_lora(model, task="causal_lm", options=LoraOptions(r=width + 1))
    data = tmp_path / "d.jsonl"
    data.write_text('{"text": "one two"}\n' * 40)
    recipe = SFTRecipe(
        model=str(tiny),
        output_dir=str(tmp_path / "o"),
        data=DataConfig(train=(DataSource(path=str(data)),)),
        lora=LoraOptions(r=width + 1),
    )
    with pytest.raises(AlignError, match=r"lora.r: got"):
        list(check("sft", recipe))
    assert list(check("sft", replace(recipe, lora=LoraOptions(r=width))))
