"""What 100,000 hard labels are enough for: `align dpo` and `align rm` on sampled preferences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from align.config.keys import DPOConfig
from align.config.sections import DataConfig, TrainOptions
from tests.oracles.language import BETA
from tests.oracles.stages import (
    approach,
    sampled_pairs,
    train_dpo,
    train_reward_model,
    write,
)
from tests.oracles.test_reward_model import recovered
from tools.trust import Trust

LABELS = 100_000
TRAIN = {"minibatch": 5000, "tokens_per_microbatch": 10**6, "epochs": 4.0, "log_every": 20}


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    path = tmp_path_factory.mktemp("labels") / "pairs.jsonl"
    return write(path, sampled_pairs(LABELS))


def test_dpo_from_sampled_labels(
    labels: DataConfig, reference: Path, tmp_path: Path, trust: Trust, plot: Callable[..., None]
) -> None:
    train = TrainOptions(save_every=5, keep_checkpoints=10**6, **TRAIN)
    run = train_dpo(reference, tmp_path / "run", labels, DPOConfig(beta=BETA), train, lr=0.1)
    steps, found = approach(run, reference, "model")
    trust.at_most("oracles", "DPO, 100k sampled labels: KL(pi, pi*), nats", found[-1], 0.05)
    plot(
        "dpo_sampled",
        {"tabular policy, 5,000 pairs in a step": (steps, found)},
        bound=0.05,
        x="optimizer steps",
        y="KL(pi, pi*), nats",
        title="align dpo, 100,000 sampled labels",
    )


def test_reward_model_from_sampled_labels(
    labels: DataConfig, reference: Path, tmp_path: Path, trust: Trust
) -> None:
    train = TrainOptions(**TRAIN)
    run = train_reward_model(reference, tmp_path / "run", labels, train, lr=0.1)
    true, learnt = recovered(run)
    rmse = (learnt - true).square().mean().sqrt().item()
    trust.at_most("oracles", "Bradley-Terry, 100k sampled labels: RMSE of the reward", rmse, 0.1)
