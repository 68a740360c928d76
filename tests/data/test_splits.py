"""`split` on local files and folders selects as `datasets` has it, or is an error."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from align.config.sections import DataSource
from align.data.examples import load_examples
from align.data.readers.source_rows import SourceRows
from align.data.sources import choice_of, find_files, read_file, read_source
from align.types import AlignError


def write(path: Path, *names: str) -> Path:
    """Rows ``{"text": name}``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"text": name} for name in names or (path.name,)]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(path: Path, split: str = "train") -> list[str]:
    return [row.values["text"] for row in read_source(DataSource(path=str(path), split=split))]


def note(path: Path, split: str = "train") -> str:
    choice = choice_of(DataSource(path=str(path), split=split))
    assert choice is not None
    return choice.note


NAMES = {
    "train": ("train.jsonl", "training.jsonl", "my_train-v2.jsonl", "train/x.jsonl"),
    "test": ("test.jsonl", "pairs_test.jsonl", "eval.jsonl", "test/x.jsonl"),
    "validation": ("validation.jsonl", "dev.jsonl", "val.jsonl", "valid/a/x.jsonl"),
}


@pytest.mark.parametrize(("split", "name"), [(s, n) for s, names in NAMES.items() for n in names])
def test_names_of_splits_are_those_of_datasets(tmp_path: Path, split: str, name: str) -> None:
    """Held against `datasets` itself, on the same folder."""
    write(tmp_path / name, "it")
    other = "test" if split == "train" else "train"
    # of files at the top and in folders, those at the top are read
    write(tmp_path / (f"{other}/y.jsonl" if "/" in name else f"b_{other}.jsonl"), "other")
    theirs = datasets.load_dataset(str(tmp_path), split=split, cache_dir=str(tmp_path / ".cache"))
    assert texts(tmp_path, split) == list(theirs["text"]) == ["it"]
    assert "not read: split" in note(tmp_path, split)


def test_shards_in_the_hubs_layout(tmp_path: Path) -> None:
    for split in ("train", "train_sft", "test_sft", "en"):
        for shard in ("00000", "00001"):
            write(tmp_path / f"data/{split}-{shard}-of-00002.parquet", f"{split} {shard}")
    (tmp_path / "README.md").write_text("a card")
    (tmp_path / "dataset_infos.json").write_text("{}")
    for split in ("train", "train_sft", "test_sft", "en"):
        assert texts(tmp_path, split) == [f"{split} 00000", f"{split} 00001"]
    with pytest.raises(AlignError, match=r"has no split test; it has .*test_sft .*say split: en"):
        texts(tmp_path, "test")


def test_names_that_only_look_alike(tmp_path: Path) -> None:
    for name in ("latest.jsonl", "constraints.jsonl", "part-00000-of-00002.jsonl", "devices.jsonl"):
        write(tmp_path / name)
    assert texts(tmp_path) == sorted(p.name for p in tmp_path.iterdir())
    assert note(tmp_path) == ""


def test_what_is_not_read_is_said(tmp_path: Path) -> None:
    for name in ("train.jsonl", "test.jsonl", "dev.csv", "extra.jsonl"):
        write(tmp_path / name)
    assert texts(tmp_path) == ["train.jsonl"]
    assert note(tmp_path) == (
        f"{tmp_path}: split train is read (train.jsonl); not read: split validation (dev.csv), "
        "split test (test.jsonl), files of no split (extra.jsonl)"
    )
    assert texts(tmp_path, "train+test") == ["train.jsonl", "test.jsonl"]
    with pytest.raises(
        AlignError, match=r"has no split prompts; it has .*files of no split \(extra"
    ):
        texts(tmp_path, "prompts")


def test_a_split_that_a_file_has_not_is_refused(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", *"abcdefghij")
    with pytest.raises(AlignError, match=r"one.jsonl: split=test selects nothing: the path is one"):
        texts(one, "test")
    assert texts(one) == texts(one, "all") == list("abcdefghij")
    named = write(tmp_path / "test.jsonl", "a")
    assert texts(named) == texts(named, "test") == texts(named, "all") == ["a"]
    with pytest.raises(AlignError, match="split=validation selects nothing"):
        texts(named, "validation")
    with pytest.raises(AlignError, match="'train\\[' is no split; wanted a name with a slice"):
        texts(one, "train[")


@pytest.mark.parametrize(
    "split",
    [
        "train[:4]", "train[4:]", "train[2:5]", "train[-3:]", "train[:-3]", "train[:30%]",
        "train[25%:75%]", "train[-10%:]", "train[:2]+train[-2:]", "train[8:100]", "train[:]",
    ],
)  # fmt: skip
@pytest.mark.parametrize("files", [1, 3])
def test_slices_are_those_of_datasets(tmp_path: Path, split: str, files: int) -> None:
    rows = list("abcdefghijk")
    for number in range(files):
        write(tmp_path / f"d/part{number}.jsonl", *rows[number::files])
    path = tmp_path / "d" if files > 1 else tmp_path / "d/part0.jsonl"
    paths = sorted(str(p) for p in (tmp_path / "d").iterdir())
    theirs = datasets.load_dataset(
        "json", data_files=paths, split=split, cache_dir=str(tmp_path / "cache")
    )
    assert texts(path, split) == list(theirs["text"])


def test_a_slice_counts_bad_rows_and_keeps_places(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a"}\nbroken\n\n{"text": "b"}\n{"text": "c"}\n')
    found = list(read_source(DataSource(path=str(path), split="train[1:3]")))
    assert [row.where for row in found] == [f"{path}:2", f"{path}:4"]
    loaded = load_examples(
        [DataSource(path=str(path), split="train[-2:]")], kind="sft", on_bad_row="stop"
    )
    assert [e.id for e in loaded.examples] == [f"{path}:4", f"{path}:5"]


def test_a_slice_is_of_the_content_though_time_and_size_stay(tmp_path: Path) -> None:
    path = write(tmp_path / "one.jsonl", *"abcdefgh")
    before = path.stat()
    assert texts(path, "train[50%:]") == list("efgh")
    write(path, "a", "")
    last = "x" * (before.st_size - path.stat().st_size)
    write(path, "a", last)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert texts(path, "train[50%:]") == [last]


@pytest.mark.parametrize("split", ["train[5:5]", "train[20:]", "train[:0]", "train[90%:91%]"])
def test_a_slice_of_nothing_is_refused(tmp_path: Path, split: str) -> None:
    path = write(tmp_path / "one.jsonl", "a", "b", "c")
    with pytest.raises(AlignError, match=r"one.jsonl"):
        load_examples([DataSource(path=str(path), split=split)], kind="sft")


def test_a_stream_reads_the_slice_too_and_goes_on_in_it(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / f"part{number}.jsonl", *(f"{number}{c}" for c in "abcd"))
    source = DataSource(path=str(tmp_path), split="train[2:-1]")
    rows = SourceRows(source)
    read, places = [], []
    for row in rows:
        read.append(row.where)
        places.append(rows.state_dict())
    assert read == [row.where for row in read_source(source)]
    assert len(read) == 9
    for number, place in enumerate(places):
        again = next(SourceRows(source, place), None)
        assert (again.where if again else None) == (read[number + 1 :] or [None])[0]


def test_a_saved_dataset_dict_says_what_it_has(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
    datasets.DatasetDict(train=rows, test=rows.select([1])).save_to_disk(tmp_path)
    assert texts(tmp_path) == ["a", "b"]
    assert texts(tmp_path, "test+train[:1]") == ["b", "a"]
    assert "split train is read (data-00000-of-00001.arrow); not read: split test" in note(tmp_path)
    with pytest.raises(AlignError, match=r"has no split validation; it has test .*; train "):
        texts(tmp_path, "validation")
    with pytest.raises(AlignError, match=r"test: split=validation selects nothing"):
        texts(tmp_path / "test", "validation")


def test_what_map_keeps_beside_a_saved_data_set_is_not_of_it(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(tmp_path)
    datasets.load_from_disk(str(tmp_path)).map(lambda row: {"text": row["text"] * 2})
    assert len(list(tmp_path.glob("cache-*.arrow"))) == 1
    assert texts(tmp_path) == ["a"]


STATES: dict[str, Any] = {
    "elsewhere": [{"filename": "../../../etc/hostname"}],
    "absolute": [{"filename": "/etc/hostname.arrow"}],
    "below": [{"filename": "sub/rows.arrow"}],
    "other rows": [{"filename": "rows.jsonl"}],
    "nameless": [{}],
    "a number": [{"filename": 1}],
    "no object": ["rows.arrow/"],
    "no list": 5,
}


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("inside", ["", "train"])
def test_a_saved_data_set_names_no_file_but_its_own(tmp_path: Path, kind: str, inside: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    folder = tmp_path / inside
    folder.mkdir(exist_ok=True)
    (folder / "state.json").write_text(json.dumps({"_data_files": STATES[kind]}))
    if inside:
        (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
        (folder / "dataset_info.json").write_text("{}")
    with pytest.raises(AlignError, match=r"state.json: .*save the data set again"):
        texts(tmp_path)


def test_a_file_of_no_known_kind_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("a")
    with pytest.raises(AlignError, match=r"rows.txt: not a data file by its name; allowed: .jsonl"):
        list(read_file(tmp_path / "rows.txt"))


def test_configurations_side_by_side_are_refused(tmp_path: Path) -> None:
    for name in ("en", "fr"):
        write(tmp_path / name / "train.jsonl")
    with pytest.raises(
        AlignError, match=r"several of its folders hold the split: en, fr; name one"
    ):
        texts(tmp_path)
    assert texts(tmp_path / "en") == ["train.jsonl"]


def test_a_configuration_of_a_local_path_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "one.jsonl")
    with pytest.raises(AlignError, match="name=en is the configuration of a hub data set"):
        find_files(DataSource(path=str(path), name="en"))
