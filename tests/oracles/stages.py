"""The shipped stages, `run(recipe)` as the command line calls it, on the toy language."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from align.config.keys import (
    CriticConfig,
    DPOConfig,
    DPORecipe,
    PPOConfig,
    PPORecipe,
    RewardModelConfig,
    RewardRecipe,
)
from align.config.sections import (
    DataConfig,
    DataSource,
    GenerationOptions,
    KLConfig,
    OptimOptions,
    PPOTrainOptions,
    RewardTerm,
    TrainOptions,
)
from align.stages import dpo, reward_model
from align.stages.ppo import run as ppo
from align.training.checkpoint import checkpoints
from tests.oracles.language import (
    BETA,
    END,
    MOST_LETTERS,
    PROMPTS,
    VOCABULARY,
    exact,
    kl,
    level,
    optimum,
    responses,
)

REWARD = (RewardTerm(function="tests.oracles.language:reward"),)
ALL = 10**6
"""Rows in a minibatch and tokens in a microbatch: the whole data set at once."""
TOKENS = MOST_LETTERS + 1
"""Of the longest response of the tabular language, end token included."""


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> DataConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return DataConfig(train=(DataSource(path=str(path)),), test_fraction=0.0)


def exact_pairs() -> list[dict[str, str]]:
    """Both orders of a pair as often as a Bradley-Terry judge of these rewards gives them.

    Each response meets four others, which is enough to tie them all together.
    """
    rows, words = [], responses()
    for prompt in PROMPTS:
        for i, x in enumerate(words):
            for step in (1, 7):
                y = words[(i + step) % len(words)]
                wins, losses = level(prompt, x), level(prompt, y)
                common = math.gcd(wins, losses)
                rows += [{"prompt": prompt, "chosen": x, "rejected": y}] * (wins // common)
                rows += [{"prompt": prompt, "chosen": y, "rejected": x}] * (losses // common)
    return rows


def sampled_pairs(count: int, *, seed: int = 0) -> list[dict[str, str]]:
    """Two responses at random, and one hard label from the same judge."""
    rng = torch.Generator().manual_seed(seed)
    words = responses()
    picks = torch.randint(len(words), (count, 2), generator=rng).tolist()
    coins = torch.rand(count, generator=rng).tolist()
    rows = []
    for number, ((i, j), coin) in enumerate(zip(picks, coins, strict=True)):
        prompt, x, y = PROMPTS[number % 2], words[i], words[j if j != i else i - 1]
        wins = coin < level(prompt, x) / (level(prompt, x) + level(prompt, y))
        chosen, rejected = (x, y) if wins else (y, x)
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def optim(lr: float, **options: Any) -> OptimOptions:
    return OptimOptions(**{"lr": lr, "warmup_fraction": 0.0, "max_grad_norm": 1e9} | options)


def whole(**options: Any) -> TrainOptions:
    plain = {"minibatch": ALL, "tokens_per_microbatch": ALL, "keep_checkpoints": ALL}
    return TrainOptions(**plain | options)


def train_dpo(
    model: Path, out: Path, data: DataConfig, options: DPOConfig, train: TrainOptions, lr: float
) -> Path:
    recipe = DPORecipe(
        model=str(model), output_dir=str(out), data=data, precision="fp32",
        dpo=options, train=train, optim=optim(lr),
    )  # fmt: skip
    dpo.run(recipe)
    return out


def train_reward_model(
    model: Path, out: Path, data: DataConfig, train: TrainOptions, lr: float
) -> Path:
    recipe = RewardRecipe(
        model=str(model), output_dir=str(out), data=data, precision="fp32",
        reward_model=RewardModelConfig(normalize=False), train=train, optim=optim(lr),
    )  # fmt: skip
    reward_model.run(recipe)
    return out


def ppo_recipe(model: Path, out: Path, *, batch: int, lr: float, **sections: Any) -> PPORecipe:
    """The plain algorithm: advantages as they are, no clipping of values, no EOS trick."""
    prompts = write(out.with_suffix(".prompts.jsonl"), [{"prompt": p} for p in PROMPTS])
    plain = {"missing_eos_score": None, "whiten_advantages": False, "value_clip_range": 0.0}
    memory = {"tokens_per_microbatch": ALL, "keep_checkpoints": ALL}
    tokens = sections.pop("tokens", TOKENS)
    return PPORecipe(
        model=str(model), output_dir=str(out), data=prompts, precision="fp32", reward=REWARD,
        ppo=PPOConfig(rollout_batch=batch, **plain | sections.pop("ppo", {})),
        kl=KLConfig(**{"coef": BETA} | sections.pop("kl", {})),
        generation=GenerationOptions(
            max_new_tokens=tokens, samples_per_prompt=batch // len(PROMPTS), slots=batch
        ),
        critic=CriticConfig(**sections.pop("critic", {})),
        optim=optim(lr, **sections.pop("optim", {})),
        train=PPOTrainOptions(**memory | sections.pop("train", {})), **sections,
    )  # fmt: skip


def train_ppo(model: Path, out: Path, **options: Any) -> Path:
    ppo.run(ppo_recipe(model, out, **options))
    return out


# ---------------------------------------------------------------- what came of it


def distance(policy: Any, reference: Any, *, tokens: int = TOKENS) -> float:
    """KL(pi || pi*) in nats, the mean over prompts; both are plain transformers models."""
    found = []
    for prompt in PROMPTS:
        best, _ = optimum(exact(reference, prompt, most_tokens=tokens), prompt)
        found.append(kl(exact(policy, prompt, most_tokens=tokens).logprobs, best))
    return sum(found) / len(found)


def approach(
    run: Path, start: Path, role: str, *, tokens: int = TOKENS
) -> tuple[list[int], list[float]]:
    """Steps, and KL(pi || pi*) at the start, at each of a run's checkpoints and at its end."""
    policy, reference = (AutoModelForCausalLM.from_pretrained(start) for _ in range(2))
    steps, found = [0], [distance(policy, reference, tokens=tokens)]
    for place in checkpoints(run / "checkpoints"):
        weights = load_file(place / f"{role}.safetensors")
        own = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
        assert not policy.load_state_dict(own, strict=False).unexpected_keys
        steps.append(int(place.name.removeprefix("step-")))
        found.append(distance(policy, reference, tokens=tokens))
    final = AutoModelForCausalLM.from_pretrained(run / "model")
    assert distance(final, reference, tokens=tokens) == found[-1]
    return steps, found


@torch.no_grad()
def score(folder: Path, prompt: str, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """What a saved tabular reward model or critic says behind each of these responses."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    first = VOCABULARY.index(prompt)
    found = [model.model(torch.tensor([[first, *row]])).last_hidden_state[0, -1] for row in rows]
    return model.score(torch.stack(found))[:, 0].double()


def tokens_of(text: str) -> list[int]:
    return [*(VOCABULARY.index(letter) for letter in text), END]


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
