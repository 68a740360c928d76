"""Rows in memory as a source: lists of dicts and the data sets of Hugging Face ``datasets``."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import datasets
import pytest

from align.config.sections import DataSource
from align.data.examples import load_examples
from align.data.readers.objects import given
from align.data.readers.source_rows import SourceRows
from align.data.sources import content_of, read_source
from align.types import AlignError

ROWS = [{"prompt": f"p{n}", "completion": f"c{n}"} for n in range(9)]
MAKERS: dict[str, Callable[[], Any]] = {
    "list": lambda: ROWS,
    "dataset": lambda: datasets.Dataset.from_list(ROWS),
    "formatted": lambda: datasets.Dataset.from_list(ROWS).with_format("numpy"),
    "selected": lambda: datasets.Dataset.from_list([*ROWS, *ROWS]).select(range(9)),
    "iterable": lambda: datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
    "splits": lambda: datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_rows_in_memory_are_read_as_a_file_is(kind: str) -> None:
    with given(MAKERS[kind]()) as path:
        loaded = load_examples([DataSource(path=path)], kind="sft")
    assert [(e.id, e.prompt, e.completion) for e in loaded.examples] == [
        (f"data[{n}]", f"p{n}", f"c{n}") for n in range(9)
    ]
    (report,) = loaded.reports
    assert (report.path, len(report.sha256 or ""), report.rows_read) == ("data", 64, 9)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("done", [0, 4, 9])
def test_a_stream_of_them_goes_on_where_it_was(kind: str, done: int) -> None:
    with given(MAKERS[kind]()) as path:
        rows = SourceRows(DataSource(path=path))
        for _ in range(done):
            next(rows)
        place = json.loads(json.dumps(rows.state_dict()))
        again = SourceRows(DataSource(path=path), place)
        found = [row.where for row in again]
    assert found == [f"data[{n}]" for n in range(done, 9)]


def test_a_row_that_cannot_be_used_is_named_by_its_index() -> None:
    rows = [*ROWS[:2], {"prompt": "p", "completion": ""}, "text", {"prompt": "x" * 4_000_001}]
    with given(rows, "mine") as path:
        source = DataSource(path=path)
        with pytest.raises(AlignError, match=r"^mine\[2\]: completion: empty; "):
            load_examples([source], kind="sft")
        (report,) = load_examples([source], kind="sft", on_bad_row="skip").reports
    assert report.dropped == {
        "completion: empty": 1,
        "row: not a JSON object": 1,
        "row: longer than 4,000,000 characters": 1,
    }
    assert report.first_dropped[1].startswith("mine[3]: row: not a JSON object; it is a str")


def test_the_hash_is_of_the_content() -> None:
    def hashed(rows: Any) -> str:
        with given(rows) as path:
            ((name, found),) = content_of(DataSource(path=path))
        assert name == "data"
        return found

    for kind in ("list", "dataset", "iterable"):
        assert hashed(MAKERS[kind]()) == hashed(MAKERS[kind]())
    assert hashed(MAKERS["dataset"]()) == hashed(MAKERS["selected"]())
    other = [*ROWS[:8], {**ROWS[8], "completion": "C"}]
    assert hashed(other) != hashed(ROWS)
    assert hashed(datasets.Dataset.from_list(other)) != hashed(MAKERS["dataset"]())


def test_what_is_no_data_is_one_line() -> None:
    for rows in (3, "rows.jsonl", iter(ROWS)):
        with (
            pytest.raises(AlignError, match=r"^data: is of type .*; wanted a path, a"),
            given(rows),
        ):
            pass
    with given(ROWS) as path, pytest.raises(AlignError, match="in use already"), given(ROWS):
        pass
    with pytest.raises(AlignError, match=r"^data: <data> names rows that a program held"):
        list(read_source(DataSource(path=path)))


@pytest.mark.parametrize(
    ("kind", "split", "message"),
    [
        ("list", "train[:3]", r"^data: split=train\[:3\]: these rows are in memory"),
        ("splits", "test", r"^data: has no split test; it has train$"),
    ],
)
def test_a_split_that_is_not_there_is_one_line(kind: str, split: str, message: str) -> None:
    with given(MAKERS[kind]()) as path, pytest.raises(AlignError, match=message):
        list(read_source(DataSource(path=path, split=split)))


def test_rows_that_break_off_name_the_row() -> None:
    def broken() -> Any:
        yield {"prompt": "p", "completion": "c"}
        raise ConnectionError("gone\naway")

    rows = datasets.IterableDataset.from_generator(broken)
    with given(rows) as path, pytest.raises(AlignError, match=r"^data\[1\]: cannot be read: "):
        list(read_source(DataSource(path=path)))
