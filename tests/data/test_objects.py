"""Rows in memory as a source: lists of dicts and the data sets of Hugging Face ``datasets``."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import datasets
import numpy as np
import pytest
import torch

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
    line = r"^data\[1\]: cannot be read: gone a"
    with given(rows) as path, pytest.raises(AlignError, match=line):
        content_of(DataSource(path=path))


ARRAY = np.arange(5000)
OTHER_ARRAY = np.where(ARRAY == 2500, -1, ARRAY)
PLAIN: dict[str, tuple[Any, Any]] = {
    "float32": (np.float32(0.5), 0.5),
    "int64": (np.int64(3), 3),
    "bool": (np.bool_(True), True),
    "str": (np.str_("x"), "x"),
    "array": (ARRAY, list(range(5000))),
    "objects": (np.array([{"a": np.int64(1)}], dtype=object), [{"a": 1}]),
    "tensor": (torch.tensor([[1, 2]]), [[1, 2]]),
    "bfloat16": (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
    "nested": ({"a": (np.int64(1), None)}, {"a": [1, None]}),
    "date": (datetime.date(2026, 1, 2), "2026-01-02"),
    "datetime64": (np.datetime64("2026-01-02T03:04:05.123456789"), "2026-01-02T03:04:05.123456789"),
    "decimal": (Decimal("1.50"), "1.50"),
}


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("name", PLAIN)
def test_rewards_get_python_values(name: str, once: bool) -> None:
    value, want = PLAIN[name]
    rows: Any = [{"prompt": "q", "extra": value}]
    with given(_Once(rows) if once else rows) as path:
        (example,) = load_examples([DataSource(path=path)], kind="prompt").examples
    assert example.extra == {"extra": want}
    assert type(example.extra["extra"]) is type(want)


class _Once:
    """Rows that another reading finds changed."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows, self.passes = rows, 0

    def __iter__(self) -> Any:
        self.passes += 1
        return iter(self.rows if self.passes == 1 else [])


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"a", "b"}, "is a set"),
        (object(), "is a object"),
        ([{1: "a"}], "has a key that is a int, not text"),
        (np.longdouble(1) / 3, "is a longdouble"),
        (1j, "is a complex"),
    ],
)
@pytest.mark.parametrize("kind", ["sft", "prompt"])
def test_a_value_that_says_nothing_is_refused_by_name(kind: Any, value: Any, reason: str) -> None:
    rows = [{"prompt": "q", "completion": "a", "mine": value}]
    line = rf"data\[0\]: mine: {reason}; give"
    with given(rows) as path, pytest.raises(AlignError, match=line):
        load_examples([DataSource(path=path)], kind=kind)
    rows = [{("prompt", 1): "q"}]
    with given(rows) as path, pytest.raises(AlignError, match=r"row: has a key that is a tuple"):
        load_examples([DataSource(path=path)], kind=kind)


def test_the_hash_is_of_every_value() -> None:
    def hashed(value: Any, once: bool = False) -> str:
        rows: Any = [{"prompt": "q", "mine": value}]
        with given(_Once(rows) if once else rows) as path:
            return content_of(DataSource(path=path))[0][1]

    values = [ARRAY, OTHER_ARRAY, 1, True, 1.0, "1", None, b"1", "2026-01-02"]
    values += [datetime.date(2026, 1, 2), datetime.datetime(2026, 1, 2), Decimal(1), float("nan")]
    for once in (False, True):
        assert len({hashed(value, once) for value in values}) == len(values)
    assert hashed(ARRAY) == hashed(torch.tensor(ARRAY)) == hashed(ARRAY.tolist(), once=True)


def test_rows_that_change_are_read_once() -> None:
    rows: list[Any] = [{"prompt": "q", "completion": "a", "x": b"1"}, "text"]
    rows.append({"prompt": "q", "completion": ""})
    once = _Once([*rows, {"prompt": "r", "completion": "b", "d": datetime.timedelta(1)}])
    with given(once) as path:
        source = DataSource(path=path)
        ((_, found),) = content_of(source)
        loaded = load_examples([source], kind="sft", on_bad_row="skip")
        assert [row.where for row in read_source(source)] == [f"data[{n}]" for n in range(4)]
    assert once.passes == 1
    assert [e.id for e in loaded.examples] == ["data[0]", "data[3]"]
    assert loaded.reports[0].sha256 == found
    assert loaded.reports[0].dropped == {"row: not a JSON object": 1, "completion: empty": 1}


def test_a_transform_of_the_users_decides_what_the_rows_are() -> None:
    plain = datasets.Dataset.from_list(ROWS).add_column("secret", ["x"] * 9)
    calls = []

    def upper(batch: dict[str, list[str]]) -> dict[str, Any]:
        calls.append(len(batch["prompt"]))
        return {name: [text.upper() for text in batch[name]] for name in ("prompt", "completion")}

    hashes = set()
    for rows, want, done in (
        (plain.with_transform(upper), "P3", True),
        (plain.with_format("numpy", columns=["prompt", "completion"]), "p3", False),
        (plain.with_format(columns=["prompt", "completion"]), "p3", False),
    ):
        with given(rows) as path:
            source = DataSource(path=path)
            loaded = load_examples([source], kind="sft")
            hashes.add(loaded.reports[0].sha256)
            assert loaded.examples[3].prompt == want
            assert loaded.reports[0].unread == ()
            assert [row.values["prompt"] for row in SourceRows(source)][3] == want
        assert bool(calls) is done
        calls.clear()
    assert len(hashes) == 2
