from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from tools import frontier


def test_a_point_is_drawn_for_each_model_with_its_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Intervals are kept in `eval.json` as their two ends."""
    rows = [
        {"name": "sft", "kl": 0.0, "reward_mean": -0.25, "reward_ci95": [-0.5, 0.25]},
        {"name": "ppo", "kl": 2.0, "reward_mean": 1.0, "reward_ci95": [0.875, 1.125]},
    ]
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "eval.json").write_text(json.dumps({"models": rows}))
    figures: list[plt.Figure] = []
    save = plt.Figure.savefig
    monkeypatch.setattr(
        plt.Figure, "savefig", lambda f, *a, **k: (figures.append(f), save(f, *a, **k))
    )
    frontier.draw(tmp_path / "out.png", [tmp_path / "eval" / "eval.json"])
    assert (tmp_path / "out.png").stat().st_size > 5_000
    axis = figures[0].axes[0]
    bars = [container.lines[2][0].get_segments()[0] for container in axis.containers]
    assert [[list(end) for end in bar] for bar in bars] == [
        [[0.0, -0.5], [0.0, 0.25]],
        [[2.0, 0.875], [2.0, 1.125]],
    ]
