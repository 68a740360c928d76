"""`align ppo` against its optimum pi* = pi_ref exp(r / beta) / Z, known in closed form."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from align.stages.ppo import update as ppo_update
from tests.oracles.language import (
    PROMPTS,
    exact,
    optimum,
    prefixes,
    save_optimum,
    soft_value,
)
from tests.oracles.stages import (
    TOKENS,
    approach,
    metrics,
    score,
    tokens_of,
    train_ppo,
)
from tools.trust import Trust


@pytest.fixture(scope="module")
def trained(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run of the plain algorithm, which the tests below look at from several sides."""
    return train_ppo(
        reference,
        tmp_path_factory.mktemp("ppo") / "run",
        batch=256,
        lr=0.2,
        ppo={"iterations": 50},
        train={"save_every": 5},
    )


def test_the_policy_reaches_the_optimum(
    trained: Path, reference: Path, trust: Trust, plot: Callable[..., None]
) -> None:
    steps, found = approach(trained, reference, "actor")
    assert found[0] > 0.4
    trust.at_most("oracles", "PPO, tabular: KL(pi, pi*), nats", found[-1], 1e-3)
    gap = [(row["step"], row["optimality_gap"]) for row in metrics(trained) if "kl" in row]
    trust.at_most("oracles", "PPO: optimality gap of the last rollout", gap[-1][1], 0.03)
    assert gap[0][1] > 0.3
    plot(
        "ppo_tabular",
        {
            "KL(pi, pi*), nats: what only the oracle knows": (steps, found),
            "optimality gap, reward units: what every run logs": tuple(zip(*gap, strict=True)),
        },
        bound=1e-3,
        x="iterations of 256 responses",
        y="distance to the optimum",
        title="align ppo, tabular policy",
    )


def test_the_critic_is_the_soft_value(
    trained: Path, reference: Path, trust: Trust, plot: Callable[..., None]
) -> None:
    """beta log E_ref[exp(r / beta)] of every prefix that the optimum reaches in 1 of 100."""
    model = AutoModelForCausalLM.from_pretrained(reference)
    wanted, learnt = [], []
    for prompt in PROMPTS:
        ref = exact(model, prompt, most_tokens=TOKENS)
        best, _ = optimum(ref, prompt)
        for prefix in prefixes():
            inside = (ref.tokens[:, : len(prefix)] == torch.tensor(prefix)).all(1)
            if best[inside].exp().sum() > 0.01:
                wanted.append(soft_value(ref, prompt, prefix))
                learnt.append(score(trained / "critic", prompt, [prefix]).item())
    worst = max(abs(a - b) for a, b in zip(wanted, learnt, strict=True))
    assert max(wanted) - min(wanted) > 0.5
    assert len(wanted) > 10
    trust.at_most("oracles", "PPO's critic: largest error of a soft value", worst, 0.05)
    plot(
        "critic",
        {"a prefix": (wanted, learnt)},
        x="soft value beta log E_ref[exp(r / beta)]",
        y="the critic's value",
        title="align ppo, critic",
        log=False,
        points=True,
    )


def test_reward_minus_kl_is_what_the_partition_function_allows(
    trained: Path, reference: Path, trust: Trust
) -> None:
    """E[r - beta log pi/pi_ref] = beta log Z - beta KL(pi, pi*): as logged, at the end."""
    model = AutoModelForCausalLM.from_pretrained(reference)
    ceiling = sum(optimum(exact(model, p, most_tokens=TOKENS), p)[1] for p in PROMPTS) / 2
    last = [row for row in metrics(trained) if "kl" in row][-1]
    error = abs(last["score_mean"] - last["kl_coef"] * last["kl"] - ceiling)
    trust.at_most("oracles", "PPO: score - kl_coef KL against beta log Z", error, 5e-3)


def test_nothing_moves_at_the_optimum(
    reference: Path, tmp_path: Path, first_gradients: Callable[[Any], Any], trust: Trust
) -> None:
    """With pi* as the policy and soft values as the critic every advantage is 0."""
    policy, critic = save_optimum(tmp_path / "optimum", reference)
    seen = first_gradients(ppo_update)
    run = train_ppo(
        policy,
        tmp_path / "run",
        batch=64,
        lr=1e-6,
        reference_model=str(reference),
        critic={"model": str(critic)},
        ppo={"iterations": 1, "epochs": 1},
    )
    (row,) = metrics(run)
    trust.at_most("oracles", "PPO at the optimum: optimality gap", row["optimality_gap"], 1e-5)
    trust.at_most("oracles", "PPO at the optimum: actor's gradient", seen[0].norm().item(), 1e-6)
    assert row["explained_variance"] > 0.999
    assert row["kl"] > 0.1


@pytest.mark.parametrize("gae_lambda", [0.0, 1.0])
def test_the_first_gradient_is_reinforce_with_baseline(
    gae_lambda: float,
    reference: Path,
    tmp_path: Path,
    first_gradients: Callable[[Any], list[torch.Tensor]],
    trust: Trust,
) -> None:
    """- mean over tokens of A grad log pi; A = r - V (lambda 1) or V[t+1] + r - V[t] (lambda 0)."""
    _, critic = save_optimum(tmp_path / "optimum", reference)
    seen = first_gradients(ppo_update)
    run = train_ppo(
        reference,
        tmp_path / "run",
        batch=64,
        lr=1e-6,
        critic={"model": str(critic)},
        ppo={"iterations": 1, "epochs": 1, "gae_lambda": gae_lambda},
    )
    model = AutoModelForCausalLM.from_pretrained(reference)
    soft = {p: exact(model, p, most_tokens=TOKENS) for p in PROMPTS}
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text("utf-8").splitlines()]
    total, count = torch.zeros(()), 0
    for sample in samples:
        prompt, tokens = sample["prompt"], tokens_of(sample["response"])
        row = torch.tensor([tokens_of(prompt + sample["response"])])
        logprobs = model(input_ids=row).logits[0, :-1].double().log_softmax(-1)
        values = [soft_value(soft[prompt], prompt, tokens[:t]) for t in range(len(tokens))]
        ahead = [*values[1:], sample["score"]]
        for t, token in enumerate(tokens):
            advantage = (ahead[t] if gae_lambda == 0 else sample["score"]) - values[t]
            total = total - advantage * logprobs[t, token]
            count += 1
    (wanted,) = torch.autograd.grad(total / count, [model.model.table.weight])
    error = ((seen[0] - wanted).norm() / wanted.norm()).item()
    what = f"PPO's first gradient, GAE lambda {gae_lambda:g}: error against REINFORCE"
    trust.at_most("oracles", what, error, 1e-5)
