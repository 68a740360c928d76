"""Iterate rounds: sample, label, refresh the reward model, then PPO or online DPO, and measure.

Each round runs the shipped stages, one after another, on the outputs of earlier ones; this file
only connects them. A finished stage is not run again, and an interrupted one resumes from its
checkpoint, so an iteration can be killed anywhere and restarted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from align.base.files import load_json, read_logged, reading
from align.base.progress import say, table
from align.config.keys import (
    DPORecipe,
    IterateRecipe,
    StopRules,
)
from align.config.load import load_recipe, to_yaml
from align.config.sections import DataConfig, DataSource, RewardTerm
from align.evaluation import harness
from align.losses.dpo import LOSSES
from align.models.average import average_models
from align.models.checks import has_adapter
from align.run.files import MANIFEST, read_manifest, supervise
from align.run.folder import Run
from align.stages import STAGES, dpo, generate, reward_model
from align.stages.dpo_options import check_options
from align.stages.ppo import run as ppo
from align.types import AlignError

SET_HERE = ("model", "output_dir", "seed", "resume", "overwrite")
"""Keys that each round sets itself in every stage; `SET_IN` has those of single stages."""
SET_IN: dict[str, tuple[str, ...]] = {
    "rm": ("data.train", "data.test", "data"),
    "ppo": ("reference_model",),
    "dpo": ("data.train", "data.test", "data", "dpo.reference_model"),
    "eval": ("models", "reference_model", "reward", "preferences", "best_of_n"),
}

OF_A_ROUND = ("generate", "rm", "ppo", "dpo", "eval")
"""Stages that a round may run, in this order; keys of an `IterateRecipe` name their recipes."""


@dataclass(frozen=True)
class Round:
    """Starting models and folder of one round."""

    number: int
    folder: Path
    policy: str
    reference: str

    @property
    def pairs(self) -> Path:
        return self.folder / "generate" / "pairs.jsonl"


def stage_recipes(recipe: IterateRecipe) -> dict[str, Any]:
    """Load the recipes of a round's stages, with the overrides of ``set``.

    Raises:
        AlignError: A recipe is missing, wrong, or for another method than requested.
    """
    named = {name: getattr(recipe, name) for name in OF_A_ROUND}
    given = {name: path for name, path in named.items() if path is not None}
    for override in recipe.set:
        if override.partition(".")[0] not in given:
            raise AlignError(f"set: {override}: begins with none of {', '.join(given)}")
        name, _, key = override.partition("=")[0].partition(".")
        if any(key == k or (key.startswith(f"{k}.") and k != "data") for k in _set_here(name)):
            raise AlignError(f"set: {override}: has no effect, each round sets {key}; remove it")
    loaded: dict[str, Any] = {}
    for name, path in given.items():
        overrides = [o.partition(".")[2] for o in recipe.set if o.startswith(f"{name}.")]
        loaded[name] = load_recipe(STAGES[name].recipe, path, overrides, but=_set_here(name))
        if recipe.base_model:
            loaded[name] = replace(loaded[name], base_model=recipe.base_model)
    if loaded["generate"].pairs is None:
        raise AlignError(f"generate: {recipe.generate} makes no pairs; set generate.pairs.choose")
    if "ppo" in loaded and not any(term.model for term in loaded["ppo"].reward):
        raise AlignError(f"ppo: {recipe.ppo} has no reward model, which each round would refresh")
    if "dpo" in loaded:  # options of the first round, and of a later one
        check_options(_against(loaded["dpo"], None))
        if recipe.reference != "refresh" and recipe.rounds > 1:
            check_options(_against(loaded["dpo"], recipe.model))
    measured = loaded["eval"]
    sampled = measured.sampling is not None or measured.generation.temperature > 0
    if recipe.stop.max_kl is not None and not sampled:
        raise AlignError(
            "stop.max_kl: greedy outputs have no KL to measure; set eval.sampling.temperature=1, "
            "or leave max_kl out"
        )
    return loaded


def _set_here(name: str) -> tuple[str, ...]:
    return (*SET_HERE, *SET_IN.get(name, ()))


def run(recipe: IterateRecipe) -> None:
    """Run the remaining rounds and print one table of all."""
    stages = stage_recipes(recipe)
    if PartialState().num_processes > 1:
        raise AlignError("iterate: runs in one process; start it without `accelerate launch`")
    run = Run(
        "iterate",
        recipe.output_dir,
        config_yaml=to_yaml(recipe),
        seed=recipe.seed,
        resume=recipe.resume,
        overwrite=recipe.overwrite,
    )
    if (run.folder / MANIFEST).is_file() and recipe.resume == "auto":
        run.resume()
    else:
        run.begin()
    say(f"iterate: {recipe.model} -> {recipe.output_dir}, at most {recipe.rounds} rounds")
    run.rewind({})  # the rows are written again from the rounds' folders
    start = Round(0, run.folder / "rounds" / "0", recipe.model, recipe.model)
    rows = [_row_of(recipe, stages, start)]
    run.log(1, rows[0])
    now, reason = start, ""
    while not reason and now.number < recipe.rounds:
        now = _next(recipe, now)
        _play(recipe, stages, now)
        rows.append(_row_of(recipe, stages, replace(now, policy=str(_policy(recipe, now)))))
        run.log(now.number + 1, rows[-1])
        reason = stop_reason(rows, recipe.stop)
    if reason:
        say(f"  stopped after round {now.number}: {reason}")
    say(table(list(_table(rows)), title="\nrounds"))
    run.finish([["rounds", str(now.number)]], rounds=rows, stopped=reason)


def _next(recipe: IterateRecipe, last: Round) -> Round:
    """Make the round after ``last``: its policy is last's, its reference follows the recipe."""
    number = last.number + 1
    folder = Path(recipe.output_dir) / "rounds" / str(number)
    folder.mkdir(parents=True, exist_ok=True)
    policy = recipe.model if number == 1 else str(_policy(recipe, last))
    reference = {"fixed": recipe.model, "refresh": policy}.get(recipe.reference)
    if reference is None:  # average
        if number == 1:
            reference = recipe.model
        else:
            reference = str(folder / "reference")
            if not Path(reference).is_dir():
                average_models(
                    last.reference, policy, Path(reference), decay=recipe.reference_decay
                )
    return Round(number, folder, policy, reference)


def _play(recipe: IterateRecipe, stages: dict[str, Any], now: Round) -> None:
    """Sample and label, refresh the reward model, improve the policy."""
    # another seed each round, for other prompts and samples
    common: dict[str, Any] = {
        "seed": recipe.seed + now.number,
        "resume": "never",
        "overwrite": False,
    }
    sampled = replace(
        stages["generate"], model=now.policy, output_dir=str(now.pairs.parent), **common
    )
    _run_once(sampled, generate.run, resumable=False)
    all_pairs = [
        Path(recipe.output_dir) / "rounds" / str(n) / "generate" / "pairs.jsonl"
        for n in range(1, now.number + 1)
    ]
    if "rm" in stages:
        # from the same backbone each round: the pairs hold what it learnt before
        rm = replace(stages["rm"], model=recipe.model, output_dir=str(now.folder / "rm"), **common)
        _run_once(_trained_on(rm, all_pairs), reward_model.run)
    if "ppo" in stages:
        refreshed = str(now.folder / "rm" / "model")
        reward = tuple(
            replace(term, model=refreshed) if term.model else term for term in stages["ppo"].reward
        )
        policy = replace(
            stages["ppo"],
            model=now.policy,
            reference_model=None if now.reference == now.policy else now.reference,
            reward=reward,
            output_dir=str(now.folder / "ppo"),
            **common,
        )
        _run_once(policy, ppo.run)
    else:
        reference = None if now.reference == now.policy else now.reference
        policy = replace(
            _against(stages["dpo"], reference),
            model=now.policy,
            output_dir=str(now.folder / "dpo"),
            **common,
        )
        _run_once(_trained_on(policy, [now.pairs]), dpo.run)


def _against(recipe: DPORecipe, reference: str | None) -> DPORecipe:
    """Set DPO's reference to another model than its start, if its loss has a reference."""
    if not LOSSES[recipe.dpo.loss_type].reference:
        reference = None
    return replace(recipe, dpo=replace(recipe.dpo, reference_model=reference))


def _trained_on(recipe: Any, pairs: list[Path]) -> Any:
    sources = tuple(DataSource(path=str(path)) for path in pairs)
    return replace(recipe, data=replace(recipe.data, train=sources, test=()))


def _policy(recipe: IterateRecipe, now: Round) -> Path:
    return now.folder / ("ppo" if recipe.ppo else "dpo") / "model"


def _run_once(recipe: Any, stage: Callable[[Any], None], *, resumable: bool = True) -> None:
    """Run a stage unless its folder is done; resume an interrupted one."""
    if recipe.base_model and not has_adapter(recipe):  # later rounds start from merged models
        recipe = replace(recipe, base_model=None)
    folder = Path(recipe.output_dir)
    if os.path.lexists(folder / MANIFEST):
        remedy = "restore it, or remove the folder to run this stage again"
        if read_manifest(folder, remedy).get("status") == "done":
            return
        recipe = replace(recipe, **({"resume": "auto"} if resumable else {"overwrite": True}))
    supervise(stage, recipe)


def _row_of(recipe: IterateRecipe, stages: dict[str, Any], now: Round) -> dict[str, float]:
    """Measure one row of the table on held-out prompts; ``gold`` is the reward that labels
    pairs.
    """
    folder = now.folder / "eval"
    measured = replace(
        stages["eval"],
        model=None,
        models={"policy": now.policy},
        reference_model=recipe.model,
        reward=stages["generate"].reward,
        preferences=DataConfig(),  # its training judges the round's own reward model
        best_of_n=None,
        output_dir=str(folder),
        seed=recipe.seed,
    )
    _run_once(measured, harness.run, resumable=False)
    found = _of_eval(folder)
    row: dict[str, float] = {"round": now.number, "gold": found["reward_mean"]}
    row |= {key: found[key] for key in ("kl", "bleu") if found.get(key) is not None}
    if now.number:
        row["pairs"] = len(read_logged(now.pairs))
    if "rm" in stages and now.number:
        scored = now.folder / "eval_reward"  # the same outputs, by the round's reward model
        proxy = replace(
            measured,
            models={"policy": str(folder / "outputs" / "policy.jsonl")},
            reference_model=None,
            sampling=None,
            reward=(RewardTerm(model=str(now.folder / "rm" / "model")),),
            output_dir=str(scored),
        )
        _run_once(proxy, harness.run, resumable=False)
        row["reward"] = _of_eval(scored)["reward_mean"]
    return row


def _of_eval(folder: Path) -> dict[str, float]:
    path = folder / "eval.json"
    with reading(path, f"remove {folder} to measure again"):
        return dict(load_json(path)["models"][0])


def stop_reason(rows: list[dict[str, float]], rules: StopRules) -> str:
    """Say why to stop, or ""; ``rows[0]`` is before the first round."""
    last = rows[-1]
    if rules.max_kl is not None and last.get("kl", 0.0) > rules.max_kl:
        return f"KL {last['kl']:.3g} nats per response, above stop.max_kl={rules.max_kl:g}"
    if rules.min_pairs is not None and last["pairs"] < rules.min_pairs:
        return f"{last['pairs']:g} pairs, fewer than stop.min_pairs={rules.min_pairs}"
    if rules.patience is not None and len(rows) > rules.patience:
        best_before = max(row["gold"] for row in rows[: -rules.patience])
        if all(row["gold"] <= best_before for row in rows[-rules.patience :]):
            return f"gold has not risen for {rules.patience} rounds (stop.patience)"
    return ""


def _table(rows: list[dict[str, float]]) -> Iterator[list[str]]:
    names = [n for n in ("reward", "gold", "kl", "bleu", "pairs") if any(n in r for r in rows)]
    yield ["round", *names]
    for row in rows:
        yield [str(row["round"]), *(_figure(row[n]) if n in row else "" for n in names)]


def _figure(value: float) -> str:
    return "0" if abs(value) < 1e-5 else f"{value:.4g}"  # a KL of 0 with rounding error
