"""The worked examples of docs/extending.md: applied as diffs to a copy of the package, and used."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "extending.md"
# section -> files of code at most, by the design: what is left is a test and documents
MOST = {
    "A loss with an option": 2,
    "An estimator of advantages": 1,
    "A format of preference data": 1,
    "A metric": 1,
    "A doctor rule": 1,
    "A stage": 3,
    "A recipe key": 2,
}


def diffs(section: str) -> list[tuple[str, str]]:
    """(file, hunks) of every diff in a section of the page."""
    text = PAGE.read_text("utf-8").partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"```diff\n--- (\S+)\n(.*?)```", text, re.S)
    assert blocks, section
    return blocks


def applied(text: str, hunks: str) -> str:
    """A file's text with every hunk in it; what a hunk stands beside has to be there, once."""
    for hunk in hunks.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in " -")
        new = "".join(line[1:] for line in lines if line[0] in " +")
        if old:
            assert text.count(old) == 1, f"docs/extending.md: {text.count(old)} times there:\n{old}"
        text = text.replace(old, new) if old else text + new
    return text


USE = """
import json
import torch
from align.cli import main
from align.config.keys import DPORecipe
from align.config.load import load_recipe
from align.data import DataSource, load_examples
from align.evaluation.columns import columns
from align.evaluation.metrics import METRICS
from align.losses import dpo_loss
from align.losses.advantages import ESTIMATORS, Rewarded
from align.run.doctor import diagnose
from align.stages.dpo_options import check_options
from align.types import AlignError

# c - r = 3, beta .1: relu(2 - .3) = 1.7
nats = [torch.tensor([x]) for x in (-10.0, -14.0, -11.0, -12.0)]
assert abs(dpo_loss(*nats, beta=0.1, loss_type="capped", cap=2.0).per_example.item() - 1.7) < 1e-6
tree = {"model": "m", "output_dir": "o", "data": "rows.jsonl"}
check_options(load_recipe(DPORecipe, {**tree, "dpo": {"loss_type": "capped", "cap": 2.0}}))
try:
    check_options(load_recipe(DPORecipe, {**tree, "dpo": {"cap": 2.0}}))
    raise SystemExit("cap is not refused")
except AlignError as error:
    assert "dpo.cap: has an effect with loss_type=capped only" in str(error), error

# returns 1 and 5 of one prompt: -4 and 4 on every token
rewards, mask = torch.tensor([[1.0, 0.0], [2.0, 3.0]]), torch.ones(2, 2, dtype=torch.bool)
found, _ = ESTIMATORS["leave_one_out"].function(Rewarded(rewards, rewards, mask, 1.0, 1.0, 2))
assert found.tolist() == [[-4.0, -4.0], [4.0, 4.0]]

(pair,) = load_examples([DataSource(path="debates.jsonl")], kind="preference").examples
assert (pair.prompt, pair.chosen, pair.rejected) == ("q", "w", "l")

assert METRICS["questions"].answers(["what? why?", "no"]) == [2.0, 0.0]
assert columns([{"questions": 1.0}]) == {"questions": "questions"}

slow = [{"step": n, "tokens_per_second": 2.0} for n in range(20)]
assert [f.kind for f in diagnose("sft", slow, {"status": "done"})] == ["too_slow"]

assert main(["count", "count.json", "data=sft.jsonl"]) == 0
assert json.load(open("counted/manifest.json"))["num_rows"] == 3
assert main(["check", "count.json", "--stage", "generate"]) == 2

from align.config.keys import GenerateRecipe
assert load_recipe(GenerateRecipe, {**tree, "remark": "first"}).remark == "first"
print("all used")
"""


def test_every_example_is_applied_and_used(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "align", copy / "align", ignore=shutil.ignore_patterns("__pycache__"))
    for section in MOST:
        for file, hunks in diffs(section):
            path = copy / file
            path.write_text(applied(path.read_text() if path.exists() else "", hunks))
    rows = {
        "debates.jsonl": [{"question": "q", "winner": "w", "loser": "l"}],
        "sft.jsonl": [{"prompt": f"{n}", "completion": "c"} for n in range(3)],
    }
    for name, values in rows.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in values))
    (tmp_path / "count.json").write_text(json.dumps({"output_dir": "counted"}))
    done = subprocess.run(
        [sys.executable, "-c", USE],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("all used\n")


@pytest.mark.parametrize("section", MOST)
def test_no_example_touches_more_files_than_the_design_says(section: str) -> None:
    assert len({file for file, _ in diffs(section)}) <= MOST[section]


def test_the_table_says_how_many_files() -> None:
    told = re.findall(r"^\| an? .*? \| (\d) files? \|", PAGE.read_text("utf-8"), re.M)
    assert [int(count) for count in told] == list(MOST.values())


def test_a_hunk_that_stands_nowhere_is_noticed() -> None:
    assert applied("a\nb\n", " a\n+c\n") == "a\nc\nb\n"
    for text in ("b\n", "a\na\n"):
        with pytest.raises(AssertionError):
            applied(text, " a\n+c\n")
