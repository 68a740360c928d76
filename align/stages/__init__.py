"""STAGES: the one table of stages. Every command, check and page that lists stages reads it.

A stage is imported when it runs, so that the table costs no import of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from align.config.keys import (
    DPORecipe,
    EvalRecipe,
    GenerateRecipe,
    IterateRecipe,
    PPORecipe,
    RewardRecipe,
    SFTRecipe,
)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of the package.

    Attributes:
        name: Its command, and what ``manifest.json`` calls it.
        recipe: The class of its recipes.
        run: Runs a recipe; raises ``AlignError`` for what the user can mend.
        rows: What rows of its data are read as; None where it reads none itself.
        writes: Files and folders of a finished run beside ``config.yaml`` and ``manifest.json``;
            ``model`` is among them where it trains one.
        resumable: Whether a run has checkpoints, or parts that are done, to resume from.
        shardable: Whether it runs under FSDP.
        help: One line for ``align --help``.
    """

    name: str
    recipe: type[Any]
    run: Callable[[Any], None]
    rows: Literal["sft", "preference", "prompt"] | None
    writes: tuple[str, ...]
    resumable: bool
    shardable: bool
    help: str

    @property
    def trains(self) -> bool:
        return "model" in self.writes


def _sft(recipe: SFTRecipe) -> None:
    from align.stages import sft

    sft.run(recipe)


def _reward_model(recipe: RewardRecipe) -> None:
    from align.stages import reward_model

    reward_model.run(recipe)


def _ppo(recipe: PPORecipe) -> None:
    from align.stages.ppo import run

    run.run(recipe)


def _dpo(recipe: DPORecipe) -> None:
    from align.stages import dpo

    dpo.run(recipe)


def _evaluate(recipe: EvalRecipe) -> None:
    from align.evaluation import harness

    harness.run(recipe)


def _generate(recipe: GenerateRecipe) -> None:
    from align.stages import generate

    generate.run(recipe)


def _iterate(recipe: IterateRecipe) -> None:
    from align.stages import iterate

    iterate.run(recipe)


STAGES: dict[str, Stage] = {
    "sft": Stage(
        name="sft",
        recipe=SFTRecipe,
        run=_sft,
        rows="sft",
        writes=("metrics.jsonl", "model"),
        resumable=True,
        shardable=True,
        help="fine-tune on demonstrations",
    ),
    "rm": Stage(
        name="rm",
        recipe=RewardRecipe,
        run=_reward_model,
        rows="preference",
        writes=("metrics.jsonl", "model", "margins.png"),
        resumable=True,
        shardable=True,
        help="train a reward model on pairs",
    ),
    "ppo": Stage(
        name="ppo",
        recipe=PPORecipe,
        run=_ppo,
        rows="prompt",
        writes=("metrics.jsonl", "model", "critic", "samples.jsonl"),
        resumable=True,
        shardable=False,
        help="optimise a reward by PPO",
    ),
    "dpo": Stage(
        name="dpo",
        recipe=DPORecipe,
        run=_dpo,
        rows="preference",
        writes=("metrics.jsonl", "model"),
        resumable=True,
        shardable=True,
        help="optimise preference pairs by DPO",
    ),
    "eval": Stage(
        name="eval",
        recipe=EvalRecipe,
        run=_evaluate,
        rows="prompt",
        writes=("eval.json", "outputs"),
        resumable=False,
        shardable=False,
        help="BLEU, chrF, reward, KL of checkpoints",
    ),
    "generate": Stage(
        name="generate",
        recipe=GenerateRecipe,
        run=_generate,
        rows="prompt",
        writes=("samples.jsonl",),
        resumable=False,
        shardable=False,
        help="sample, score and pair responses",
    ),
    "iterate": Stage(
        name="iterate",
        recipe=IterateRecipe,
        run=_iterate,
        rows=None,
        writes=("metrics.jsonl", "rounds"),
        resumable=True,
        shardable=False,
        help="rounds of generate, rm, ppo or dpo",
    ),
}


def recipe_classes() -> Mapping[str, type[Any]]:
    """The recipe class of every command."""
    return {name: stage.recipe for name, stage in STAGES.items()}


def names_of(test: Callable[[Stage], bool]) -> Iterator[str]:
    """The stages of which something holds."""
    return (name for name, stage in STAGES.items() if test(stage))


def run_stage(stage: Stage, recipe: Any) -> None:
    """Run a recipe; if it fails, its manifest says how, and a run it was to replace is back."""
    from align.run.files import supervise

    supervise(stage.run, recipe)
