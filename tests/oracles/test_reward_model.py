"""`align rm` recovers the reward that its pairs were judged by, up to a constant per prompt."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch

from tests.oracles.language import PROMPTS, level, responses
from tests.oracles.stages import exact_pairs, score, tokens_of, train_reward_model, whole, write
from tools.trust import Trust


def recovered(run: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """True and learnt rewards of every response, each prompt's mean taken off both."""
    true, learnt = [], []
    for prompt in PROMPTS:
        wanted = torch.tensor([math.log(level(prompt, text)) for text in responses()]).double()
        found = score(run / "model", prompt, [tokens_of(text) for text in responses()])
        true.append(wanted - wanted.mean())
        learnt.append(found - found.mean())
    return torch.cat(true), torch.cat(learnt)


def test_exact_preferences_give_back_the_reward(
    reference: Path, tmp_path: Path, trust: Trust, plot: Callable[..., None]
) -> None:
    data = write(tmp_path / "pairs.jsonl", exact_pairs())
    run = train_reward_model(
        reference, tmp_path / "run", data, whole(max_steps=160, log_every=50), lr=0.2
    )
    true, learnt = recovered(run)
    worst = (learnt - true).abs().max().item()
    assert true.std() > 0.3
    trust.at_most("oracles", "Bradley-Terry, exact preferences: error of the reward", worst, 1e-2)
    plot(
        "reward_model_exact",
        {"a response, prompt's mean taken off": (true.tolist(), learnt.tolist())},
        x="true reward",
        y="learnt reward",
        title="align rm, exact preferences",
        log=False,
        points=True,
    )
