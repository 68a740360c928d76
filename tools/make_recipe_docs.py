"""docs/recipe-keys.md: every key of every recipe, with type, default, range and meaning.

    python tools/make_recipe_docs.py

Meanings are the comments above the fields in align/config/keys.py and options.py (or the
`Attributes` of a docstring in align/types.py). A test fails when the page is out of date.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

PAGE = Path(__file__).parents[1] / "docs" / "recipe-keys.md"
sys.path.insert(0, str(PAGE.parents[1]))

from align.config.keys import CommonRecipe  # noqa: E402
from align.config.options import PPOTrainOptions  # noqa: E402
from align.config.ranges import RANGES  # noqa: E402
from align.stages import recipe_classes  # noqa: E402
from align.types import DataSource, RewardTerm  # noqa: E402

HEAD = """\
# Recipe keys

Made by `python tools/make_recipe_docs.py` from the code; do not edit by hand.
How a recipe is written: [recipes.md](recipes.md).

A dotted key such as `optim.lr` is `lr` in the section `optim`. In a recipe it stands indented under
its section; on a command line it is `optim.lr=1e-5`. "null" means: not set.
"""

# Class.field -> meaning, where the code has no comment, or one for several fields at once
MEANINGS: dict[str, str] = {
    "CommonRecipe.data": "where the rows come from; see the section `data`",
    "CommonRecipe.model": "folder, hub id or GGUF file of the model to start from",
    "CommonRecipe.output_dir": "folder of the run",
    "CommonRecipe.overwrite": "replace what a run has left in `output_dir`",
    "CommonRecipe.seed": "of sampling, shuffling, splits and new heads",
    "CommonRecipe.trust_remote_code": "run Python code that comes with a model from the hub",
    "DPOConfig.f_divergence": "map of the log-ratios (sigmoid, hinge, robust, exo_pair)",
    "DPOConfig.loss_type": "one of the [DPO losses](recipes.md#dpo-losses)",
    "DPOConfig.orpo_coef": "weight of orpo's odds-ratio term",
    "DPOConfig.simpo_gamma": "margin that simpo asks for, reward units",
    "DataConfig.max_test_rows": "the same of the held-out rows",
    "DataConfig.on_bad_row": "stop at the first bad row, or skip them and count them by reason",
    "DataConfig.test": "held-out sources; empty = `test_fraction` of the training prompts",
    "DataConfig.train": "sources of training rows",
    "EvalRecipe.data": "`data.test`, or else `data.train`: prompts, best with references",
    "EvalRecipe.model": "one checkpoint; or several in `models`",
    "EvalRecipe.models": (
        "name -> folder, hub id, adapter, GGUF file, checkpoint of a run or JSONL of outputs; "
        "`ppo#0` and `ppo#1` are seeds of ppo, compared as one"
    ),
    "EvalRecipe.output_dir": "folder of the run",
    "EvalRecipe.overwrite": "replace what a run has left in `output_dir`",
    "EvalRecipe.precision": "as for training",
    "EvalRecipe.preferences": (
        "as `data`: pairs whose held-out side `reward` is judged on; with equal seed and "
        "`test_fraction` the rows that `align rm` held out"
    ),
    "EvalRecipe.reward": "a reward or a list of them, as for PPO; scores every model's outputs",
    "EvalRecipe.seed": "of sampling and of the choice of rows",
    "EvalRecipe.tokens_per_microbatch": "tokens of one forward pass: sets the memory only",
    "EvalRecipe.trust_remote_code": "run Python code that comes with a model from the hub",
    "GenerateRecipe.pairs": "how samples become pairs; null = samples only",
    "GenerateRecipe.reward": "a reward or a list of them, as for PPO; scores every sample",
    "GenerateRecipe.tokens_per_microbatch": "tokens of one forward pass: sets the memory only",
    "KLConfig.adaptive": "move `coef` so that KL per response stays near `target`",
    "KLConfig.coef": "price of KL to the reference, reward units per nat",
    "KLConfig.estimator": "log-ratio, its half square, or the non-negative unbiased one",
    "KLConfig.horizon": "sequences over which `coef` may change by about a fifth",
    "KLConfig.target": "nats per response that an adaptive `coef` aims at",
    "OptimOptions.beta1": "AdamW: decay of the gradient's mean",
    "OptimOptions.beta2": "AdamW: decay of the gradient's square",
    "OptimOptions.eps": "AdamW: added to the root of the second moment",
    "OptimOptions.lr": "peak learning rate",
    "OptimOptions.schedule": "shape of the learning rate after the warm-up",
    "OptimOptions.weight_decay": "AdamW: per step, times lr; none on norms and biases",
    "PPOConfig.clip_range": "how far the ratio to the old policy may leave 1 and still earn",
    "PPOConfig.epochs": "passes over each rollout",
    "PPOConfig.gae_lambda": "0 = one-step residual, 1 = whole return minus value",
    "PPOConfig.iterations": "rollouts, each trained on for `epochs` passes",
    "PPOConfig.gamma": "discount per token",
    "PPOConfig.whiten_advantages": "shift and scale them to mean 0, variance 1 over the rollout",
    "PPORecipe.reference_model": "folder or hub id; null = the model that training starts from",
    "RewardTerm.timeout": "seconds that a call of a function may take; null waits for ever",
    "RewardTerm.weight": "factor before the sum",
}


def render() -> str:
    """The whole page."""
    recipes = recipe_classes()
    parts = [HEAD, _overview(recipes), _table("Keys of every command but `eval`", CommonRecipe, "")]
    common = frozenset(f.name for f in fields(CommonRecipe))
    for command, cls in recipes.items():
        known = common if issubclass(cls, CommonRecipe) else frozenset()
        parts.append(_table(f"Further keys of `align {command}`", cls, "", leave_out=known))
    for name, cls in _sections(recipes.values()).items():
        parts.append(_table(f"Section `{name}`", cls, f"{name.split('`')[0]}."))
    return "\n".join(part for part in parts if part)


def _overview(recipes: Mapping[str, type]) -> str:
    lines = ["| command | sections |", "|---|---|"]
    for command, cls in recipes.items():
        names = [f.name for f in fields(cls) if _section_class(get_type_hints(cls)[f.name])]
        lines.append(f"| `align {command}` | {', '.join(f'`{n}`' for n in names)} |")
    return "\n".join(lines) + "\n"


def _sections(recipes: Any) -> dict[str, type]:
    """Section -> class, sections of sections included, in order of use."""
    found: dict[str, type] = {}
    for cls in recipes:
        for name, hint in get_type_hints(cls).items():
            inner = _section_class(hint)
            if inner is not None:
                same = {"sampling": "generation", "preferences": "data"}
                section = same.get(name, name)
                if inner is PPOTrainOptions:
                    section = "train` of `align ppo"
                found.setdefault(section, inner)
                for part, of_section in get_type_hints(inner).items():
                    if is_dataclass(of_section):
                        found.setdefault(f"{section}.{part}", of_section)  # type: ignore[arg-type]
    found["data.train"] = DataSource
    order = ["data", "data.train", *(n for n in found if not n.startswith("data"))]
    return {name: found[name] for name in order}


def _section_class(hint: Any) -> type | None:
    """The dataclass of a field, of its items or of its value where it may be null."""
    return next((p for p in (hint, *get_args(hint)) if is_dataclass(p)), None)  # type: ignore


def _table(title: str, cls: type, prefix: str, *, leave_out: frozenset[str] = frozenset()) -> str:
    hints = get_type_hints(cls)
    rows = []
    for f in fields(cls):
        key, kind = f"`{prefix}{f.name}`", _kind(hints[f.name])
        if f.name in leave_out or (kind == "section" and not meaning(cls, f.name)):
            continue  # a section has a table of its own
        allowed = _range(cls, f.name)
        kind = f"{kind}, {allowed}" if allowed else kind
        rows.append(f"| {key} | {kind} | {_default(f)} | {meaning(cls, f.name)} |")
    if not rows:
        return ""
    heading = ["| key | type | default | meaning |", "|---|---|---|---|"]
    return "\n".join([f"## {title}\n", *heading, *rows]) + "\n"


# ---------------------------------------------------------------- one field


def meaning(cls: type, name: str) -> str:
    owner = _owner(cls, name)
    return MEANINGS.get(f"{owner.__name__}.{name}") or comments(owner).get(name, "")


def comments(cls: type) -> dict[str, str]:
    """Field -> the comment lines directly above it, or its entry under `Attributes`."""
    found = dict(_attributes(inspect.getdoc(cls) or ""))
    pending: list[str] = []
    for line in inspect.getsource(cls).splitlines():
        text = line.strip()
        if text.startswith("# "):
            pending.append(text[2:])
            continue
        field_line = re.match(r"(\w+): ", text)
        if field_line and pending and line.startswith("    ") and not line.startswith("     "):
            found[field_line[1]] = " ".join(pending)
        pending = []
    return found


def _attributes(docstring: str) -> Iterator[tuple[str, str]]:
    _, _, listed = docstring.partition("Attributes:\n")
    for entry in re.split(r"\n    (?=\w)", "\n" + listed)[1:]:
        name, _, text = entry.partition(":")
        text = " ".join(text.split()).rstrip(".").replace("``", "`")
        yield name, text[:1].lower() + text[1:]


def _owner(cls: type, name: str) -> type:
    """The class that declares the field."""
    return next(base for base in cls.__mro__ if name in vars(base).get("__annotations__", {}))


def _kind(hint: Any) -> str:
    args = get_args(hint)
    inner = _section_class(hint)
    if inner is DataSource:
        return "source, or a list"
    if inner is RewardTerm:
        return "reward, or a list"
    if inner is not None:
        return "section"
    if type(None) in args:
        return _kind(next(a for a in args if a is not type(None)))
    text = str(hint)
    if "Literal" in text:
        return " / ".join(f"`{a}`" for a in args)
    if "dict" in text or "Mapping" in text:
        return "name: text"
    if "tuple" in text:
        return "list of texts"
    return {"int": "whole number", "float": "number", "bool": "true / false"}.get(
        getattr(hint, "__name__", ""), "text"
    )


def _range(cls: type, name: str) -> str:
    names = (f"{base.__name__}.{name}" for base in cls.__mro__)
    interval = next((RANGES[n] for n in names if n in RANGES), "")
    return "" if interval == "(-inf, inf)" else interval.replace("inf", "∞")


def _default(f: Field[Any]) -> str:
    if f.default_factory is not MISSING:
        made = f.default_factory()
        if not is_dataclass(made):
            return ""
        plain = type(made)()  # what differs from the section's own defaults
        changed = [g.name for g in fields(made) if getattr(made, g.name) != getattr(plain, g.name)]
        return ", ".join(f"{name} = {getattr(made, name):g}" for name in changed)
    if f.default is MISSING:
        return "**needed**"
    if f.default is None:
        return "null"
    if isinstance(f.default, bool):
        return f"`{str(f.default).lower()}`"
    if isinstance(f.default, tuple):
        return f"`[{', '.join(map(str, f.default))}]`" if f.default else ""
    return f"`{f.default:g}`" if isinstance(f.default, float) else f"`{f.default}`"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
    print(f"{PAGE}: written")
