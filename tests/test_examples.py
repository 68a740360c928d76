"""Every script in examples/ runs as it is, and says what it promises."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SAYS = {
    "dpo": "held-out accuracy 0.",
    "evaluate": "chrF of the greedy answers ",
    "ppo": "iteration 2: score ",
    "reward_model": "score of one answer ",
    "sft": "held-out perplexity ",
}


def test_every_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == SAYS.keys()


@pytest.mark.parametrize("name", SAYS)
def test_example(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = str(EXAMPLES / f"{name}.py")
    monkeypatch.setattr(sys, "argv", [script, str(tmp_path / name)])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(script, run_name="__main__")
    assert SAYS[name] in capsys.readouterr().out
    assert (tmp_path / name).is_dir()


def test_the_page_about_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = EXAMPLES.parent
    (block,) = re.findall(
        r"```python\n(.*?)```", (root / "docs/python.md").read_text("utf-8"), re.S
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(root / "models")
    exec(block, {})
    assert (tmp_path / "runs/python/model/config.json").is_file()
