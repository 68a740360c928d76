"""Rounds of the shipped stages: what reads what, stopping, and going on after a kill."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file

from align.cli import main
from align.config.keys import IterateRecipe, StopRules
from align.models.average import average_models
from align.stages import iterate
from align.stages.iterate import stop_reason
from align.stages.ppo import run as ppo
from align.types import AlignError

Iterate = Callable[..., Path]


@pytest.fixture
def run_iterate(
    tiny_sft: Path,
    tmp_path: Path,
    make_recipe: Callable[..., IterateRecipe],
    write_rows: Callable[..., Path],
    demonstrations: list[dict[str, str]],
) -> Iterate:
    rows = [{"prompt": r["prompt"], "references": [r["completion"]]} for r in demonstrations]
    prompts, held_out = write_rows("p.jsonl", rows[:12]), write_rows("t.jsonl", rows[12:18])
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    pairs = write_rows("pairs.jsonl", [pair, {**pair, "prompt": "d"}])
    generation = {"max_new_tokens": 12, "slots": 16}
    optim = {"lr": 0.01, "schedule": "constant"}
    common = {"model": "unused", "output_dir": "unused", "precision": "fp32"}
    stages: dict[str, dict[str, Any]] = {
        "generate": {
            **common,
            "data": str(prompts),
            "generation": {**generation, "samples_per_prompt": 4},
            "reward": {"metric": "chrf"},
            "pairs": {"choose": "best_worst"},
        },
        "rm": {
            **common,
            "data": {"train": "unused", "test_fraction": 0},
            "train": {"max_steps": 2, "minibatch": 4},
            "optim": optim,
        },
        "ppo": {
            **common,
            "data": {"train": str(prompts), "test_fraction": 0},
            "reward": {"model": "unused"},
            "generation": generation,
            "ppo": {"iterations": 2, "rollout_batch": 8, "epochs": 1, "missing_eos_score": None},
            "optim": {"lr": 0.003},
            "train": {"save_every": 1},
        },
        "dpo": {
            **common,
            "data": {"train": "unused", "test_fraction": 0},
            "train": {"max_steps": 2, "minibatch": 4},
            "optim": optim,
        },
        "eval": {
            "output_dir": "unused",
            "model": "unused",
            "data": str(held_out),
            "precision": "fp32",
            "generation": {**generation, "temperature": 0},
            "sampling": generation,
            "num_resamples": 10,
            # of an evaluation on its own, as the shipped ones have it; a round leaves these out
            "reward": {"model": "unused"},
            "best_of_n": 2,
            "preferences": {"train": str(pairs), "test_fraction": 0.5},
        },
    }
    for name, tree in stages.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps(tree), encoding="utf-8")

    def run(name: str, method: str, *overrides: str) -> Path:
        tree = {
            "model": str(tiny_sft),
            "output_dir": str(tmp_path / name),
            "rounds": 2,
            "generate": str(tmp_path / "generate.yaml"),
            "eval": str(tmp_path / "eval.yaml"),
            method: str(tmp_path / f"{method}.yaml"),
        }
        if method == "ppo":
            tree["rm"] = str(tmp_path / "rm.yaml")
        iterate.run(make_recipe(IterateRecipe, tree, *overrides))
        return tmp_path / name

    return run


def config(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "manifest.json").read_text("utf-8"))["recipe"])


def test_two_rounds_of_ppo_killed_and_resumed(
    run_iterate: Iterate, stop_at, read_jsonl, tiny_sft: Path, assert_same_weights, tmp_path
) -> None:
    whole = run_iterate("whole", "ppo")
    rows = read_jsonl(whole / "metrics.jsonl")
    assert [row["round"] for row in rows] == [0, 1, 2]
    assert {"gold", "kl", "bleu", "pairs", "reward"} <= rows[1].keys()
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert rows[2]["kl"] > 0
    first, second = (config(whole / f"rounds/{n}" / "ppo") for n in (1, 2))
    assert (first["model"], first.get("reference_model")) == (str(tiny_sft), None)
    assert second["model"] == str(whole / "rounds/1" / "ppo" / "model")
    assert second["reference_model"] == str(tiny_sft)
    rm = json.loads((whole / "rounds/2" / "rm" / "manifest.json").read_text("utf-8"))
    assert len(rm["data"]["train"]) == 2  # the pairs of both rounds
    # killed inside the second round's PPO, after its first checkpoint
    with stop_at(ppo, "shaped_rewards", 4):
        run_iterate("cut", "ppo")
    before = (tmp_path / "cut" / "rounds/2" / "rm" / "manifest.json").stat().st_mtime_ns
    cut = run_iterate("cut", "ppo", "resume=auto")
    assert (cut / "rounds/2" / "rm" / "manifest.json").stat().st_mtime_ns == before
    assert_same_weights(whole / "rounds/2/ppo/model", cut / "rounds/2/ppo/model")
    again = [
        {k: v for k, v in r.items() if k != "seconds"} for r in read_jsonl(cut / "metrics.jsonl")
    ]
    assert again == [{k: v for k, v in r.items() if k != "seconds"} for r in rows]


@pytest.mark.parametrize("reference", ["fixed", "refresh", "average"])
def test_references_of_online_dpo(run_iterate: Iterate, tiny_sft: Path, reference: str) -> None:
    folder = run_iterate("run", "dpo", f"reference={reference}")
    first = str(folder / "rounds/1" / "dpo" / "model")
    used = config(folder / "rounds/2" / "dpo").get("dpo.reference_model")
    average = str(folder / "rounds/2" / "reference")
    assert used == {"fixed": str(tiny_sft), "refresh": None, "average": average}[reference]
    assert config(folder / "rounds/2" / "dpo")["model"] == first


def test_a_loss_without_reference_is_given_none(run_iterate: Iterate) -> None:
    loss = "set=[dpo.dpo.loss_type=simpo,dpo.dpo.beta=2]"
    folder = run_iterate("run", "dpo", loss, "reference=fixed")
    assert config(folder / "rounds/2" / "dpo").get("dpo.reference_model") is None


def test_options_that_a_later_round_cannot_have_are_refused_before_the_first(
    run_iterate: Iterate,
) -> None:
    with pytest.raises(AlignError, match="adapter_off has no other reference_model"):
        run_iterate("run", "dpo", "set=[dpo.lora.r=4,dpo.dpo.reference=adapter_off]")


def test_several_processes_are_refused(
    run_iterate: Iterate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(iterate, "PartialState", lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(AlignError, match="iterate: runs in one process"):
        run_iterate("run", "dpo")


def test_a_run_that_is_there_is_refused_and_a_rule_stops(run_iterate: Iterate) -> None:
    folder = run_iterate("run", "dpo", "stop.min_pairs=1000")
    assert not (folder / "rounds/2").exists()
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    assert "fewer than stop.min_pairs=1000" in manifest["stopped"]
    with pytest.raises(AlignError, match="already holds a run"):
        run_iterate("run", "dpo")


def test_average_of_two_models(tiny: Path, tiny_sft: Path, tmp_path: Path) -> None:
    average_models(str(tiny), str(tiny_sft), tmp_path / "mean", decay=0.75)
    a, b, mean = (load_file(f / "model.safetensors") for f in (tiny, tiny_sft, tmp_path / "mean"))
    for name, value in mean.items():
        assert value == pytest.approx(0.75 * a[name] + 0.25 * b[name], abs=1e-6)


ROWS = [{"gold": g, "kl": k, "pairs": 50} for g, k in ((40, 0), (44, 3), (43, 5), (42, 9))]


@pytest.mark.parametrize(
    ("rules", "rounds", "said"),
    [
        (StopRules(), 3, ""),
        (StopRules(max_kl=8), 3, "KL 9 nats per response, above stop.max_kl=8"),
        (StopRules(max_kl=8), 2, ""),
        (StopRules(patience=2), 3, "gold has not risen for 2 rounds"),
        (StopRules(patience=2), 2, ""),
        (StopRules(patience=1), 2, "gold has not risen for 1 rounds"),
        (StopRules(min_pairs=51), 1, "50 pairs, fewer than stop.min_pairs=51"),
    ],
)
def test_stopping_rules(rules: StopRules, rounds: int, said: str) -> None:
    reason = stop_reason(ROWS[: rounds + 1], rules)
    assert reason.startswith(said)
    assert bool(reason) == bool(said)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["ppo=null"], "ppo: set `ppo` or `dpo`, not both or none"),
        (["dpo=tiny/dpo"], "ppo: set `ppo` or `dpo`, not both or none"),
        (["rm=null"], "rm: is missing"),
        (["set=[rm.train.epoch=2]"], "train.epoch: no such key"),
        (["set=[eval.reward.metric=ter]"], "has no effect, each round sets reward.metric"),
        (["set=['rm.data=x.jsonl']"], "has no effect, each round sets data"),
        (["set=[ppo.output_dir=o]"], "has no effect, each round sets output_dir"),
        (["set=[sft.seed=2]"], "set: sft.seed=2: begins with none of generate, rm, ppo, eval"),
        (["generate=tiny/pears"], "no such recipe; did you mean tiny/pairs?"),
        (["set=[generate.pairs=null]"], "makes no pairs"),
        (["set=[eval.sampling=null]"], "stop.max_kl: greedy outputs have no KL"),
        (["set=['ppo.reward={metric: chrf}']"], "has no reward model"),
    ],
)
def test_mistakes_in_the_recipe(capsys, overrides: list[str], said: str) -> None:
    assert main(["check", "tiny/iterate", *overrides]) == 2
    assert said in capsys.readouterr().err


def test_check_names_the_stages(capsys) -> None:
    assert main(["check", "tiny/iterate"]) == 0
    page = capsys.readouterr().out
    assert "rounds      at most 3" in page
    assert "ppo         tiny/ppo" in page
