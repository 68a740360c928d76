from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report import growth_rows, stage_row, write_report


def measured(side: str, seconds: list[float], **more: Any) -> dict[str, Any]:
    return (
        {"name": "sft", "side": side, "settings": {}, "seconds": seconds, "peak_gib": 1}
        | {"cpu_seconds": seconds}
        | more
    )


@pytest.fixture
def results() -> dict[str, Any]:
    slow, fast = {"microbatch": 8}, {"microbatch": 1}
    return {
        "about": {
            "model": "m",
            "form": "long",
            "batch": {"sft": 8},
            "tokens": {"sft": [[999, 9], [1000, 9], [2000, 9]]},
            "threads": "2",
            "processor": "p",
            "load_average": [0.5],
        },
        "measurements": [
            measured("align", [1.0, 2.0], losses=[3.0, 2.0, 1.0], peak_gib=2),
            measured("trl-1.16.0", [9.0, 9.0], losses=[3.0, 2.0, 1.0], settings=slow),
            measured("trl-1.16.0", [2.0, 4.0], losses=[3.0, 2.0, 1.5], settings=fast, peak_gib=7),
            measured("limit", [0.75, 0.75], dtype="float32"),
            measured("align", [1.0, 3.0], losses=[3.0, 2.0, 1.0]),
            measured("trl-1.16.0", [6.0, 6.0], losses=[3.0, 2.0, 1.5], settings=fast, peak_gib=7),
            measured("limit", [1.0, 1.0], dtype="float32"),
            measured("align", [2.0, 1.0], tokens=[5, 1000, 1000], name="by vocabulary", value=4),
        ],
    }


def test_a_stage_is_compared_with_the_fastest_settings(results: dict[str, Any]) -> None:
    row = stage_row(results, "sft")
    assert row is not None
    assert row["settings"] == {"microbatch": 1}
    # rounds: 6 s against 3 s, 12 s against 4 s
    assert row["ratio"] == (2.5, 2.0, 3.0)
    # 1.5 of 3 s, 2 of 4 s
    assert row["of_limit"] == (0.5, 0.5, 0.5)
    # the steps' medians over the rounds are 1 s and 2.5 s; 3,000 tokens without the warm-up step
    assert row["tokens_per_second"] == pytest.approx(3000 / 3.5)
    assert row["examples_per_second"] == pytest.approx(16 / 3.5)
    assert (row["align_gib"], row["trl_gib"]) == (2, 7)
    assert row["loss_difference"] == 0.5


def test_a_stage_without_its_peer_is_left_out(results: dict[str, Any]) -> None:
    assert stage_row(results, "ppo") is None


def test_cost_is_per_token(results: dict[str, Any]) -> None:
    assert [row["ms_per_token"] for row in growth_rows(results)] == [1.5]


def test_table_and_plot_are_written(results: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(results))
    text = write_report(tmp_path / "results.json", tmp_path)
    assert "| **2.50 (2.00–3.00)** |" in text
    assert "| sft | trl-1.16.0 | microbatch 8 | 9.00 | 1.0 |" in text
    assert "| sft | trl-1.16.0 | microbatch 1 | 4.50 (3.00–6.00) | 7.0 |" in text
    assert (tmp_path / "table.md").read_text() == text
    assert (tmp_path / "plot.png").stat().st_size > 10_000
