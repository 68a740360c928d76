"""Every key of every stage has an effect wherever it is set, or is refused where it has none.

Each key of each recipe is in one of three lists here, and a new key fails until it is: refused
beside others (with the combination), refused by the run itself (with the test that shows it), or of
effect in whatever combination.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from align.config.build import dotted_keys
from align.config.effects import RULES
from align.config.load import load_recipe, shipped_recipes, stage_of
from align.stages import recipe_classes
from align.types import AlignError

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
    "data.streaming_window": [([], "9")],
    "train.epochs": [(["train.max_steps=3"], "2")],
    "train.eval_every": [(NONE_HELD_OUT, "5")],
    "train.keep_best": [([], "loss"), ([*NONE_HELD_OUT, "train.save_every=5"], "loss")],
    "train.keep_checkpoints": [([], "3")],
    "optim.final_lr_fraction": [(["optim.schedule=constant"], "0.1")],
    "resume": [(["overwrite=true"], "auto")],
}
NOT_SFT: Cases = {"data.loss_on": [([], "all")]}
SAMPLES: Cases = {
    "generation.vllm.eager": [([], "true")],
    "generation.vllm.max_tokens": [([], "99")],
    "generation.vllm.gpu_memory_utilization": [([], "0.5")],
}
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
        **SAMPLES,
        **{key: cases for key, cases in TRAINS.items() if key != "train.epochs"},
        **REWARDED,
        "data.streaming": [([], "true")],
        "generation.top_p": [([], "0.9")],
        "train.keep_best": [([], "score"), ([*NONE_HELD_OUT, "train.save_every=5"], "score")],
        "ppo.clip_range": [(["ppo.epochs=1", "ppo.num_minibatches=1"], "0.3")],
        "ppo.value_clip_range": [(["ppo.epochs=1", "ppo.num_minibatches=1"], "0.3")],
        "ppo.critic_warmup": [(["ppo.iterations=5"], "5")],
        "kl.target": [([], "9")],
        "kl.horizon": [([], "99")],
        "kl.charge": [(["kl.coef=0", "kl.estimator=k3"], "loss")],
        "kl.estimator": [(["kl.charge=loss", "kl.estimator=k2"], "k1")],
        "lora.dropout": [(["lora.r=8"], "0.1")],
    },
    "generate": {
        **NOT_SFT,
        **SAMPLES,
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
        "pairs.threshold": [
            (["reward=r", "generation.samples_per_prompt=2", "pairs.choose=all"], "3")
        ],
        "best_of_n": [(["reward=r"], "true")],
    },
    "eval": {
        **SAMPLES,
        **GREEDY,
        **REWARDED,
        **{f"gold_{key}": [([s.replace("reward", "gold_reward") for s in c], v) for c, v in cases]
           for key, cases in REWARDED.items()},
        **{key.replace("generation", "sampling"): [
            ([s.replace("generation", "sampling") for s in context], value)
            for context, value in cases
        ] for key, cases in {**SAMPLES, **GREEDY}.items()},
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
        "reference_decay": [([], "0.9"), (["reference=refresh"], "0.9")],
        "stop.patience": [(["rounds=2"], "2")],
        "dpo": [([], "d")],
        "rm": [(["ppo=p"], "null")],
        "resume": [(["overwrite=true"], "auto")],
    },
}  # fmt: skip
SOURCE = ("name", "split")
BY_THE_RUN = {
    # tests/data/test_splits.py
    *(f"{data}.{side}.{key}" for data in ("data", "preferences") for side in ("train", "test")
      for key in SOURCE),
    # tests/stages/test_reward_model.py
    "reward_model.use_margin",
    # tests/stages/test_dpo.py: `stages/dpo_options.py`
    *(f"dpo.{key}" for key in ("beta", "label_smoothing", "f_divergence", "f_alpha",
                               "simpo_gamma", "orpo_coef", "reference", "reference_model")),
    # tests/models/test_lora.py, tests/models/test_offload.py
    "lora.target_modules", "lora.top_layers", "activation_offload", "attention",
    # tests/stages/test_iterate.py
    "set", "stop.max_kl",
    # tests/models/test_adapters.py: `model_checks.py`; tests/models/test_router.py
    "base_model", "train.router_aux_coef",
}  # fmt: skip
# How models are measured may stand in an evaluation of a reward alone, and a reference beside
# greedy outputs: what they would add is not shown, and nothing that is shown is wrong for it. That
# preferences or best_of_n are left out is a line of the run.
WHEREVER = {
    "model", "output_dir", "seed", "precision", "gradient_checkpointing", "trust_remote_code",
    "overwrite", "trackers", "from_scratch", "tokens_per_microbatch", "also", "pairs",
    "reference_model", "models", "num_resamples", "rounds",
    "generate", "ppo", "rm", "eval", "stop", "lora", "reward", "gold_reward", "preferences",
    "data", "train", "optim", "dpo", "kl", "critic", "generation", "sampling", "reward_model",
    "cache_outputs", "metrics", "pairs.choose", "pairs.min_margin", "critic.model", "critic.lr",
    "stop.min_pairs", "lora.r", "lora.alpha", "lora.dropout", "reward_model.center_coef",
    "reward_model.normalize", "dpo.loss_type", "dpo.sft_coef", "dpo.wpo_weights", "kl.coef",
    "kl.adaptive", "generation.samples_per_prompt", "data.max_test_rows", "best_of_n",
    *(f"ppo.{key}" for key in (
        "iterations", "rollout_batch", "epochs", "num_minibatches", "entropy_coef", "gamma",
        "estimator", "gae_lambda", "whiten_advantages", "whiten_rewards", "missing_eos_score",
    )),
    *(f"train.{key}" for key in (
        "max_steps", "minibatch", "tokens_per_microbatch", "log_every", "save_every",
        "on_nonfinite",
    )),
    *(f"optim.{key}" for key in (
        "lr", "schedule", "warmup_fraction", "weight_decay", "beta1", "beta2", "eps",
        "max_grad_norm",
    )),
    *(f"{name}.{key}" for name in ("generation", "sampling") for key in (
        "max_new_tokens", "temperature", "slots", "engine", "vllm",
    )),
    *(f"{reward}.{key}" for reward in ("reward", "gold_reward") for key in (
        "model", "function", "metric",
    )),
    *(f"{data}.{key}" for data in ("data", "preferences") for key in (
        "train", "test", "columns", "on_bad_row", "max_tokens", "max_train_rows", "order",
        "loss_on", "streaming",
        *(f"{side}.{key}" for side in ("train", "test") for key in ("path", "weight", "columns")),
    )),
}  # fmt: skip


def load(stage: str, folder: Path, overrides: list[str]) -> Any:
    path = folder / "my.yaml"
    path.write_text(BASE[stage], encoding="utf-8")
    return load_recipe(CLASSES[stage], str(path), overrides)


@pytest.mark.parametrize(
    ("stage", "key"), [(stage, key) for stage, cls in CLASSES.items() for key in dotted_keys(cls)]
)
def test_every_key_of_every_stage_is_accounted_for(stage: str, key: str) -> None:
    assert key in {*REFUSED[stage], *BY_THE_RUN, *WHEREVER}, f"{stage}: where has {key} no effect?"


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
    stages = {cls: name for name, cls in CLASSES.items()}
    for kind, rules in RULES:
        for stage in [stages[kind]] if kind in stages else ["sft", "rm", "dpo", "ppo"]:
            for key in rules:
                section = key.split(".")[0]
                known = {
                    k for k in REFUSED[stage] if k in (key, section) or k.startswith(f"{key}.")
                }
                assert known or (stage, key) == ("sft", "data.loss_on"), f"{stage}: {key}"


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
