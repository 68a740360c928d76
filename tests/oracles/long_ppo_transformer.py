"""`align ppo` with a tiny transformer, which shares its parameters between prefixes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.oracles.language import save_llama
from tests.oracles.stages import approach, metrics, train_ppo
from tools.trust import Trust


def test_a_transformer_comes_close_to_the_optimum(
    tmp_path: Path, trust: Trust, plot: Callable[..., None]
) -> None:
    start = save_llama(tmp_path / "llama")
    run = train_ppo(
        start,
        tmp_path / "run",
        batch=512,
        lr=3e-3,
        critic={"lr": 6e-3},
        ppo={"iterations": 700},
        train={"save_every": 20},
    )
    steps, found = approach(run, start, "actor")
    gap = [(row["step"], row["optimality_gap"]) for row in metrics(run) if "kl" in row]
    plot(
        "ppo_transformer",
        {
            "KL(pi, pi*), nats": (steps, found),
            "optimality gap, reward units": tuple(zip(*gap, strict=True)),
        },
        bound=0.02,
        x="iterations of 512 responses",
        y="distance to the optimum",
        title="align ppo, tiny transformer",
    )
    assert found[0] > 0.5
    trust.at_most("oracles", "PPO, tiny transformer: KL(pi, pi*), nats", found[-1], 0.02)
