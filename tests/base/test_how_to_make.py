from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from align.base.how_to_make import RESULTS, SHIPPED, SUITES, TARGETS, how_to_make
from align.cli import main
from align.config.load import shipped_recipes

CLONE = Path(__file__).parents[2]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def in_clone(elsewhere: Path) -> Path:
    (elsewhere / "Makefile").touch()
    (elsewhere / "recipes").mkdir()
    return elsewhere


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line
    return line


@pytest.mark.parametrize(
    ("path", "maker"),
    [
        ("models/smollm2-135m-instruct", "`make smollm2` makes it"),
        ("runs/tiny/base_init/exchanged.jsonl", "`make base` makes it"),
        ("runs/sentiment/data/sft_train.jsonl", "`make sentiment-data` makes it"),
        ("runs/tiny/sft/model", "`make sft` makes it"),
        ("runs/smollm2/pairs/pairs.jsonl", "`make pairs SUITE=smollm2` makes it"),
        ("runs/gpu/rm/model", "`align rm gpu/rm` makes it"),
        ("models/tiny", None),  # a clone has it
        ("runs/mine/sft/model", None),
        ("runs/tiny/sft/modle", None),
        ("sft/model", None),
    ],
)
def test_in_a_clone(in_clone: Path, path: str, maker: str | None) -> None:
    assert how_to_make(path) == maker


def test_elsewhere(elsewhere: Path) -> None:
    assert (
        how_to_make("models/smollm2-135m-instruct") == "`make smollm2` in a clone of align makes it"
    )
    assert how_to_make("runs/tiny/pairs/pairs.jsonl") == "`align generate tiny/pairs` makes it"
    assert "run the command in the clone's folder" in str(how_to_make("data/kjv_web/sft.jsonl"))


def test_a_misspelt_name_beside_what_is_there_is_not_made(in_clone: Path) -> None:
    (in_clone / "runs/sentiment/data").mkdir(parents=True)
    assert how_to_make("runs/sentiment/data/sft_trian.jsonl") is None


@pytest.mark.parametrize("target", sorted({*TARGETS.values(), "sft", "pairs", "rm", "ppo", "dpo"}))
def test_the_makefile_has_the_target(target: str) -> None:
    for suite in ("tiny", "smollm2"):
        told = subprocess.run(
            ["make", "-n", target, f"SUITE={suite}"], cwd=CLONE, capture_output=True, text=True
        )
        assert told.returncode == 0, told.stderr


def test_shipped_folders_are_there() -> None:
    assert all((CLONE / folder).is_dir() for folder in SHIPPED)


def test_every_path_of_a_shipped_recipe_is_made_or_shipped(elsewhere: Path) -> None:
    paths = {
        word
        for file in shipped_recipes().values()
        for word in words(yaml.safe_load(file.read_text(encoding="utf-8")))
        if re.match(r"(runs|models|data)/\w+/", f"{word}/")
    }
    assert len(paths) > 20
    assert [path for path in sorted(paths) if how_to_make(path) is None] == []
    commands = {f"{s}/{result.split('/')[0]}" for s in SUITES for result in RESULTS}
    assert {"tiny/sft", "gpu/rm", "smollm2/pairs"} <= commands & set(shipped_recipes())


def words(value: object, key: str = "") -> list[str]:
    if isinstance(value, dict):
        return [w for k, v in value.items() if k != "output_dir" for w in words(v, str(k))]
    if isinstance(value, list):
        return [w for v in value for w in words(v, key)]
    return [value] if isinstance(value, str) else []


@pytest.mark.parametrize("command", ["sft", "check"])
def test_a_model_that_is_missing(
    in_clone: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    (in_clone / "rows.jsonl").write_text('{"text": "one"}\n')
    line = refused(capsys, command, "smollm2/sft", "data=rows.jsonl")
    assert "models/smollm2-135m-instruct: no such folder; `make smollm2` makes it" in line
    assert "or give another model: a folder, a hub id" in line


def test_a_model_that_nothing_makes(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (elsewhere / "rows.jsonl").write_text('{"text": "one"}\n')
    line = refused(capsys, "sft", "tiny/sft", "data=rows.jsonl", "model=runs/nope/x/y")
    assert line.endswith("give another model: a folder, a hub id (org/name) or a .gguf")


def test_data_of_a_shipped_recipe_elsewhere(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, "sft", "tiny/sft")
    assert "data/kjv_web/sft.jsonl: no such file or folder; it comes with a clone of align" in line
    assert line.endswith("or give data of your own")
