"""Each warning fires on a run that is bad in its way, and none on a good one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.base.files import read_logged
from align.cli import main
from align.run.doctor import LIMITS, RULES, closing_lines, diagnose, judged_stages, rules_of
from align.run.doctor_rules import FEWEST, Finding
from tools.trust import Trust

ROOT = Path(__file__).parents[2]
STEPS = 40


def line(start: float, end: float) -> Callable[[float], float]:
    return lambda share: start + (end - start) * share


# name -> how it goes over a run, from share 0 to 1: what a good one looks like
GOOD: dict[str, dict[str, Callable[[float], float]]] = {
    "sft": {"loss": line(3, 1.5), "grad_norm": line(2, 1)},
    "rm": {"loss": line(0.69, 0.4), "grad_norm": line(2, 4)},
    "dpo": {
        "loss": line(0.69, 0.45),
        "grad_norm": line(2, 3),
        "rewards_chosen": line(0, -0.3),
        "rewards_rejected": line(0, -1.2),
    },
    "ppo": {
        "kl": line(0, 6),
        "score_mean": line(0, 1),
        "score_std": line(1, 1),
        "length_mean": line(20, 24),
        "repetition": line(0.02, 0.04),
        "entropy": line(1.5, 0.9),
        "eos_rate": line(0.97, 0.99),
        "clip_fraction": line(0.05, 0.1),
        "approx_kl": line(0.01, 0.005),
        "first_ratio_error": line(0.12, 0.15),
        "explained_variance": line(-0.5, 0.6),
        "grad_norm": line(0.5, 1),
        "optimality_gap": line(0.8, 0.3),
    },
}
HELD_OUT = {"sft": [3.0, 1.7], "rm": [0.69, 0.5], "dpo": [0.69, 0.5]}
MANIFEST = {"train_rows": 500, "recipe": {"dpo.beta": 0.1}, "held_out": {"accuracy_of_longer": 0.6}}


def rows(stage: str, **changed: Callable[[float], float]) -> list[dict[str, float]]:
    names = GOOD[stage] | changed
    training = [
        {"step": i + 1, **{name: f(i / (STEPS - 1)) for name, f in names.items()}}
        for i in range(STEPS)
    ]
    held_out = [
        {"step": step, "eval_loss": loss, **({"eval_accuracy": 0.7} if stage == "rm" else {})}
        for step, loss in zip((0, STEPS), HELD_OUT.get(stage, []), strict=False)
    ]
    return [*held_out[:1], *training, *held_out[1:]]


# kind -> stage, what is different from a good run
BAD: dict[str, tuple[str, dict[str, Callable[[float], float]]]] = {
    "kl_over_budget": ("ppo", {"kl": line(0, 50)}),
    "length_hacking": ("ppo", {"length_mean": line(20, 60)}),
    "repetition_hacking": ("ppo", {"repetition": line(0.02, 0.5)}),
    "entropy_collapse": ("ppo", {"entropy": line(1.5, 0.05)}),
    "eos_falling": ("ppo", {"eos_rate": line(0.97, 0.4)}),
    "never_ends": ("ppo", {"eos_rate": line(0.05, 0.05)}),
    "scores_equal": ("ppo", {"score_std": line(0, 0), "score_mean": line(0, 0)}),
    "clip_fraction": ("ppo", {"clip_fraction": line(0.1, 0.6)}),
    "approx_kl": ("ppo", {"approx_kl": line(0.02, 0.3)}),
    "sampled_otherwise": ("ppo", {"first_ratio_error": line(0.9, 0.9)}),
    "critic_useless": ("ppo", {"explained_variance": line(0, -1)}),
    "chosen_falling": ("dpo", {"rewards_chosen": line(0, -4), "rewards_rejected": line(0, -6)}),
    "lr_too_high": ("sft", {"loss": line(3, 6)}),
}


@pytest.mark.parametrize("stage", GOOD)
def test_silent_on_a_good_run(stage: str, trust: Trust) -> None:
    assert diagnose(stage, rows(stage), MANIFEST) == []
    trust.row("doctor", f"{stage}: a good run's numbers", found="silent", wanted="silent")


@pytest.mark.parametrize("kind", BAD)
def test_fires_on_a_bad_run(kind: str, trust: Trust) -> None:
    stage, changed = BAD[kind]
    found = diagnose(stage, rows(stage, **changed), MANIFEST)
    assert [f.kind for f in found] == [kind]
    assert f"{found[0].limit:.3g}".rstrip("0") in str(found[0]) or "%" in found[0].says
    trust.row("doctor", f"{stage}: {kind}", found=str(found[0]), wanted="this finding alone")


def test_fires_on_a_gradient_that_blows_up() -> None:
    for stage in GOOD:
        (found,) = diagnose(stage, rows(stage, grad_norm=lambda share: 90**share), MANIFEST)
        assert found.kind == "lr_too_high"


@pytest.mark.parametrize(
    ("accuracy", "longer", "rival"), [(0.55, 0.6, "longer"), (0.42, 0.4, "coin")]
)
def test_fires_on_a_reward_model_that_length_beats(
    accuracy: float, longer: float, rival: str, trust: Trust
) -> None:
    logged = rows("rm")
    logged[-1]["eval_accuracy"] = accuracy
    (found,) = diagnose("rm", logged, MANIFEST | {"held_out": {"accuracy_of_longer": longer}})
    assert found.kind == "reward_model_weak"
    assert rival in found.says
    trust.row("doctor", f"rm: {found.kind}, {rival}", found=str(found), wanted="this finding alone")


@pytest.mark.parametrize(
    ("accuracy", "interval", "longer", "weak"),
    [
        (0.63, [0.55, 0.70], 0.59, True),  # above both, but not surely above "longer wins"
        (0.56, [0.49, 0.63], 0.45, True),  # nor above a coin
        (0.63, [0.60, 0.66], 0.59, False),
        (0.56, [0.51, 0.61], 0.45, False),
    ],
)
def test_a_reward_model_has_to_be_surely_better(
    accuracy: float, interval: list[float], longer: float, weak: bool
) -> None:
    logged = rows("rm")
    logged[-1]["eval_accuracy"] = accuracy
    facts = {"held_out": {"accuracy_of_longer": longer}, "held_out_accuracy_ci95": interval}
    found = diagnose("rm", logged, MANIFEST | facts)
    assert [one.kind for one in found] == (["reward_model_weak"] if weak else [])
    if weak:
        assert f"95% interval {interval[0]:.0%} to {interval[1]:.0%}" in found[0].says
        assert "not surely better than" in found[0].says


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo"])
def test_fires_on_too_little_data(stage: str, trust: Trust) -> None:
    (few,) = diagnose(stage, rows(stage), MANIFEST | {"train_rows": 20})
    assert (few.kind, few.value) == ("too_little_data", 20)
    logged = rows(stage)
    logged[-1]["eval_loss"] = 1.1 * logged[0]["eval_loss"]
    (overfit,) = diagnose(stage, logged, MANIFEST)
    assert overfit.kind == "too_little_data"
    trust.row("doctor", f"{stage}: overfitting", found=str(overfit), wanted="this finding alone")


def test_an_adaptive_coefficient_has_its_own_budget() -> None:
    recipe = {"kl.adaptive": True, "kl.target": 3.0}
    assert diagnose("ppo", rows("ppo"), {"recipe": {"kl.adaptive": False, "kl.target": 3.0}}) == []
    (found,) = diagnose("ppo", rows("ppo"), {"recipe": recipe})
    assert (found.kind, found.limit) == ("kl_over_budget", 4.5)


def test_length_alone_is_no_hacking() -> None:
    """The score has to rise with it."""
    changed = {"length_mean": line(20, 60), "score_mean": line(0, 0.1)}
    assert diagnose("ppo", rows("ppo", **changed), MANIFEST) == []


def test_a_trend_needs_some_rows_and_the_run_says_so() -> None:
    bad = rows("ppo", entropy=lambda share: 1.5 if share < 0.04 else 0.01)
    assert diagnose("ppo", bad[: FEWEST - 1], MANIFEST) == []
    said = closing_lines("ppo", bad[: FEWEST - 1], [])
    assert said == ["doctor: nothing found that 7 logged steps can show; a trend takes 8"]
    assert diagnose("ppo", bad[:FEWEST], MANIFEST) != []
    assert closing_lines("ppo", bad[:FEWEST], [])[-1] == "doctor: nothing found"


WAVE = (1.04, 0.98, 1.26, 1.1, 1.54, 1.16, 1.35, 1.49, 1.46, 1.52, 1.59, 1.47, 0.89, 1.45, 1.28)
"""Training loss of `tiny/sft`, rows of five steps: held-out loss falls by a third meanwhile."""


def test_a_trend_is_more_than_noise() -> None:
    for count in range(FEWEST, len(WAVE) + 1):
        logged = [{"step": i, "loss": loss} for i, loss in enumerate(WAVE[:count])]
        assert diagnose("sft", logged, MANIFEST) == [], count
    # the same noise on a loss that doubles
    risen = [{"step": i, "loss": loss + max(0, i - 5) / 5} for i, loss in enumerate(WAVE)]
    (found,) = diagnose("sft", risen, MANIFEST)
    assert found.kind == "lr_too_high"
    # and one that is thrown to other values at every step
    thrown = [{"step": i, "loss": WAVE[i] if i < 9 else 20.0 + 7 * (i % 3)} for i in range(15)]
    (found,) = diagnose("sft", thrown, MANIFEST)
    assert found.kind == "lr_too_high"


def test_noise_alone_is_seldom_a_trend(trust: Trust) -> None:
    """200 runs of 38 rows whose loss scatters by a quarter, each looked at 15 times."""
    rng = np.random.default_rng(0)
    alarms = 0
    for losses in 1 + 0.25 * rng.standard_normal((200, 38)):
        logged = [{"loss": float(loss)} for loss in losses]
        looks = (8, 9, 10, 12, 14, 16, 18, 20, 23, 26, 29, 32, 36, 38)
        alarms += any(diagnose("sft", logged[:count], MANIFEST) for count in looks)
    trust.at_most("doctor", "runs of noise in which a trend was seen, of 200", alarms, 4)


def test_a_level_needs_three_rows() -> None:
    bad = rows("ppo", kl=line(50, 50))
    assert diagnose("ppo", bad[:2], MANIFEST) == []
    assert [f.kind for f in diagnose("ppo", bad[:3], MANIFEST)] == ["kl_over_budget"]


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo"])
def test_a_short_run_is_judged_by_its_held_out_loss(stage: str) -> None:
    short = [{"step": 0, "eval_loss": 2.1}, {"step": 2, "loss": 9.0}, {"step": 2, "eval_loss": 4e3}]
    (found,) = diagnose(stage, short, {"train_rows": 500})
    assert found.kind == "held_out_worse"
    assert "2.1 -> 4e+03" in str(found)
    # the training loss fell too, from where it had been thrown to
    thrown = [{"step": i, "loss": 300.0 - 10 * i} for i in range(20)]
    (found,) = diagnose(stage, [short[0], *thrown, short[2]], {"train_rows": 500})
    assert found.kind == "held_out_worse"
    kept = {"train_rows": 500, "best": {"step": 1, "value": 2.0}}
    assert diagnose(stage, short, kept) == []
    better = [*short[:2], {"step": 2, "eval_loss": 2.0}]
    assert diagnose(stage, better, {"train_rows": 500}) == []


@pytest.mark.parametrize("status", ["failed", "interrupted", "died"])
def test_a_run_that_did_not_end_is_a_finding(status: str) -> None:
    manifest = {**MANIFEST, "status": status, "error": "reward: no such function"}
    (found,) = diagnose("sft", [], manifest)
    assert found.kind == "unfinished"
    assert f"({status} after step 0): reward: no such function" in str(found)


def test_every_kind_is_shown_to_fire_and_is_explained() -> None:
    shown = {*BAD, "reward_model_weak", "too_little_data", "held_out_worse", "unfinished"}
    assert shown == set(LIMITS)
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    section = page.partition("## The run doctor")[2].partition("\n## ")[0]
    told = dict(re.findall(r"^\| `(\w+)` \|[^|]*\|[^|]*?(-?[\d.]+)[^|]*\|", section, re.M))
    assert {kind: float(limit) for kind, limit in told.items()} == LIMITS


def test_the_distance_to_the_optimum_is_reported() -> None:
    first, second = closing_lines("ppo", rows("ppo"), [])
    assert first.startswith("distance to the optimum (optimality_gap): 0.755 -> 0.345")
    assert second == "doctor: nothing found"


def test_a_short_run_is_not_said_to_be_well_and_unjudged_at_once() -> None:
    one = [{"step": 1, "loss": 0.7}]
    (only,) = closing_lines("dpo", one, [])
    assert only == "doctor: nothing found that 1 logged step can show; a trend takes 8"
    finding = Finding("kl", 1.0, 0.5, "says", "cure")
    assert closing_lines("dpo", one, [finding]) == [
        "doctor: says [kl]; cure",
        "doctor: no trend judged from 1 logged step; a trend takes 8",
    ]


# ---------------------------------------------------------------- a run, live and finished


@pytest.fixture
def logged_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Path]:
    """A run folder into which those rows were logged one by one, as a stage does."""
    from align.run.folder import Run

    def log(stage: str, found: list[dict[str, Any]]) -> Path:
        run = Run(stage, str(tmp_path / "run"), config_yaml="model: m", seed=0)
        run.describe(train_rows=500)
        run.begin()
        for row in found:
            run.log(int(row["step"]), {k: v for k, v in row.items() if k != "step"})
        run.finish([["held out", ""]])
        return run.folder

    return log


def test_a_bad_run_is_told_once_live_and_again_at_the_end(
    logged_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = logged_run("ppo", rows("ppo", kl=line(0, 50)))
    out, err = capsys.readouterr()
    (live,) = re.findall(r"align: warning: ppo, step (\d+): KL .* \[kl_over_budget\]", err)
    assert int(live) < STEPS
    assert "doctor: KL to the reference" in out
    assert "optimality_gap" in out
    (kept,) = json.loads((folder / "manifest.json").read_text("utf-8"))["doctor"]
    assert kept["kind"] == "kl_over_budget"
    assert main(["doctor", str(folder)]) == 1
    assert "[kl_over_budget]" in capsys.readouterr().out


def test_a_good_run_is_left_in_peace(
    logged_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = logged_run("dpo", rows("dpo"))
    out, err = capsys.readouterr()
    assert err == ""
    assert "doctor: nothing found" in out
    assert json.loads((folder / "manifest.json").read_text("utf-8"))["doctor"] == []
    assert main(["doctor", str(folder)]) == 0


def test_what_is_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    (tmp_path / "manifest.json").write_text('{"stage": "eval"}', encoding="utf-8")
    assert main(["doctor", str(tmp_path)]) == 2
    assert "a run of eval" in capsys.readouterr().err


def test_the_run_that_was_meant_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for n in range(8):
        (tmp_path / "runs" / f"r{n}" / "model").mkdir(parents=True)
        (tmp_path / "runs" / f"r{n}" / "manifest.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.jsonl").touch()
    runs = tmp_path / "runs"
    for given, said in {
        "runs": f"it holds runs, name one of them: {runs / 'r0'}, {runs / 'r1'}, ",
        "runs/r3/model": f"it is inside a run: name {runs / 'r3'}",
        "rums": f"no such folder; did you mean {runs}?",
        "empty": "holds no run (manifest.json); name a run, such as runs/tiny/ppo",
        "file.jsonl": "a file; name a run, such as runs/tiny/ppo",
    }.items():
        assert main(["doctor", str(tmp_path / given)]) == 2
        line = capsys.readouterr().err.strip()
        assert line.startswith(f"align: doctor: {tmp_path / given}: ")
        assert said in line
        assert ("and 2 more" in line) is (given == "runs")


def test_a_row_that_a_crash_cut_short_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st', encoding="utf-8")
    assert read_logged(tmp_path / "metrics.jsonl") == [{"step": 1}]


def test_a_rule_judges_the_runs_that_it_names() -> None:
    names = {stage: [rule.kind for rule in rules_of(stage)] for stage in ("sft", "ppo", "eval")}
    assert names["sft"] == ["unfinished", "lr_too_high", "held_out_worse", "too_little_data"]
    assert names["eval"] == ["unfinished"]
    assert len(names["ppo"]) == 13
    assert set(judged_stages()) == {"sft", "rm", "dpo", "ppo"}
    assert len(LIMITS) == len(RULES)
