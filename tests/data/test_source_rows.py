"""Rows from any place on: files, folders, hub data sets, several sources in turn."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from align.config.sections import DataSource
from align.data.readers.source_rows import PassRows, SourceRows
from align.data.sources import BadRow, Row, read_source
from align.types import AlignError

ROWS = [{"prompt": f"p{n}", "completion": "c" * n} for n in range(25)]


def rest(rows: SourceRows) -> list[str]:
    """Where each row stands that is still to come."""
    return [row.where for row in rows]


def write_jsonl(path: Path) -> None:
    lines = [json.dumps(row) for row in ROWS]
    # blank lines are no rows, and what is no JSON is one
    path.write_text("\n".join([*lines[:3], "", "{", *lines[3:]]) + "\n")


def write_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))


def write_csv(path: Path) -> None:
    path.write_text("prompt,completion\n" + "".join(f"p{n},c\n" for n in range(25)))


def write_parquet(path: Path) -> None:
    parquet.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=7)


def write_arrow(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)


WRITERS: dict[str, Callable[[Path], None]] = {
    "a.jsonl": write_jsonl,
    "b.jsonl.gz": write_gzip,
    "c.csv": write_csv,
    "d.parquet": write_parquet,
    "e.arrow": write_arrow,
}


@pytest.mark.parametrize("name", WRITERS)
def test_going_on_from_any_place_is_going_on(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    source = DataSource(path=str(tmp_path / name))
    whole = [row.where for row in read_source(source)]
    assert len(whole) == 25 + (name == "a.jsonl")
    for done in (0, 1, 3, 4, 7, 24, len(whole)):
        rows = SourceRows(source)
        for _ in range(done):
            next(rows)
        place = json.loads(json.dumps(rows.state_dict()))
        assert rest(SourceRows(source, place)) == whole[done:]


def test_a_folder_goes_on_in_the_file_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, write in WRITERS.items():
        write(tmp_path / name)
    source = DataSource(path=str(tmp_path))
    rows = SourceRows(source)
    whole = [row.where for row in read_source(source)]
    for _ in range(60):  # 26 of a, 25 of b, 9 of c
        next(rows)
    opened: list[str] = []
    original = read_source.__globals__["read_file"]

    def spying(path: Path) -> Any:
        opened.append(path.name)
        return original(path)

    monkeypatch.setattr("align.data.sources.read_file", spying)
    assert rest(SourceRows(source, rows.state_dict())) == whole[60:]
    assert opened == ["c.csv", "d.parquet", "e.arrow"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """``org/set`` streams two files of 12 and 13 rows; what ``load_dataset`` was told."""
    lines = [json.dumps(row) + "\n" for row in ROWS]
    files = [tmp_path / "1.jsonl", tmp_path / "2.jsonl"]
    for file, part in zip(files, (lines[:12], lines[12:]), strict=True):
        file.write_text("".join(part))
    asked: list[dict[str, Any]] = []
    original = datasets.load_dataset

    def load(path: str, name: str | None, **options: Any) -> Any:
        asked.append({"path": path, "name": name, **options})
        return original("json", data_files=list(map(str, files)), **options)

    monkeypatch.setattr("align.data.sources.require_on_the_hub", lambda *_: None)
    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


@pytest.mark.parametrize("done", [0, 1, 11, 12, 13, 25])
def test_a_hub_set_is_told_where_it_was(done: int, hub: list[dict[str, Any]]) -> None:
    source = DataSource(path="org/set", name="en")
    rows = SourceRows(source)
    for _ in range(done):
        next(rows)
    place = json.loads(json.dumps(rows.state_dict()))
    again = SourceRows(source, place)
    found = list(again)
    assert [row.values["prompt"] for row in found] == [f"p{n}" for n in range(done, 25)]  # type: ignore[attr-defined]
    assert [row.where for row in found] == [f"org/set/train:row {n + 1}" for n in range(done, 25)]  # type: ignore[attr-defined]
    assert hub[-1] == {"path": "org/set", "name": "en", "split": "train", "streaming": True}


def test_a_hub_set_that_breaks_off_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __iter__(self) -> Any:
            yield {"prompt": "p"}
            raise ConnectionError("gone\naway")

    monkeypatch.setattr("align.data.sources.require_on_the_hub", lambda *_: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: Broken())
    rows = SourceRows(DataSource(path="org/set"))
    assert isinstance(next(rows), Row)
    with pytest.raises(AlignError, match=r"^org/set/train:row 2: cannot be read: gone away; "):
        next(rows)


@pytest.fixture
def three(tmp_path: Path) -> list[DataSource]:
    """Files of 3, 1 and 2 rows."""
    sources = []
    for name, count in (("a", 3), ("b", 1), ("c", 2)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"prompt": f"{name}{n}"}) + "\n" for n in range(count)))
        sources.append(DataSource(path=str(path)))
    return sources


def words(rows: PassRows) -> list[str]:
    found = []
    for number, row in rows:
        assert not isinstance(row, BadRow)
        found.append(f"end of {number}" if row is None else row.values["prompt"])
    return found


IN_TURNS = ["a0", "b0", "c0", "a1", "end of 1", "c1", "a2", "end of 2", "end of 0"]
BEHIND_ONE_ANOTHER = ["a0", "a1", "a2", "end of 0", "b0", "end of 1", "c0", "c1", "end of 2"]


@pytest.mark.parametrize(("in_turns", "want"), [(True, IN_TURNS), (False, BEHIND_ONE_ANOTHER)])
def test_sources_take_turns_or_follow_one_another(
    in_turns: bool, want: list[str], three: list[DataSource]
) -> None:
    assert words(PassRows(three, in_turns=in_turns)) == want
    for done in range(len(want) + 1):
        rows = PassRows(three, in_turns=in_turns)
        for _ in range(done):
            next(rows)
        place = json.loads(json.dumps(rows.state_dict()))
        assert words(PassRows(three, in_turns=in_turns, state=place)) == want[done:]
