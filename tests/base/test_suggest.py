from __future__ import annotations

from pathlib import Path

import pytest

from align.base.suggest import did_you_mean, suggest, suggest_path


def test_the_likeliest_name_or_none() -> None:
    assert suggest("chrf3", ["bleu", "chrf", "ter"]) == "chrf"
    assert suggest("zzz", ["bleu", "chrf"]) is None
    assert suggest("bleu", []) is None


def test_an_ending_in_common_makes_no_two_files_alike(tmp_path: Path) -> None:
    (tmp_path / "verses.jsonl").touch()
    assert suggest_path(tmp_path / "q.jsonl") is None
    assert did_you_mean(tmp_path / "q.jsonl") == ""


def test_a_missing_folder_is_what_was_mistyped(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    assert did_you_mean(tmp_path / "rnus" / "sft" / "model") == f"; did you mean {tmp_path}/runs?"


@pytest.mark.parametrize("name", [".runs", "runs.txt"])
def test_hidden_and_unwanted_neighbours_are_not_meant(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert suggest_path(tmp_path / "runs", wanted=Path.is_dir) is None
