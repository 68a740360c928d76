"""SFT, reward modelling, PPO and DPO on one packed batch layout.

Each stage is a command (``align --help``) and a function:

    import align

    sft = align.sft("tiny/sft", data=rows, output_dir="runs/mine/sft")
    rm = align.reward_model("tiny/rm", model=sft.model, data=pairs, output_dir="runs/mine/rm")
    print(rm.held_out)

Every function takes a recipe (a path, a shipped name, a mapping or nothing) and the keys of
docs/recipe-keys.md as keyword arguments, and returns a `RunResult`. docs/python.md lists what is
public. torch is imported when a function is called, not before.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import Any, TypeAlias

from align.run.result import RunResult
from align.types import AlignError

__version__ = "0.1.0"
__all__ = [
    "AlignError",
    "RunResult",
    "dpo",
    "evaluate",
    "generate",
    "load_recipe",
    "ppo",
    "reward_model",
    "sft",
]

Recipe: TypeAlias = "str | os.PathLike[str] | Mapping[str, Any] | None"
LIBRARY = ("losses", "data", "evaluation")
"""Packages that are loaded when they are first named: ``align.losses.dpo_loss``."""


def sft(recipe: Recipe = None, /, *, tokenizer: Any = None, **keys: Any) -> RunResult:
    """Fine-tune ``model`` on demonstrations.

    Args:
        recipe: A path, a shipped name (``align ls``), a mapping of keys, a recipe of
            `load_recipe`, or None.
        tokenizer: That of a ``model`` that is given as an object.
        **keys: Keys of docs/recipe-keys.md, over those of the recipe. Sections are dicts, which
            change the keys they name and leave the others: ``train={"max_steps": 100}``; dotted
            keys do the same: ``**{"train.max_steps": 100}``. ``data`` is a path, a list of rows, a
            ``datasets.Dataset`` or a list of sources; a model is a path, a hub id or a
            ``transformers.PreTrainedModel`` (with ``tokenizer``); a reward may be a function.

    Returns:
        The finished run. Its folder is ``output_dir``, as for ``align sft``.

    Raises:
        AlignError: Something the caller can mend. Ctrl-C saves a checkpoint and raises a
            KeyboardInterrupt; the same call with ``resume="auto"`` goes on from there.
    """
    return _call("sft", recipe, keys, tokenizer)


def reward_model(recipe: Recipe = None, /, *, tokenizer: Any = None, **keys: Any) -> RunResult:
    """Train a one-label reward model on preference pairs; arguments as for `sft`."""
    return _call("rm", recipe, keys, tokenizer)


def ppo(recipe: Recipe = None, /, *, tokenizer: Any = None, **keys: Any) -> RunResult:
    """Optimise ``reward`` by PPO on prompts; arguments as for `sft`.

    ``reward`` is ``{"model": FOLDER}``, ``{"metric": "chrf"}``, a Python function
    ``f(prompts, responses, references) -> list of floats``, or a list of these with weights.
    """
    return _call("ppo", recipe, keys, tokenizer)


def dpo(recipe: Recipe = None, /, *, tokenizer: Any = None, **keys: Any) -> RunResult:
    """Optimise ``model`` on preference pairs without a reward model; arguments as for `sft`."""
    return _call("dpo", recipe, keys, tokenizer)


def generate(recipe: Recipe = None, /, *, tokenizer: Any = None, **keys: Any) -> RunResult:
    """Sample responses to prompts, score them, make pairs of them; arguments as for `sft`.

    The rows are in ``result.samples``, and in ``result.pairs`` where ``pairs`` is set.
    """
    return _call("generate", recipe, keys, tokenizer)


def evaluate(recipe: Recipe = None, /, *, tokenizer: Any = None, **keys: Any) -> RunResult:
    """Measure ``model``, or several ``models``, on held-out prompts; arguments as for `sft`.

    ``result.evaluation`` is the content of ``eval.json``, and ``result.held_out`` its numbers as
    ``model/number``.
    """
    return _call("eval", recipe, keys, tokenizer)


def load_recipe(
    recipe: Recipe = None, /, *, stage: str | None = None, tokenizer: Any = None, **keys: Any
) -> Any:
    """Read a recipe as the stage's function would, and run nothing.

    Args:
        recipe: As for `sft`.
        stage: Its command (``sft``, ``rm``, ``ppo``, ``dpo``, ``generate``, ``eval``), where the
            recipe's file does not say it.
        tokenizer: As for `sft`.
        **keys: As for `sft`.

    Returns:
        A frozen dataclass of `align.config.keys`, which the stage's function takes as its recipe.

    Raises:
        AlignError: One line with the key, what it got and what is allowed.
    """
    from align.stages.api import load

    return load(recipe, keys, stage, tokenizer)


def _call(command: str, recipe: Any, keys: Mapping[str, Any], tokenizer: Any) -> RunResult:
    from align.stages.api import call

    return call(command, recipe, keys, tokenizer)


def __getattr__(name: str) -> Any:
    if name in LIBRARY:
        return importlib.import_module(f"align.{name}")
    raise AttributeError(f"module 'align' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *LIBRARY])
