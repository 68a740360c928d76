"""What is measured: stages, sizes, the peers' settings, and the points of how cost grows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import Job

STAGES = ("sft", "rm", "dpo", "dpo_cached", "ppo")
PEER = dict.fromkeys(STAGES, "trl-1.16.0") | {"ppo": "trl-1.12.0"}
# examples, pairs or episodes of one optimizer step; the learning rate on both sides
BATCH = {"sft": 8, "rm": 4, "dpo": 4, "dpo_cached": 4, "ppo": 16}
LR = {"sft": 2e-5, "rm": 1e-5, "dpo": 1e-6, "dpo_cached": 1e-6, "ppo": 3e-6}
# What a peer may choose without changing its updates (without a microbatch: all at once;
# checkpointing is its default). The long form measures all of them and compares with the fastest;
# the short form takes the first.
PEER_SETTINGS: dict[str, list[dict[str, Any]]] = {
    "sft": [{"microbatch": 1}, {"microbatch": 8}, {"padding_free": True}, {"checkpointing": True}],
    "rm": [{"microbatch": 1}, {"microbatch": 4}, {"checkpointing": True}],
    "dpo": [{"microbatch": 1}, {"microbatch": 4}, {"checkpointing": True}],
    "dpo_cached": [{"microbatch": 1}, {"microbatch": 4}],
    "ppo": [{"microbatch": 4}, {"microbatch": 16}, {"microbatch": 1}],
}
# Where the processor multiplies bf16 natively: those with bf16, then some without, in the order of
# speed on two cores with AVX-512 BF16. TRL's PPO gains nothing from bf16.
PEER_SETTINGS_BF16: dict[str, list[dict[str, Any]]] = {
    stage: [setting | {"bf16": True} for setting in settings] + settings[:2]
    for stage, settings in PEER_SETTINGS.items()
} | {"ppo": [*PEER_SETTINGS["ppo"], {"microbatch": 4, "bf16": True}]}


def rows_of(stage: str) -> str:
    """Name of the rows that a stage trains on; both kinds of DPO train on the same pairs."""
    return {"sft": "sft", "ppo": "ppo"}.get(stage, f"pairs-{stage.removesuffix('_cached')}")


@dataclass(frozen=True)
class Plan:
    """How much is measured: ``steps`` of one process, the first two of them warm-up."""

    steps: int
    rounds: int
    all_settings: bool
    response_tokens: int


SHORT = Plan(steps=3, rounds=1, all_settings=False, response_tokens=16)
LONG = Plan(steps=6, rounds=3, all_settings=True, response_tokens=48)


TINY = "models/tiny"
STEP_TOKENS = 4096
SEQUENCE_LENGTHS = (64, 128, 256, 512, 1024, 2048)
BATCH_TOKENS = (1024, 2048, 4096, 8192, 16384)
MICROBATCH_TOKENS = (512, 1024, 2048, 4096)
VOCABULARIES = (49_152, 98_304, 196_608)
PAIRS = (1_000, 10_000, 100_000, 1_000_000)
MEAN_TOKENS = 184  # of a prompt and a reply of `benchmarks.data`
SHORT_LAYERS = 4


def points(folder: Path, *, full: bool) -> Iterator[tuple[str, Job]]:
    """Name and job of every point; the first and the last, and few layers, in the short form."""
    layers = None if full else SHORT_LAYERS

    def some(values: tuple[int, ...]) -> tuple[int, ...]:
        return values if full else (values[0], values[-1])

    def job(name: str, **settings: Any) -> tuple[str, Job]:
        stage = "rm" if name == "pairs" else "sft"
        value = settings["value"]
        return f"by {name}", Job(
            stage=stage,
            model=str(folder / "policy"),
            reward_model=TINY,
            data="",
            folder=str(folder / "work" / f"{name.replace(' ', '-')}-{value}"),
            batch=settings.pop("batch"),
            steps=settings.pop("steps", 4),
            lr=1e-5,
            settings={
                "layers": layers,
                "vocabulary": None,
                "length": None,
                "microbatch": 4096,
                **settings,
            },
        )

    for length in some(SEQUENCE_LENGTHS):
        yield job("sequence length", value=length, batch=STEP_TOKENS // length, length=length)
    for tokens in some(BATCH_TOKENS):
        yield job("batch tokens", value=tokens, batch=max(tokens // MEAN_TOKENS, 1))
    for tokens in some(MICROBATCH_TOKENS):
        yield job("microbatch tokens", value=tokens, batch=4096 // MEAN_TOKENS, microbatch=tokens)
    for vocabulary in some(VOCABULARIES):
        yield job("vocabulary", value=vocabulary, batch=16, vocabulary=vocabulary)
    for pairs in PAIRS if full else PAIRS[:2]:
        yield job("pairs", value=pairs, batch=4, steps=2)
