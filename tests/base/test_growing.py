from __future__ import annotations

from pathlib import Path

import pytest

from align.base.growing import GrowingFiles
from align.types import AlignError

NAMES = ("metrics.jsonl", "samples.jsonl")
PLACE = Path("checkpoints/step-2")


def grown(folder: Path) -> GrowingFiles:
    files = GrowingFiles(folder, NAMES)
    files.append("metrics.jsonl", [{"step": 1}, {"step": 2}])
    files.append("samples.jsonl", [{"response": "é"}])
    return files


def test_rows_behind_a_checkpoint_are_cut_off(tmp_path: Path) -> None:
    files = grown(tmp_path)
    marks = files.marks()
    files.append("metrics.jsonl", [{"step": 3}])
    again = GrowingFiles(tmp_path, NAMES)
    again.require(marks, PLACE)
    again.cut_back(marks)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    assert again.marks() == marks
    again.append("metrics.jsonl", [{"step": 3}])
    again.require(again.marks(), PLACE)  # the running hash went on from there


def test_a_file_that_is_new_since_the_checkpoint_is_emptied(tmp_path: Path) -> None:
    files = GrowingFiles(tmp_path, NAMES)
    files.append("metrics.jsonl", [{"step": 1}])
    marks = files.marks()
    files.append("samples.jsonl", [{"a": 1}])
    files.cut_back(marks)
    assert (tmp_path / "samples.jsonl").read_bytes() == b""


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("harm", ["shorter", "gone", "flipped", "other rows in front"])
def test_a_file_that_lacks_or_changes_rows_is_refused(tmp_path: Path, name: str, harm: str) -> None:
    marks = grown(tmp_path).marks()
    path = tmp_path / name
    whole = bytearray(path.read_bytes())
    if harm == "gone":
        path.unlink()
    elif harm == "shorter":
        path.write_bytes(whole[:-1])
    elif harm == "flipped":
        whole[3] ^= 1
        path.write_bytes(whole)
    else:
        path.write_bytes(b'{"step": 0}\n' + whole)
    with pytest.raises(AlignError) as caught:
        GrowingFiles(tmp_path, NAMES).require(marks, PLACE)
    line = str(caught.value)
    assert line.startswith(f"resume: {path}: ")
    assert "restore it, or remove checkpoints/step-2 to resume from an older checkpoint" in line


def test_marks_of_an_older_align_have_lengths_only(tmp_path: Path) -> None:
    marks = grown(tmp_path).marks()
    del marks["sha256"]
    files = GrowingFiles(tmp_path, NAMES)
    files.require(marks, PLACE)
    files.cut_back(marks)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(AlignError, match="has 0 bytes, and step-2 was saved when it had 24"):
        files.require(marks, PLACE)
