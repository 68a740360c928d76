"""A row that is too long is a bad row, and is skipped before it is decoded, whatever its file."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from align.config.sections import DataSource
from align.data.readers import arrow_files, csv_files, json_files, json_shapes, rows
from align.data.sources import BadRow, Row, read_file, read_source

MOST = 200
MODULES = (arrow_files, csv_files, json_files, json_shapes, rows)
LONG = "x" * 3 * MOST


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds of a few hundred characters."""
    for module in MODULES:
        monkeypatch.setattr(module, "MAX_CHARS", MOST, raising=False)
    monkeypatch.setattr(json_files, "LIMIT", 4 * MOST)


def as_csv(values: list[dict], separator: str) -> bytes:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(values[0]), delimiter=separator)
    writer.writeheader()
    writer.writerows(values)
    return stream.getvalue().encode()


def lines(values: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in values).encode()


def parquet(values: list[dict]) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(values), stream)
    return stream.getvalue()


def arrow(values: list[dict]) -> bytes:
    table, stream = pa.Table.from_pylist(values), io.BytesIO()
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    return stream.getvalue()


WRITERS: dict[str, Callable[[list[dict]], bytes]] = {
    "d.jsonl": lines,
    "d.jsonl.gz": lambda values: gzip.compress(lines(values)),
    "d.json": lambda values: json.dumps(values).encode(),
    "d.json.gz": lambda values: gzip.compress(json.dumps(values, indent=1).encode()),
    "d.csv": lambda values: as_csv(values, ","),
    "d.csv.gz": lambda values: gzip.compress(as_csv(values, ",")),
    "d.tsv": lambda values: as_csv(values, "\t"),
    "d.parquet": parquet,
    "d.arrow": arrow,
}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("long", [LONG, "y" * (MOST + 1), LONG * 40, 'a "b", {c}\n[d\\\t' * MOST])
def test_the_long_row_is_bad_and_those_around_it_are_read(
    tmp_path: Path, name: str, long: str
) -> None:
    values = [{"a": "one", "b": "1"}, {"a": long, "b": "2"}, {"a": "tw\no", "b": long}]
    values += [{"a": "last", "b": "4"}]
    path = tmp_path / name
    path.write_bytes(WRITERS[name](values))
    first, *bad, last = read_file(path)
    assert [row.values["a"] for row in (first, last) if isinstance(row, Row)] == ["one", "last"]
    for row in bad:
        assert isinstance(row, BadRow)
        assert row.reason == f"longer than {MOST} characters"
    assert len(bad) == 2
    if name in ("d.jsonl", "d.jsonl.gz"):
        assert [row.where for row in bad] == [f"{path}:2", f"{path}:3"]


@pytest.mark.usefixtures("small")
def test_a_long_value_inside_turns_counts(tmp_path: Path) -> None:
    values = [{"messages": [{"role": "user", "content": text}]} for text in ("a", LONG, "b")]
    for name in ("d.parquet", "d.jsonl", "d.json"):
        path = tmp_path / name
        path.write_bytes(WRITERS[name](values))
        assert [isinstance(row, Row) for row in read_file(path)] == [True, False, True]


@pytest.mark.usefixtures("small")
def test_names_of_categories_are_not_counted_in_every_row(tmp_path: Path) -> None:
    names = pa.array([f"name {n}" * 9 for n in range(30)] * 2).dictionary_encode()
    pq.write_table(pa.table({"kind": names}), tmp_path / "d.parquet")
    assert all(isinstance(row, Row) for row in read_file(tmp_path / "d.parquet"))


@pytest.mark.usefixtures("small")
def test_a_long_row_of_a_hub_set_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = datasets.Dataset.from_list([{"text": "a"}, {"text": LONG}])
    monkeypatch.setattr("align.data.sources.require_on_the_hub", lambda *_: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: loaded)
    first, bad = read_source(DataSource(path="org/name"))
    assert isinstance(first, Row)
    assert isinstance(bad, BadRow)


@pytest.mark.usefixtures("small")
def test_characters_count_and_not_their_bytes(tmp_path: Path) -> None:
    """180 characters of three bytes fit into 200; so do 12 on a line that writes them as \\u...."""
    (tmp_path / "d.jsonl").write_bytes(
        json.dumps({"a": "語" * 180}, ensure_ascii=False).encode()
        + b"\n"
        + lines([{"a": "語" * 12}])
    )
    (tmp_path / "d.csv").write_text("a\n" + "語" * 180 + "\n", encoding="utf-8")
    for name in ("d.jsonl", "d.csv"):
        assert all(isinstance(row, Row) for row in read_file(tmp_path / name))


@pytest.mark.parametrize("name", ["d.jsonl.gz", "d.json.gz", "d.csv.gz"])
def test_what_a_row_unpacks_to_never_lies_in_memory(tmp_path: Path, name: str) -> None:
    """60 MB of a, packed into 60 kB; Python holds less than half of it at any time."""
    head, tail = {"d.jsonl.gz": ('{"a": "', '"}'), "d.json.gz": ('[{"a": "', '"}]')}.get(
        name, ("a\n", "")
    )
    path = tmp_path / name
    with gzip.open(path, "wb", compresslevel=1) as stream:
        stream.write(head.encode())
        for _ in range(60):
            stream.write(b"a" * 1_000_000)
        stream.write(f"{tail}\n".encode())
    tracemalloc.start()
    try:
        (bad,) = read_file(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert isinstance(bad, BadRow)
    assert peak < 40_000_000


@pytest.mark.usefixtures("small")
def test_the_end_of_a_skipped_csv_row_is_where_csv_itself_sees_it(tmp_path: Path) -> None:
    """Any text in any cell: rows that are short enough are those that csv reads without a bound."""
    rng = random.Random(5)
    signs = ['"', ",", "\n", "a", " ", "xyz", '5" ']
    for trial in range(60):
        table = [["a", "b"]]
        for _ in range(8):
            size = rng.choice([2, 4, 150, 400])
            table.append(["".join(rng.choices(signs, k=rng.randint(0, size))) for _ in "ab"])
        path = tmp_path / f"{trial}.csv"
        with path.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows(table)
        with path.open(newline="", encoding="utf-8") as stream:
            read = list(csv.reader(stream, strict=True))[1:]
        wanted = [row for row in read if any(map(str.strip, row))]  # a blank row is no row
        found = list(read_file(path))
        assert len(found) == len(wanted)
        for row, cells in zip(found, wanted, strict=True):
            if isinstance(row, Row):
                assert [v or "" for v in row.values.values()] == [
                    c if c.strip() else "" for c in cells
                ]
            else:
                assert sum(map(len, cells)) > MOST // 3
