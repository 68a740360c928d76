from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from align import cli
from align.report import follow
from align.report.runs import read_run


def test_sparkline() -> None:
    assert follow.sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert follow.sparkline([1, 1]) == "▁▁"
    course = follow.sparkline([math.sin(i / 50) for i in range(1000)])
    assert len(course) <= follow.WIDTH
    assert {"▁", "█"} <= set(course)


def test_a_running_run_is_followed_to_its_end(
    make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[dict[str, Any]] = [{"step": 1, "seconds": 2, "loss": 2.0, "odd[bold]": 1.0}]
    folder = make_run("ppo", "ppo", status="running", metrics=rows)
    manifest = json.loads((folder / "manifest.json").read_text())
    naps = []

    def nap(seconds: float) -> None:
        """While the reader waits, the run goes on, and then ends."""
        naps.append(seconds)
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 1 + len(naps), "seconds": 4, "loss": 1.0}) + "\n")
        if len(naps) == 2:
            (folder / "manifest.json").write_text(json.dumps(manifest | {"status": "done"}))

    monkeypatch.setattr(follow.time, "sleep", nap)
    console = Console(record=True, width=100, force_terminal=True)
    follow.follow([folder], console=console)
    assert len(naps) == 2
    text = console.export_text()
    assert "ppo: done, step 3, 4 s" in text
    assert "loss" in text
    assert "odd[bold]" in text


def test_the_command(
    make_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run("sft", "sft", metrics=[{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])
    assert cli.main(["report", str(folder), "--follow"]) == 0
    assert "sft: done" in capsys.readouterr().out
    assert cli.main(["report", str(folder), "--output", str(tmp_path / "page.html")]) == 0
    assert "page.html: written" in capsys.readouterr().out
    assert cli.main(["report", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert read_run(folder, tmp_path).series("loss") == ([1.0, 2.0], [2.0, 1.0])
