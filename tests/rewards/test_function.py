from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from align.rewards import FunctionReward, build_reward, load_function
from align.types import AlignError, RewardTerm

PROMPTS, RESPONSES, REFERENCES = ["p", "q"], ["a", "bb"], [(), ()]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory; what is imported from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def write_module(folder: Path, body: str, name: str = "my_rewards") -> None:
    (folder / f"{name}.py").write_text(body)


def score_with(body: str, folder: Path) -> list[float]:
    write_module(folder, f"import math\n\ndef f(prompts, responses, references):\n    {body}\n")
    return load_function("my_rewards:f")(PROMPTS, RESPONSES, REFERENCES)


def test_function_in_the_working_directory(folder: Path) -> None:
    assert score_with("return [len(r) / 2 for r in responses]", folder) == [0.5, 1.0]


def test_a_module_is_named_without_py() -> None:
    with pytest.raises(AlignError, match=r"named without .py: my.rewards:brevity"):
        load_function("my/rewards.py:brevity")


def test_function_in_a_package(folder: Path) -> None:
    (folder / "pack").mkdir()
    (folder / "pack" / "mod.py").write_text("def f(p, r, refs):\n    return [1, 2]\n")
    source = load_function("pack.mod:f")
    assert source.name == "pack.mod:f"
    assert source(PROMPTS, RESPONSES, REFERENCES) == [1.0, 2.0]


@pytest.mark.parametrize(
    "scores", [np.array([1.0, 2.0], dtype=np.float32), torch.tensor([1.0, 2.0]), (1, 2.0)]
)
def test_arrays_and_tensors_are_scores(scores: object) -> None:
    got = FunctionReward("f", lambda *_: scores)(PROMPTS, RESPONSES, REFERENCES)
    assert got == [1.0, 2.0]
    assert all(type(score) is float for score in got)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1.0]", "returned 1 scores for 2 responses"),
        ("return [1.0] * 3", "returned 3 scores for 2 responses"),
        ("return [1.0, math.nan]", "score of response 1 is nan"),
        ("return [math.inf, 1.0]", "score of response 0 is inf"),
        ("return [1.0, '2']", "score of response 1 is '2'"),
        ("return [1.0, None]", "score of response 1 is None"),
        ("return [[1.0], [2.0]]", r"score of response 0 is \[1.0\]"),
        ("return None", "returned NoneType, must return a list of 2 floats"),
        ("return 'ab'", "returned str"),
        ("return 1.0", "returned float"),
        ("return 1 / 0", "raised ZeroDivisionError: division by zero"),
        ("raise ValueError('two\\nlines')", "raised ValueError: two lines"),
    ],
)
def test_bad_answers_are_one_line(body: str, message: str, folder: Path) -> None:
    with pytest.raises(AlignError, match=message) as caught:
        score_with(body, folder)
    assert "\n" not in str(caught.value)
    assert "my_rewards:f" in str(caught.value)


@pytest.mark.parametrize("name", ["my_rewards", "my_rewards:", ":f", "", "my_rewards.f"])
def test_name_must_be_module_and_function(name: str) -> None:
    with pytest.raises(AlignError, match="must be module:function"):
        load_function(name)


@pytest.mark.parametrize("name", ["nowhere:f", "nowhere.inner:f"])
def test_missing_module(name: str, folder: Path) -> None:
    with pytest.raises(AlignError, match=f"no module 'nowhere' in {folder}"):
        load_function(name)


def test_missing_function_lists_those_there(folder: Path) -> None:
    write_module(folder, "from math import sqrt\n\ndef brevity(p, r, refs): ...\n\nlimit = 3\n")
    with pytest.raises(AlignError, match=r"no function 'brevty'; it has brevity$"):
        load_function("my_rewards:brevty")
    with pytest.raises(AlignError, match="no function 'limit'"):
        load_function("my_rewards:limit")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("import not_installed_here", "importing my_rewards raised ModuleNotFoundError.*not_inst"),
        ("def f(:", "importing my_rewards raised SyntaxError"),
        ("1 / 0", "importing my_rewards raised ZeroDivisionError"),
    ],
)
def test_module_that_does_not_import(body: str, message: str, folder: Path) -> None:
    write_module(folder, body)
    with pytest.raises(AlignError, match=message):
        load_function("my_rewards:f")


@pytest.mark.parametrize(
    "arguments",
    ["prompt", "prompts, responses", "a, b, c, d", "prompts, *, responses, references", ""],
)
def test_a_function_that_cannot_take_what_it_is_given(arguments: str, folder: Path) -> None:
    write_module(folder, f"def f({arguments}):\n    raise SystemExit('it was called')\n")
    with pytest.raises(AlignError) as caught:
        build_reward([RewardTerm(function="my_rewards:f")], load_model=pytest.fail)
    assert str(caught.value).startswith(f"reward.function='my_rewards:f': takes ({arguments}), ")
    assert str(caught.value).endswith("write `def f(prompts, responses, references):`")


@pytest.mark.parametrize("arguments", ["a, b, c", "*all", "a, b, c, d=1", "a, b, *rest"])
def test_names_and_further_defaults_are_the_functions_own(arguments: str, folder: Path) -> None:
    write_module(folder, f"def f({arguments}):\n    return [0.0]\n")
    reward = build_reward([RewardTerm(function="my_rewards:f")], load_model=pytest.fail)
    assert reward(["p"], ["r"], [()]) == [0.0]
