"""Every key of every stage has an effect wherever it is set, or is refused where it has none.

A key is read by some module that its stage imports, or it is refused there. What a key has no
effect beside is its annotation `When`, or a rule of align/config/effects.py with a case in
`REFUSED`.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from align.config.annotations import Range, When, notes
from align.config.build import dotted_keys
from align.config.describe import ITEMS, sections
from align.config.effects import RULES
from align.config.load import load_recipe, shipped_recipes, stage_of
from align.stages import STAGES, recipe_classes
from align.types import AlignError

ROOT = Path(__file__).parents[2]
CLASSES = recipe_classes()
BASE = {
    "sft": "model: m\noutput_dir: o\ndata: d.jsonl\n",
    "rm": "model: m\noutput_dir: o\ndata: d.jsonl\n",
    "dpo": "model: m\noutput_dir: o\ndata: d.jsonl\n",
    "ppo": "model: m\noutput_dir: o\ndata: d.jsonl\nreward: {model: r}\n",
    "generate": "model: m\noutput_dir: o\ndata: d.jsonl\n",
    "eval": "models: {a: x, b: y}\noutput_dir: o\ndata: d\nreward: {model: r}\nsampling: {}\n",
    "iterate": "model: m\noutput_dir: o\ngenerate: g\neval: e\nrm: r\nppo: p\n",
}
NONE_HELD_OUT = ["data.test_fraction=0"]

Cases = dict[str, list[tuple[list[str], str]]]
"""Key -> what it has no effect beside, and a value."""

TRAINS: Cases = {
    "data.test_fraction": [(["data.test=t.jsonl"], "0.2")],
    "data.max_test_rows": [(NONE_HELD_OUT, "9")],
    "train.epochs": [(["train.max_steps=3"], "2")],
    "train.eval_every": [(NONE_HELD_OUT, "5")],
    "train.keep_best": [([], "loss"), ([*NONE_HELD_OUT, "train.save_every=5"], "loss")],
    "train.keep_checkpoints": [([], "3")],
    "resume": [(["overwrite=true"], "auto")],
}
NOT_SFT: Cases = {"data.loss_on": [([], "all")]}
GREEDY: Cases = {
    "generation.top_p": [(["generation.temperature=0"], "0.9")],
    "generation.samples_per_prompt": [(["generation.temperature=0"], "4")],
}
REWARDED: Cases = {
    "reward.weight": [(["reward={metric: chrf}"], "0")],
    "reward.timeout": [(["reward={metric: chrf}"], "9"), (["reward={model: r}"], "9")],
}
NOT_IN_EVAL = ("max_tokens", "max_train_rows", "loss_on", "order", "streaming", "streaming_window")
VALUES = {"loss_on": "all", "order": "given", "streaming": "true"}
REFUSED: dict[str, Cases] = {
    "sft": {
        **TRAINS,
        "train.keep_best": [*TRAINS["train.keep_best"], (["train.save_every=5"], "accuracy")],
    },
    "rm": {**TRAINS, **NOT_SFT, "reward_model.pooling_layer": [(["lora.r=8"], "true")]},
    "dpo": {**TRAINS, **NOT_SFT},
    "ppo": {
        **NOT_SFT,
        **{key: cases for key, cases in TRAINS.items() if key != "train.epochs"},
        **REWARDED,
        "data.streaming": [([], "true")],
        "generation.top_p": [([], "0.9")],
        "train.keep_best": [([], "score"), ([*NONE_HELD_OUT, "train.save_every=5"], "score")],
        "ppo.clip_range": [(["ppo.epochs=1", "ppo.num_minibatches=1"], "0.3")],
        "ppo.value_clip_range": [(["ppo.epochs=1", "ppo.num_minibatches=1"], "0.3")],
        "ppo.critic_warmup": [(["ppo.iterations=5"], "5")],
        "kl.charge": [(["kl.coef=0", "kl.estimator=k3"], "loss")],
        "kl.estimator": [(["kl.charge=loss", "kl.estimator=k2"], "k1")],
        "lora.dropout": [(["lora.r=8"], "0.1")],
    },
    "generate": {
        **NOT_SFT,
        **GREEDY,
        **REWARDED,
        **{f"data.{key}": [([], value)] for key, value in {
            "test": "t.jsonl", "test_fraction": "0.2", "max_test_rows": "9", "order": "given",
            "streaming": "true", "streaming_window": "9",
        }.items()},
        "gradient_checkpointing": [([], "true")],
        "activation_offload": [([], "true")],
        "trackers": [([], "wandb")],
        "resume": [([], "auto")],
        "best_of_n": [(["reward=r"], "true")],
    },
    "eval": {
        **GREEDY,
        **REWARDED,
        **{f"gold_{key}": [([s.replace("reward", "gold_reward") for s in c], v) for c, v in cases]
           for key, cases in REWARDED.items()},
        **{key.replace("generation", "sampling"): [
            ([s.replace("generation", "sampling") for s in context], value)
            for context, value in cases
        ] for key, cases in GREEDY.items()},
        **{f"data.{key}": [([], VALUES.get(key, "9"))] for key in NOT_IN_EVAL},
        **{f"preferences.{key}": [(["preferences.train=p"], VALUES.get(key, "9"))]
           for key in NOT_IN_EVAL},
        "data.test_fraction": [([], "0.2")],
        "data.train": [(["data.train=[]", "data.test=t"], "d")],
        "generation.samples_per_prompt": [([], "2")],
        "model": [([], "m")],
        "judge": [(["models={a: x}"], "math:gcd")],
        "tie_margin": [(["models={a: x}"], "0.1"), (["reward=[]"], "0.1")],
                "preferences.train": [(["preferences.test=t"], "p")],
        "preferences.test_fraction": [(["preferences.test=t"], "0.2"), ([], "0.2")],
        "preferences.columns": [([], "{prompt: q}")],
        "preferences.on_bad_row": [([], "skip")],
        "preferences.max_test_rows": [([], "9")],
    },
    "iterate": {
        "reference": [(["rounds=1"], "refresh")],
        "stop.patience": [(["rounds=2"], "2")],
        "dpo": [([], "d")],
        "rm": [(["ppo=p"], "null")],
        "resume": [(["overwrite=true"], "auto")],
    },
}  # fmt: skip
# what treats all keys alike, or only describes them, does not count as a use
NOT_USES = ("config", "cli", "commands", "types")


def imported(source: str) -> set[str]:
    """Modules of align that a text imports, those inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return {name for name in found if name.startswith("align.")}


def attributes(source: str) -> set[str]:
    """Names of the attributes that a text reads."""
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Attribute)]
    return {n.attr for n in nodes if isinstance(n.ctx, ast.Load)}


def read_by(stage: str) -> set[str]:
    """Attributes that are read in the modules that a stage imports, directly or not."""
    seen, found = {"align.stages"}, set[str]()  # the table imports every stage
    todo = list(imported(inspect.getsource(STAGES[stage].run)))
    while todo:
        name = todo.pop()
        if name in seen or name.split(".")[1] in NOT_USES:
            continue
        seen.add(name)
        base = ROOT.joinpath(*name.split("."))
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                source = path.read_text(encoding="utf-8")
                todo += imported(source)
                found |= attributes(source)
    return found


READ = {stage: read_by(stage) for stage in STAGES}


def load(stage: str, folder: Path, overrides: list[str]) -> Any:
    path = folder / "my.yaml"
    path.write_text(BASE[stage], encoding="utf-8")
    return load_recipe(CLASSES[stage], str(path), overrides)


@pytest.mark.parametrize(
    ("stage", "key"), [(stage, key) for stage, cls in CLASSES.items() for key in dotted_keys(cls)]
)
def test_every_key_of_every_stage_is_read_or_refused(stage: str, key: str) -> None:
    leaf = key.rpartition(".")[2]
    assert leaf in READ[stage] or key in REFUSED[stage], (
        f"align {stage} accepts {key}, and nothing that it imports reads .{leaf}: refuse it in "
        "align/config/effects.py"
    )


def test_the_check_would_see_a_key_that_nothing_reads() -> None:
    """The gate's own proof: each is a key of another stage."""
    for stage, key in (("sft", "rollout_batch"), ("dpo", "gae_lambda"), ("ppo", "use_margin")):
        assert key not in READ[stage]


@pytest.mark.parametrize(
    ("stage", "key", "context", "value"),
    [
        (stage, key, context, value)
        for stage, cases in REFUSED.items()
        for key, combinations in cases.items()
        for context, value in combinations
    ],
)
def test_a_key_without_effect_is_refused(
    tmp_path: Path, stage: str, key: str, context: list[str], value: str
) -> None:
    """The combination alone is fine; the key beside it is one line that names it."""
    if key != "rm":
        load(stage, tmp_path, [c for c in context if "pairs" not in c])
    with pytest.raises(AlignError) as caught:
        load(stage, tmp_path, [*context, f"{key}={value}"])
    line = str(caught.value)
    assert "\n" not in line
    assert any(name in line for name in (key, key.split(".")[0])), line


def test_every_rule_has_its_case() -> None:
    """A rule that no combination above meets would be tested by nothing."""
    for kinds, rules in RULES:
        for stage in (name for name, cls in CLASSES.items() if issubclass(cls, kinds)):
            for key in rules:
                section = key.split(".")[0]
                known = {
                    k for k in REFUSED[stage] if k in (key, section) or k.startswith(f"{key}.")
                }
                assert known or (stage, key) == ("sft", "data.loss_on"), f"{stage}: {key}"


def conditions(cls: type, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(key, a value of it, override that leaves it without effect) of each `When` of a recipe."""
    hints = get_type_hints(cls)
    for name, when in notes(cls, When).items():
        key, owner = prefix + name, cls
        if is_dataclass(hints[name]):  # a section: by its first number
            owner = hints[name]
            name = next(iter(notes(owner, Range)))
            key = f"{key}.{name}"
        number = next(n for n in (0.25, 2) if n in notes(owner, Range)[name])
        switch = hints[when.key]
        values = ("false",) if switch is bool else get_args(switch)
        idle = next(v for v in values if v not in when.values)
        yield key, f"{number}", f"{prefix}{when.key}={idle}"
    for name, inner in sections(cls):
        if "." not in name and inner not in ITEMS:
            yield from conditions(inner, f"{prefix}{name}.")


@pytest.mark.parametrize(
    ("stage", "case"), [(stage, case) for stage, cls in CLASSES.items() for case in conditions(cls)]
)
def test_a_condition_in_an_annotation_is_held(
    tmp_path: Path, stage: str, case: tuple[str, str, str]
) -> None:
    key, value, without_effect = case
    context = ["reward=r", "generation.samples_per_prompt=2"] if key.startswith("pairs.") else []
    named = key if key.count(".") < 2 else key.rpartition(".")[0]
    with pytest.raises(AlignError, match=rf"^command line: {named}: has (an|no) effect "):
        load(stage, tmp_path, [*context, without_effect, f"{key}={value}"])


def test_shipped_recipes_hold_no_key_without_effect() -> None:
    names = list(shipped_recipes())
    assert len(names) > 15
    for name in names:
        load_recipe(CLASSES[stage_of(name, CLASSES)], name)


def test_what_stands_in_for_a_recipes_own_key_drops_it(tmp_path: Path) -> None:
    path = tmp_path / "sft.yaml"
    path.write_text(
        "model: m\noutput_dir: o\ndata: {train: a, test_fraction: 0.2}\ntrain: {epochs: 3}\n"
    )
    recipe = load_recipe(CLASSES["sft"], str(path), ["data.test=b", "train.max_steps=5"])
    assert (recipe.data.test_fraction, recipe.train.epochs) == (0.05, 1.0)
    with pytest.raises(AlignError, match=r"command line: train.epochs: has no effect beside"):
        load_recipe(CLASSES["sft"], str(path), ["train.max_steps=5", "train.epochs=2"])
    kept = load_recipe(CLASSES["sft"], str(path), ["train.max_steps=null"])
    assert kept.train.epochs == 3.0
