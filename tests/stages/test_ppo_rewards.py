"""A user's reward function, good or bad, in every stage that calls one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align.cli import main
from align.stages.ppo import run as ppo
from align.types import AlignError

RunPPO = Callable[..., Path]

FUNCTIONS = """
import torch
def positional(p, r, refs): return [0.0] * len(r)
def trl(completions, **kwargs): return [0.0] * len(completions)
def swapped(references, responses, prompts):
    responses[:], prompts[:] = sorted(responses), []
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    return [torch.tensor(float("moon" in r)) for r in sorted(responses)]
def worth_of(worth): return worth
def worth_or_9(worth=9): return [9.0 if w is None else w for w in worth]
def constant(responses): return [2.0 for _ in responses]
def exits(responses):
    import os
    os._exit(0)
"""


@pytest.fixture(autouse=True)
def functions(tmp_path: Path, rewards_module: None) -> None:
    (tmp_path / "tiny_rewards.py").write_text(FUNCTIONS)


@pytest.mark.parametrize(
    ("name", "what", "phase"),
    [
        ("trl", "did you mean responses?", "open_session"),
        ("positional", "nothing is given for p", "load_roles"),  # it might be a column of the data
    ],
)
def test_wrong_names_are_refused_before_models_are_loaded(
    name: str,
    what: str,
    phase: str,
    run_ppo: RunPPO,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def loading(*_: Any) -> None:
        raise AssertionError("models are loaded")

    monkeypatch.setattr(ppo, phase, loading)
    with pytest.raises(AlignError, match=r"reward\.function=.tiny_rewards") as caught:
        run_ppo("run", f"reward={{function: tiny_rewards:{name}}}")
    assert what in str(caught.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_columns_of_the_data_reach_the_function(
    run_ppo: RunPPO,
    tmp_path: Path,
    write_rows: Callable[..., Path],
    demonstrations: list[dict[str, str]],
    read_jsonl: Callable[[Path], list[dict[str, Any]]],
) -> None:
    rows = [{"prompt": r["prompt"], "worth": n} for n, r in enumerate(demonstrations)]
    folder = run_ppo(
        "run",
        "reward={function: tiny_rewards:worth_of}",
        f"data.train={write_rows('worth.jsonl', rows)}",
        "ppo.iterations=1",
    )
    worth = {row["prompt"]: float(row["worth"]) for row in rows}
    samples = read_jsonl(folder / "samples.jsonl")
    assert len({s["score"] for s in samples}) == 8
    assert all(s["score"] == worth[s["prompt"]] for s in samples)


def test_a_column_of_some_rows_alone(
    run_ppo: RunPPO,
    tmp_path: Path,
    write_rows: Callable[..., Path],
    demonstrations: list[dict[str, str]],
    read_jsonl: Callable[[Path], list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A batch without it calls the function as any other does; one that needs it is refused."""
    rows: list[dict[str, Any]] = [{"prompt": r["prompt"]} for r in demonstrations]
    rows[-1]["worth"] = 4.0
    data = f"data.train={write_rows('some.jsonl', rows)}"
    folder = run_ppo("run", "reward={function: tiny_rewards:worth_or_9}", data)
    scores = {s["prompt"]: s["score"] for s in read_jsonl(folder / "samples.jsonl")}
    assert dict.fromkeys(scores, 9.0) | {rows[-1]["prompt"]: 4.0} == {
        **scores, rows[-1]["prompt"]: 4.0
    }  # fmt: skip
    monkeypatch.setattr(ppo, "load_roles", pytest.fail)
    with pytest.raises(AlignError, match=r"row .*some\.jsonl:1 has no column worth"):
        run_ppo("other", "reward={function: tiny_rewards:worth_of}", data)


@pytest.mark.parametrize(
    ("command", "keys"),
    [
        ("ppo", {"reward": {"function": "tiny_rewards:trl"}}),
        ("generate", {"reward": {"function": "tiny_rewards:trl"}}),
        ("eval", {"reward": {"function": "tiny_rewards:trl"}}),
        ("eval", {"gold_reward": {"function": "tiny_rewards:trl"}}),
        ("eval", {"judge": "tiny_rewards:constant"}),
        ("eval", {"metrics": ["bleu", "tiny_rewards:trl"]}),
    ],
)
@pytest.mark.parametrize("check", [False, True])
def test_every_command_refuses_it_and_so_does_check(
    check: bool,
    command: str,
    keys: dict[str, Any],
    tiny_sft: Path,
    prompts_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = tmp_path / f"{command}.yaml"
    tree: dict[str, Any] = {"model": str(tiny_sft), "data": str(prompts_file)}
    tree["output_dir"] = str(tmp_path / "run")
    if "judge" in keys:  # it compares two
        tree["models"] = {"one": tree["model"], "other": tree.pop("model")}
    recipe.write_text(json.dumps(tree | keys), encoding="utf-8")
    argv = ["check", str(recipe), "--stage", command] if check else [command, str(recipe)]
    assert main(argv) == 2
    told = capsys.readouterr().err
    assert "tiny_rewards:" in told
    assert "nothing is given for" in told or "none of what it is given" in told
    assert not (tmp_path / "run").exists()


def test_names_copies_tensors_and_changed_defaults(
    run_ppo: RunPPO, read_jsonl: Callable[[Path], list[dict[str, Any]]]
) -> None:
    """Scores belong to the sorted copies, so only the samples' own order tells of a mutation."""
    folder = run_ppo("run", "reward={function: tiny_rewards:swapped}", "ppo.iterations=1")
    rows = read_jsonl(folder / "samples.jsonl")
    texts = [row["response"] for row in rows]
    assert texts != sorted(texts)
    assert all(row["prompt"] for row in rows)
    assert [row["score"] for row in rows] == [float("moon" in text) for text in sorted(texts)]
    logged = read_jsonl(folder / "metrics.jsonl")
    assert any(row.get("grad_norm", 0) > 0 for row in logged)


def test_a_rollout_in_which_nothing_ends_is_said(
    run_ppo: RunPPO, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = ("reward={metric: chrf}", "ppo.iterations=1", "generation.max_new_tokens=1")
    run_ppo("cut", *cut)
    told = capsys.readouterr().err
    assert "none of the first 16 responses ended, so each was paid ppo.missing_eos_score=-1" in told
    run_ppo("scored", *cut, "ppo.missing_eos_score=null")
    assert "responses ended" not in capsys.readouterr().err


def test_a_constant_reward_is_said_at_the_first_rollout(
    run_ppo: RunPPO, capsys: pytest.CaptureFixture[str]
) -> None:
    run_ppo("one", "reward={function: tiny_rewards:constant}", "ppo.iterations=2")
    told = capsys.readouterr().err
    assert told.count("all 16 responses got the same score, 2;") == 1
    terms = "[{function: tiny_rewards:constant, weight: 3}, {metric: chrf}]"
    run_ppo("sum", f"reward={terms}", "ppo.iterations=1")
    told = capsys.readouterr().err
    assert "reward tiny_rewards:constant: all 16 responses got the same score, 2;" in told
    run_ppo("fine", "reward={metric: chrf}", "ppo.iterations=1")
    assert "same score" not in capsys.readouterr().err


def test_generate_says_it_too(
    tiny_sft: Path, prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "generate.yaml"
    tree = {
        "model": str(tiny_sft),
        "output_dir": str(tmp_path / "run"),
        "data": str(prompts_file),
        "reward": {"function": "tiny_rewards:constant"},
        "generation": {"max_new_tokens": 4},
    }
    recipe.write_text(json.dumps(tree), encoding="utf-8")
    assert main(["generate", str(recipe)]) == 0
    assert "responses got the same score, 2;" in capsys.readouterr().err
