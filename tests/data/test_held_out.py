"""What is held out is no training data: one file, one content, slices that meet."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from align.config.sections import DataSource
from align.data.examples import load_examples
from align.data.held_out import notes_of, num_shared, refuse_shared
from align.types import AlignError


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"text": "row {n}"}}\n' for n in range(10)))
    return path


def source(path: Path | str, split: str = "train") -> DataSource:
    return DataSource(path=str(path), split=split)


def refused(train: DataSource, test: DataSource) -> bool:
    try:
        refuse_shared([source("org/else"), train], [test])
    except AlignError as error:
        wanted = f"data.test: {test.path} [{test.split}] is training data too"
        return str(error).startswith(wanted)
    return False


@pytest.mark.parametrize(
    ("train", "test", "meet"),
    [
        ("train", "train", True),
        ("train", "train[:2]", True),
        ("train[:6]", "train[5:]", True),
        ("train[:5]", "train[5:]", False),
        ("train[:90%]", "train[90%:]", False),
        ("train[:90%]", "train[-10%:]", False),
        ("train[:96%]", "train[90%:]", True),
        ("train[:6]", "train[50%:]", True),
        ("train[:2]+train[8:]", "train[2:8]", False),
        ("train[:2]+train[8:]", "train[7:9]", True),
    ],
)
def test_slices_of_one_file_that_meet_are_refused(
    rows: Path, train: str, test: str, meet: bool
) -> None:
    assert refused(source(rows, train), source(rows, test)) == meet


@pytest.mark.parametrize(
    ("train", "test", "meet"),
    [
        ("train", "train[:100]", True),
        ("train[:100]", "train[50:200]", True),
        ("train[:100]", "train[100:200]", False),
        ("train[:-100]", "train[-100:]", False),
        ("train[:-100]", "train[-200:]", True),
        ("train[:90%]", "train[-10%:]", False),
        ("train[:90%]", "train[-20%:]", True),
        ("train_sft", "test_sft", False),
    ],
)
def test_slices_of_a_hub_set_that_meet_are_refused(train: str, test: str, meet: bool) -> None:
    assert refused(source("org/name", train), source("org/name", test)) == meet
    assert not refused(source("org/name", train), source("org/other", test))


def test_the_same_content_under_another_name_is_refused(rows: Path, tmp_path: Path) -> None:
    copy = tmp_path / "folder" / "held_out.jsonl"
    copy.parent.mkdir()
    copy.write_bytes(rows.read_bytes())
    assert refused(source(rows), source(copy))
    assert refused(source(rows), source(copy.parent))
    assert refused(source(rows), source(f"{tmp_path}/folder/../rows.jsonl"))
    copy.write_bytes(rows.read_bytes().replace(b"row 3", b"row 4"))
    assert not refused(source(rows), source(copy))


def test_rows_are_told_word_for_word(rows: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed.jsonl.gz"
    lines = rows.read_bytes().splitlines(keepends=True)
    packed.write_bytes(gzip.compress(b"".join([*lines[8:], b'{"text": "new"}\n'])))
    train, test = (load_examples([source(p)], kind="sft").examples for p in (rows, packed))
    assert num_shared(train, test) == 2
    assert num_shared(test, train) == 2
    assert num_shared(train, train) == 10


def test_a_csv_without_a_last_line_break_is_named(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.csv", tmp_path / "cut.csv"
    whole.write_text("text\na\n")
    cut.write_text("text\na and th")
    empty = tmp_path / "empty.tsv"
    empty.write_text("")
    assert notes_of([source(whole), source(empty), source("org/name")]) == []
    assert notes_of([source(cut), source(cut)]) == [
        f"{cut}: its last line has no line break at its end; if the file was cut off there, "
        "so is that row"
    ]


def test_a_folder_of_splits_is_named(tmp_path: Path) -> None:
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}))
    (note,) = notes_of([source(tmp_path)])
    assert "split train is read (train.jsonl); not read: split test (test.jsonl)" in note
