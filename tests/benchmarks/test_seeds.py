"""Seeds against SFT: signs, verdicts, and that a seed below SFT is seen."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks import seeds


def results() -> dict[str, Any]:
    def model(name: str, samples: float, greedy: float) -> dict[str, Any]:
        return {"name": name, "sample_chrf_mean": samples, "chrf": greedy}

    def compared(a: str, b: str, metric: str, difference: float, p: float) -> dict[str, Any]:
        return {"a": a, "b": b, "metric": metric, "difference": difference, "p": p}

    return {
        "models": [
            *(model("sft", 40, 60), model("ppo-0", 44, 61), model("ppo-1", 38, 60.2)),
            {"name": "best-of-4", "chrf": 45.0},  # has no samples
        ],
        "comparisons": [
            compared("sft", "copy the input", "chrf", -3.0, 0.001),
            compared("ppo-0", "sft", "sample_chrf", 4.0, 0.001),
            compared("ppo-0", "sft", "chrf", 1.0, 0.01),
            compared("sft", "ppo-1", "sample_chrf", 2.0, 0.002),  # the other way round
            compared("ppo-1", "sft", "chrf", 0.2, 0.7),
            compared("ppo-1", "ppo-0", "sample_chrf", -6.0, 0.001),
            compared("ppo-0", "sft", "bleu", -1.0, 0.001),  # not gold
        ],
    }


def test_differences_are_seed_minus_sft() -> None:
    found = seeds.against_base(results())
    assert found == {
        "ppo-0": {
            "sample_chrf": {"value": 44, "difference": 4.0, "p": 0.001},
            "chrf": {"value": 61, "difference": 1.0, "p": 0.01},
        },
        "ppo-1": {
            "sample_chrf": {"value": 38, "difference": -2.0, "p": 0.002},
            "chrf": {"value": 60.2, "difference": 0.2, "p": 0.7},
        },
    }
    assert seeds.rows(found)[1:] == [
        ["ppo-0", "44.0 (+4.0, p = 0.001)", "61.0 (+1.0, p = 0.010)", "better", "better"],
        ["ppo-1", "38.0 (-2.0, p = 0.002)", "60.2 (+0.2, p = 0.700)", "BELOW", "as good"],
    ]


@pytest.mark.parametrize("worse", [True, False])
def test_a_seed_below_sft_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], worse: bool
) -> None:
    ran = []

    def align(command: str, recipe: str, *overrides: str) -> None:
        ran.append((command, recipe, *overrides))
        if command == "eval":
            made = results()
            if not worse:
                made["comparisons"][3]["difference"] = -2.0
            place = tmp_path / "tiny" / "ppo.epochs=2" / "eval"
            place.mkdir(parents=True, exist_ok=True)
            (place / "eval.json").write_text(json.dumps(made))

    monkeypatch.setattr(seeds, "_align", align)
    monkeypatch.delenv("ALIGN_TRUST", raising=False)  # these seeds were never run
    done = tmp_path / "tiny" / "ppo.epochs=2" / "ppo-0" / "model" / "config.json"
    done.parent.mkdir(parents=True)
    done.write_text("{}")
    argv = ["seeds", "tiny", "--seeds", "0", "1", "--folder", str(tmp_path), "ppo.epochs=2"]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit) as caught:
        seeds.main()
    assert caught.value.code == int(worse)
    assert ("ppo-1" if worse else "none") in capsys.readouterr().out.splitlines()[-1]
    # seed 0 was done already
    assert [(r[0], r[2]) for r in ran[:-1]] == [("ppo", "seed=1")]
    assert "ppo.epochs=2" in ran[0]
    assert f"ppo-0: {tmp_path}/tiny/ppo.epochs=2/ppo-0/model" in ran[1][2]


def test_what_is_older_than_its_model_is_run_again(tmp_path: Path) -> None:
    def write(path: Path, when: int, text: str = "{}") -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        os.utime(path, (when, when))

    base, run = tmp_path / "sft", tmp_path / "ppo-0"
    assert not seeds._is_done(run, str(base))
    write(run / "model" / "config.json", 200)
    write(base / "config.json", 100)
    assert seeds._is_done(run, str(base))
    models = {"sft": str(base), "ppo-0": str(run / "model")}
    evaluated = tmp_path / "eval.json"
    assert not seeds._covers(evaluated, models)
    write(evaluated, 300, json.dumps({"models": [{"name": "sft"}, {"name": "ppo-0"}]}))
    assert seeds._covers(evaluated, models)
    assert not seeds._covers(evaluated, models | {"ppo-1": str(run / "model")})
    write(base / "config.json", 400)  # SFT again
    assert not seeds._is_done(run, str(base))
    assert not seeds._covers(evaluated, models)


@pytest.mark.parametrize(("asked", "code"), [("0", 0), ("1", 1), ("7", "not measured")])
def test_only_the_seeds_asked_for_count_and_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, code: int | str
) -> None:
    def align(command: str, recipe: str, *overrides: str) -> None:
        if command != "eval":
            return
        place = tmp_path / "tiny" / "shipped" / "eval"
        place.mkdir(parents=True, exist_ok=True)
        (place / "eval.json").write_text(json.dumps(results()))

    monkeypatch.setattr(seeds, "_align", align)
    monkeypatch.delenv("ALIGN_TRUST", raising=False)
    monkeypatch.setattr("sys.argv", ["seeds", "tiny", "--seeds", asked, "--folder", str(tmp_path)])
    with pytest.raises(SystemExit) as caught:
        seeds.main()
    if isinstance(code, str):
        assert f"ppo-7 {code}" in str(caught.value.code)
    else:
        assert caught.value.code == code
