"""Seeds of one model in win rates and at equal length."""

from __future__ import annotations

import numpy as np
import pytest

from align.evaluation.measure import System
from align.evaluation.outputs import Outputs
from align.evaluation.systems import comparisons, win_rates


def model(name: str, rewards: list[float], lengths: list[int]) -> System:
    return System(name, {}, Outputs(["x" * n for n in lengths]), {"reward": rewards})


@pytest.fixture
def systems() -> list[System]:
    start = model("sft", [0.0] * 6, [1] * 6)
    first = model("ppo#0", [1.0] * 6, [2, 3, 4, 2, 3, 5])
    return [start, first, model("ppo#1", [-3.0] * 5 + [2.0], [1, 2, 2, 9, 3, 4])]


def test_every_seed_counts(systems: list[System]) -> None:
    (by_reward,) = [c for c in comparisons(systems, 50) if c["metric"] == "reward"]
    swapped = [systems[0], systems[2], systems[1]]
    (again,) = [c for c in comparisons(swapped, 50) if c["metric"] == "reward"]
    for key, value in by_reward["at_equal_length"].items():
        assert value == pytest.approx(again["at_equal_length"][key])
    assert by_reward["at_equal_length"]["difference"] < 0 > by_reward["difference"]
    options = {"tie_margin": 0.0, "resamples": 50}
    (rate,) = win_rates(systems, {"reward": "reward"}, **options)
    # all six prompts of one seed, one of the other's
    assert rate["win_rate"] == pytest.approx(7 / 12)
    assert (rate["wins"], rate["ties"]) == (1, 5)
    assert rate["win_rate_verdict"].startswith("no difference that 2 against 1 seeds")


def test_seeds_meet_one_by_one() -> None:
    one = [model(f"a#{i}", [0.0], [1]) for i in range(3)]
    other = [model(f"b#{i}", [0.0], [1]) for i in range(2)]
    asked = []

    def judge(first: list[str], second: list[str]) -> np.ndarray:
        asked.append((first, second))
        return np.array([1.0])

    win_rates([*other, *one], {"j": judge}, tie_margin=0.0, resamples=20)
    assert len(asked) == 3
