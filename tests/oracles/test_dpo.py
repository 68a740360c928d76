"""`align dpo` against optima known in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from align.config.keys import DPOConfig
from align.training import loop
from tests.oracles.language import BETA, exact
from tests.oracles.stages import (
    TOKENS,
    approach,
    exact_pairs,
    tokens_of,
    train_dpo,
    whole,
    write,
)
from tools.trust import Trust

PAIRS = [
    {"prompt": "p", "chosen": "ab", "rejected": "c"},
    {"prompt": "q", "chosen": "d", "rejected": "da"},
]
"""One for each prompt: nothing else holds them, so each goes where its loss is lowest."""


def logprob(model: Any, prompt: str, text: str) -> torch.Tensor:
    found = exact(model, prompt, most_tokens=TOKENS)
    return found.logprobs[found.texts.index(text)]


def log_ratio_gaps(run: Path, reference: Path) -> list[float]:
    """h = log-ratio of chosen minus that of rejected, of each of PAIRS, by plain transformers."""
    policy, ref = (AutoModelForCausalLM.from_pretrained(m) for m in (run / "model", reference))
    return [
        sum(
            sign * (logprob(policy, p["prompt"], p[side]) - logprob(ref, p["prompt"], p[side]))
            for side, sign in (("chosen", 1), ("rejected", -1))
        ).item()
        for p in PAIRS
    ]


def test_exact_preferences_reach_the_optimum(
    reference: Path, tmp_path: Path, trust: Trust, plot: Callable[..., None]
) -> None:
    data = write(tmp_path / "pairs.jsonl", exact_pairs())
    run = train_dpo(
        reference,
        tmp_path / "run",
        data,
        DPOConfig(beta=BETA),
        whole(max_steps=170, save_every=10, log_every=50),
        lr=0.2,
    )
    steps, found = approach(run, reference, "model")
    assert found[0] > 0.4
    trust.at_most("oracles", "DPO, exact preferences: KL(pi, pi*), nats", found[-1], 1e-6)
    plot(
        "dpo_exact",
        {"tabular policy, all pairs in a step": (steps, found)},
        bound=1e-6,
        x="optimizer steps",
        y="KL(pi, pi*), nats",
        title="align dpo, exact preferences",
    )


# loss -> what the log-ratio gap h of a pair is at the loss's minimum
OPTIMA: dict[str, tuple[dict[str, Any], float]] = {
    "cDPO": ({"label_smoothing": 0.1}, math.log(9) / BETA),
    "IPO (sums, the paper's)": ({"loss_type": "ipo_sum"}, 1 / (2 * BETA)),
}


@pytest.mark.parametrize("name", OPTIMA)
def test_the_gap_of_a_pair_reaches_the_minimum_of_its_loss(
    name: str, reference: Path, tmp_path: Path, trust: Trust
) -> None:
    options, best = OPTIMA[name]
    run = train_dpo(
        reference,
        tmp_path / "run",
        write(tmp_path / "pairs.jsonl", PAIRS),
        DPOConfig(beta=BETA, **options),
        whole(max_steps=220, log_every=50),
        lr=0.2,
    )
    error = max(abs(h - best) / best for h in log_ratio_gaps(run, reference))
    trust.at_most("oracles", f"{name}: log-ratio gap against its optimum, relative", error, 1e-3)


def test_the_first_gradient_is_minus_half_beta_times_the_difference(
    reference: Path,
    tmp_path: Path,
    first_gradients: Callable[[Any], list[torch.Tensor]],
    trust: Trust,
) -> None:
    """-beta / 2 (grad log pi(chosen) - grad log pi(rejected)), the mean over pairs."""
    seen = first_gradients(loop)
    data = write(tmp_path / "pairs.jsonl", PAIRS)
    train_dpo(reference, tmp_path / "run", data, DPOConfig(beta=BETA), whole(max_steps=1), lr=1e-3)
    model = AutoModelForCausalLM.from_pretrained(reference)
    total = torch.zeros(())
    for pair in PAIRS:
        for side, sign in (("chosen", 1), ("rejected", -1)):
            row = torch.tensor([tokens_of(pair["prompt"] + pair[side])])
            logits = model(input_ids=row).logits[:, :-1].double()
            taken = logits.log_softmax(-1).gather(-1, row[:, 1:, None]).sum()
            total = total + sign * taken / len(PAIRS)
    (wanted,) = torch.autograd.grad(-BETA / 2 * total, [model.model.table.weight])
    error = ((seen[0] - wanted).norm() / wanted.norm()).item()
    trust.at_most("oracles", "DPO's gradient at the start, relative error", error, 1e-6)
