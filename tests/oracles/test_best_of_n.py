"""Best of n, as `align generate` picks it: its distribution, and its KL to the sampler."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from align.config.keys import GenerateRecipe, PairsConfig
from align.config.sections import GenerationOptions
from align.stages import generate
from tests.oracles.language import exact, kl, level
from tests.oracles.stages import REWARD, TOKENS, write
from tools.trust import Trust

GROUPS = 2000
"""Sets of n samples: frequencies of 20 responses are off by .04 in all, by chance."""


def best_of(n: int, logprobs: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """log-probs of the best of n; among equals the sampler's own proportions are kept."""
    p = logprobs.exp()
    found = torch.zeros_like(p)
    for value in levels.unique():
        tied = levels == value
        below, upto = p[levels < value].sum(), p[levels <= value].sum()
        found[tied] = (upto**n - below**n) * p[tied] / p[tied].sum()
    return found.log()


def test_the_best_of_n_is_as_far_away_as_theory_says(
    reference: Path, tmp_path: Path, trust: Trust, plot: Callable[..., None]
) -> None:
    n, prompt = 4, "p"
    ref = exact(AutoModelForCausalLM.from_pretrained(reference), prompt, most_tokens=TOKENS)
    levels = torch.tensor([level(prompt, text) for text in ref.texts])
    generate.run(
        GenerateRecipe(
            model=str(reference),
            output_dir=str(tmp_path / "run"),
            data=write(tmp_path / "prompts.jsonl", [{"prompt": prompt}] * GROUPS),
            precision="fp32",
            generation=GenerationOptions(max_new_tokens=TOKENS, samples_per_prompt=n, slots=4096),
            reward=REWARD,
            pairs=PairsConfig(),
            tokens_per_microbatch=10**6,
        )
    )
    lines = (tmp_path / "run" / "samples.jsonl").read_text("utf-8").splitlines()
    samples = [json.loads(line) for line in lines]
    # a set whose samples are all equally good makes no pair: its best is any of them, the first
    best = [
        max(samples[i : i + n], key=lambda row: row["score"])["response"]
        for i in range(0, len(samples), n)
    ]
    pairs = [json.loads(line) for line in (tmp_path / "run" / "pairs.jsonl").open()]
    assert sorted(p["chosen"] for p in pairs) == sorted(
        text
        for text, i in zip(best, range(0, len(samples), n), strict=True)
        if len({row["score"] for row in samples[i : i + n]}) > 1
    )
    wanted = best_of(n, ref.logprobs, levels)
    counts = torch.tensor([best.count(text) for text in ref.texts]).double() / len(best)
    off = 0.5 * (counts - wanted.exp()).abs().sum().item()
    trust.at_most("oracles", "best of 4: sampled frequencies, total variation", off, 0.05)
    bound = math.log(n) - (n - 1) / n
    measured = kl(counts.log(), ref.logprobs)
    assert measured > 0.1
    trust.at_most("oracles", "best of 4: KL to the sampler, log n - (n-1)/n", measured, bound)
    sizes = [1, 2, 4, 8, 16, 32, 64]
    exactly = [kl(best_of(k, ref.logprobs, levels), ref.logprobs) for k in sizes]
    plot(
        "best_of_n",
        {
            "exact KL": (sizes, exactly),
            "bound log n - (n-1)/n": (sizes, [math.log(k) - (k - 1) / k for k in sizes]),
        },
        x="n",
        y="KL(best of n, reference), nats",
        title="best of n",
        log=False,
    )
