"""The page of measured figures holds what was measured, and a bound that is broken stays off it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tools import make_trust
from tools.trust import Trust

ROOT = Path(__file__).parents[2]


def test_figures_reach_the_page_and_are_replaced(tmp_path: Path) -> None:
    trust = Trust("tests/test_x.py::test_y", tmp_path, keep=True)
    trust.at_most("oracles", "KL, nats", 0.5, 1.0)
    trust.at_most("oracles", "KL, nats", 0.25, 1.0)
    trust.row("faults", "a | b", found="one line", wanted="a line")
    page = make_trust.render(tmp_path)
    assert "| KL, nats | 0.25 | at most 1 | `tests/test_x.py::test_y` |" in page
    assert "0.5" not in page
    assert "| a \\| b | one line | a line |" in page


@pytest.mark.parametrize("measured", [1.1, math.nan, math.inf])
def test_a_broken_bound_fails_and_is_not_kept(tmp_path: Path, measured: float) -> None:
    with pytest.raises(AssertionError, match="wanted at most 1"):
        Trust("t", tmp_path, keep=True).at_most("oracles", "KL", measured, 1.0)
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_unasked(tmp_path: Path) -> None:
    Trust("t", tmp_path, keep=False).at_most("oracles", "KL", 0.0, 1.0)
    assert not list(tmp_path.iterdir())


def test_a_table_without_a_heading_is_refused(tmp_path: Path) -> None:
    Trust("t", tmp_path, keep=True).row("mystery", "x", found="1", wanted="1")
    with pytest.raises(SystemExit, match="mystery"):
        make_trust.render(tmp_path)


def test_the_page_is_up_to_date() -> None:
    page = (ROOT / "docs" / "trust.md").read_text(encoding="utf-8")
    assert page == make_trust.render(), "run `python tools/make_trust.py`"
