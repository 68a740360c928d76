from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align import cli
from align.commands.sweep import grid
from align.stages import dpo
from align.types import AlignError


def test_grid() -> None:
    assert grid(["a.b=1,2", "c=3"]) == [["a.b=1", "c=3"], ["a.b=2", "c=3"]]
    for wrong in ("a.b", "a.b=", "=1", "a=1,1", "a=x/y"):
        with pytest.raises(AlignError, match="--over"):
            grid([wrong])


@pytest.fixture
def arguments(
    tiny: Path,
    tmp_path: Path,
    write_rows: Callable[..., Path],
    preferences: list[dict[str, Any]],
    demonstrations: list[dict[str, str]],
) -> list[str]:
    """``align sweep dpo`` over two betas, two steps each, then an evaluation of both."""
    prompts = [{"prompt": d["prompt"], "references": [d["completion"]]} for d in demonstrations[:6]]
    recipe, evaluation = tmp_path / "dpo.yaml", tmp_path / "eval.yaml"
    tree: dict[str, Any] = {
        "model": str(tiny),
        "output_dir": str(tmp_path / "sweep"),
        "data": {"train": str(write_rows("p.jsonl", preferences)), "test_fraction": 0.2},
        "train": {"max_steps": 2, "save_every": 1},
        "precision": "fp32",
    }
    recipe.write_text(json.dumps(tree))
    tree = {
        "models": {"start": str(tiny)},
        "output_dir": "elsewhere",
        "data": str(write_rows("e.jsonl", prompts)),
        "reference_model": str(tiny),
        "reward": {"metric": "chrf"},
        "generation": {"temperature": 0, "max_new_tokens": 6},
        "sampling": {"max_new_tokens": 6},
        "num_resamples": 20,
        "precision": "fp32",
    }
    evaluation.write_text(json.dumps(tree))
    over = "dpo.beta=0.1,0.5"
    return ["sweep", "dpo", str(recipe), "--over", over, "--eval", str(evaluation)]


def test_a_sweep_is_resumed_where_it_died(
    arguments: list[str],
    tmp_path: Path,
    stop_at: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    from align.training import loop

    # two steps of the first point, one of the second
    with stop_at(loop.Trainer, "take_step", 4):
        args = cli._parser().parse_args(arguments)
        args.run(args)
    first, second = (tmp_path / "sweep" / f"dpo.beta={b}" for b in ("0.1", "0.5"))
    assert json.loads((first / "manifest.json").read_text())["status"] == "done"
    assert not (second / "model").exists()
    assert (second / "checkpoints" / "step-1").is_dir()

    steps = []
    original = loop.Trainer.take_step
    counted = lambda *a: steps.append(1) or original(*a)  # noqa: E731
    monkeypatch.setattr(loop.Trainer, "take_step", counted)
    assert cli.main(arguments) == 0
    assert len(steps) == 1  # the first point is not run again, the second goes on
    assert "done already" in capsys.readouterr().out
    found = json.loads((tmp_path / "sweep" / "eval" / "eval.json").read_text())
    names = [m["name"] for m in found["models"]]
    assert names == ["start", "dpo.beta=0.1", "dpo.beta=0.5"]
    assert all(m["kl"] is not None for m in found["models"])
    # a point of another recipe is no point of this sweep
    assert cli.main([*arguments[:3], "optim.lr=0.1", *arguments[3:]]) == 2
    assert "was run with optim.lr=1e-05" in capsys.readouterr().err


def test_every_point_is_read_before_the_first_runs(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dpo, "run", lambda recipe: pytest.fail("ran"))
    arguments[4] = "dpo.beta=0.1,-1"
    assert cli.main(arguments) == 2
    assert "dpo.beta: is -1" in capsys.readouterr().err
