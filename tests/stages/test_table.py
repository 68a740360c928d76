"""The table of stages says of each stage what is so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align.run.files import OURS
from align.stages import STAGES, run_stage


@pytest.mark.parametrize("name", STAGES)
def test_a_row_is_of_its_stage(name: str) -> None:
    stage = STAGES[name]
    assert stage.name == name
    assert set(stage.writes) <= set(OURS)  # else overwrite=true would leave it
    with pytest.raises(AttributeError):  # it takes its own recipe, and imports its own module
        stage.run(object())


def test_a_run_writes_what_the_table_says(
    tiny: Path,
    tmp_path: Path,
    make_recipe: Callable[..., Any],
    write_rows: Callable[..., Path],
    demonstrations: list[dict[str, str]],
) -> None:
    stage, folder = STAGES["sft"], tmp_path / "run"
    tree = {
        "model": str(tiny),
        "output_dir": str(folder),
        "data": str(write_rows("d.jsonl", demonstrations)),
        "train": {"max_steps": 1},
        "precision": "fp32",
    }
    run_stage(stage, make_recipe(stage.recipe, tree))
    assert set(stage.writes) <= {path.name for path in folder.iterdir()}
    assert json.loads((folder / "manifest.json").read_text())["stage"] == stage.name
