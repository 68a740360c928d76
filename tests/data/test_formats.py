"""Reading files: every format gives the same rows, every bad row says where it stands."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import random
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from align.config.sections import DataSource
from align.data import sources
from align.data.readers import arrow_files, json_files
from align.data.sources import BadRow, Row, file_sha256, find_files, read_source
from align.types import AlignError

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "ç, \n", "completion": "d"}]


def read(path: Path) -> list[Row | BadRow]:
    return list(read_source(DataSource(path=str(path))))


def write(path: Path, rows: list[dict]) -> Path:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    table = pa.Table.from_pylist(rows)
    match "".join(path.suffixes):
        case ".jsonl":
            path.write_text(lines, encoding="utf-8")
        case ".jsonl.gz":
            path.write_bytes(gzip.compress(lines.encode()))
        case ".json":
            path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
        case ".json.gz":
            path.write_bytes(gzip.compress(lines.encode()))  # lines in spite of the name
        case ".csv":
            with path.open("w", newline="", encoding="utf-8") as stream:
                writer = csv.DictWriter(stream, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        case ".parquet":
            pq.write_table(table, path)
        case ".arrow":
            with pa.ipc.new_file(path, table.schema) as writer:
                writer.write_table(table)
    return path


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("d.jsonl", ("1", "2")),
        ("d.jsonl.gz", ("1", "2")),
        ("d.json", ("row 1", "row 2")),
        ("d.json.gz", ("1", "2")),
        ("d.csv", ("2", "3")),  # line 1 is the header
        ("d.parquet", ("row 1", "row 2")),
        ("d.arrow", ("row 1", "row 2")),
    ],
)
def test_every_format_gives_the_same_rows(tmp_path, name: str, where: tuple[str, str]) -> None:
    path = write(tmp_path / name, ROWS)
    assert read(path) == [Row(row, f"{path}:{at}") for row, at in zip(ROWS, where, strict=True)]


def test_a_csv_row_after_one_of_two_lines_is_named_by_its_first_line(tmp_path) -> None:
    path = tmp_path / "d.csv"
    path.write_text('text\n"two\nlines"\nlast\n')
    assert [row.where for row in read(path)] == [f"{path}:2", f"{path}:4"]


def test_a_folder_is_all_its_data_files_in_order(tmp_path) -> None:
    for name in ("b.jsonl", "a.csv", ".hidden.jsonl"):
        write(tmp_path / name, ROWS[:1])
    (tmp_path / "README.md").write_text("not data")
    assert [row.where for row in read(tmp_path)] == [
        f"{tmp_path}/a.csv:2",
        f"{tmp_path}/b.jsonl:1",
    ]


def test_folders_written_by_datasets(tmp_path) -> None:
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=saved, test=saved.select([0])).save_to_disk(tmp_path / "two")
    assert [row.values for row in read(tmp_path / "one")] == ROWS
    assert [row.values for row in read(tmp_path / "two")] == ROWS
    test = read_source(DataSource(path=str(tmp_path / "two"), split="test"))
    assert [row.values for row in test] == ROWS[:1]


def test_malformed_json_on_line_7_names_line_7_and_the_rest_is_read(tmp_path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "x"}\n' * 6 + '{"text": "x"\n' + '{"text": "x"}\n' * 2)
    rows = read(path)
    assert len(rows) == 9
    assert isinstance(rows[6], BadRow)
    assert str(rows[6]).startswith(f"{path}:7: row: malformed JSON; Expecting ',' delimiter at")
    assert rows[8] == Row({"text": "x"}, f"{path}:9")


@pytest.mark.parametrize("name", ["d.jsonl", "d.json"])
def test_a_key_twice_spoils_its_row_only(tmp_path, name: str) -> None:
    path = tmp_path / name
    rows = ['{"prompt": "a"}', '{"prompt": "a", "prompt": "b"}', '{"m": [{"r": 1, "r": 2}]}']
    rows = [*rows, '{"prompt": "c"}']
    path.write_text("\n".join(rows) if name == "d.jsonl" else f"[{', '.join(rows)}]")
    first, top, inner, last = read(path)
    assert isinstance(first, Row)
    assert isinstance(last, Row)
    assert "row: has the key 'prompt' twice; rename or remove one of them" in str(top)
    assert "row: has the key 'r' twice" in str(inner)


def test_a_row_that_breaks_off_inside_a_string_is_said_to(tmp_path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "x"}\n{"text": "and th\n')
    assert str(read(path)[1]).startswith(f"{path}:2: row: malformed JSON; Unterminated string")


def test_blank_lines_are_counted_but_no_rows(tmp_path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('\n{"text": "x"}\n  \n[1]\n')
    good, bad = read(path)
    assert good == Row({"text": "x"}, f"{path}:2")
    assert str(bad) == (
        f"{path}:4: row: not a JSON object; it is a list: give {{...}} with columns"
    )


def test_a_list_under_the_name_of_lines(tmp_path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS, indent=1))
    with pytest.raises(AlignError, match=r"is one JSON list, not an object a line; call it \.json"):
        read(tmp_path / "rows.jsonl")


def test_malformed_json_in_an_array_names_its_line(tmp_path) -> None:
    path = tmp_path / "d.json"
    path.write_text('[\n{"text": "x"},\n{"text": }\n]')
    with pytest.raises(AlignError, match=r"d.json:3: malformed JSON: Expecting value at column 10"):
        read(path)


@pytest.mark.parametrize("name", ["d.jsonl", "d.csv"])
def test_bytes_that_are_not_utf8_spoil_their_row_only(tmp_path, name: str) -> None:
    path = tmp_path / name
    line = b'{"text": "caf%s"}\n' if name == "d.jsonl" else b"caf%s\n"
    head = b"" if name == "d.jsonl" else b"text\n"
    path.write_bytes(head + line % "é".encode() + line % b"\xe9" + line % b"e")
    first, bad, last = read(path)
    assert (first.values, last.values) == ({"text": "café"}, {"text": "cafe"})
    assert isinstance(bad, BadRow)
    assert bad.where == f"{path}:{2 if name == 'd.jsonl' else 3}"
    assert bad.reason == "not UTF-8"


@pytest.mark.parametrize("name", ["d.jsonl", "d.csv", "d.json", "d.tsv"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_is_named(tmp_path, name: str, encoding: str) -> None:
    path = tmp_path / name
    path.write_bytes("\ufefftext\nx\n".encode(encoding))
    with pytest.raises(AlignError, match=f"{name}: is UTF-16, not UTF-8; save it as UTF-8"):
        read(path)


def test_a_json_array_that_is_not_utf8_is_an_error(tmp_path) -> None:
    path = tmp_path / "d.json"
    path.write_bytes(b'[\n{"text": "caf\xe9"}]')
    with pytest.raises(AlignError, match=r"d.json:2: not UTF-8 \(byte 0xe9\)"):
        read(path)


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path) -> None:
    for name, text in (("d.csv", "text\nx\n"), ("d.jsonl", '{"text": "x"}'), ("d.json", "[{}]")):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert [row.values for row in read(tmp_path)] == [{"text": "x"}, {}, {"text": "x"}]


def test_tabs_are_for_tsv(tmp_path) -> None:
    (tmp_path / "a.tsv").write_text("prompt\tcompletion\none, two\tthree\n", encoding="utf-8")
    (row,) = read_source(DataSource(path=str(tmp_path / "a.tsv")))
    assert row.values == {"prompt": "one, two", "completion": "three"}


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_a_stray_quote_swallows_no_line(tmp_path, name: str) -> None:
    separator = "," if name == "a.csv" else "\t"
    lines = [["prompt", "completion"], ['"Quoted start', "one"], ['"Other start', "two"]]
    text = "".join(separator.join(line) + "\n" for line in lines)
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(AlignError, match=rf"{name}:3: .* a cell that begins with a quote"):
        list(read_source(DataSource(path=str(tmp_path / name))))


@pytest.mark.parametrize(
    ("name", "header", "told"),
    [
        ("a.csv", "prompt;completion", "separated by semicolons, not by commas"),
        ("a.csv", "prompt\tcompletion", "separated by tabs, not by commas"),
        ("a.tsv", "prompt,completion", "separated by commas, not by tabs"),
    ],
)
def test_another_separator_is_named(tmp_path, name: str, header: str, told: str) -> None:
    (tmp_path / name).write_text(f"{header}\na;b\n", encoding="utf-8")
    with pytest.raises(AlignError, match=told):
        list(read_source(DataSource(path=str(tmp_path / name))))


def test_a_csv_row_with_a_cell_too_many_is_bad(tmp_path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("prompt,completion\na,b\na,b, and c\n")
    good, bad = read(path)
    assert good.values == {"prompt": "a", "completion": "b"}
    assert str(bad) == (
        f"{path}:3: row: wrong number of cells; it has 3 cells and the header 2: "
        "quote the commas, or mend a line that is cut off"
    )


@pytest.mark.parametrize("name", ["d.jsonl.gz", "d.parquet", "d.arrow"])
def test_a_broken_file_is_one_error(tmp_path, name: str) -> None:
    path = write(tmp_path / name, ROWS)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(AlignError, match=f"{name}: cannot be read: .*; fetch it again"):
        read(path)


def test_a_missing_file_names_the_nearest(tmp_path) -> None:
    write(tmp_path / "prompts.jsonl", ROWS)
    with pytest.raises(AlignError) as caught:
        read(tmp_path / "promts.jsonl")
    assert str(caught.value) == (
        f"{tmp_path}/promts.jsonl: no such file or folder; did you mean {tmp_path}/prompts.jsonl?"
    )


def test_a_missing_file_of_a_missing_folder_names_the_nearest_folder(tmp_path) -> None:
    (tmp_path / "verses").mkdir()
    with pytest.raises(AlignError, match=r"did you mean .*/verses\?"):
        read(tmp_path / "verse" / "train.jsonl")


def test_what_lies_in_an_existing_folder_is_never_sought_on_the_hub(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(AlignError, match="data/kjv: no such file or folder"):
        find_files(DataSource(path="data/kjv"))
    assert find_files(DataSource(path="org/name")) == []


def test_a_hub_set_that_cannot_be_loaded_is_one_line(monkeypatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr("align.data.sources.require_on_the_hub", lambda *_: None)
    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(AlignError, match=r"^org/name: no such file, and not loaded .*no network"):
        list(read_source(DataSource(path="org/name")))


def test_rows_of_a_hub_set_are_named_by_split(monkeypatch) -> None:
    asked = []

    def load(*args: object, **kwargs: object) -> datasets.Dataset:
        asked.append((args, kwargs))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr("align.data.sources.require_on_the_hub", lambda *_: None)
    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = list(read_source(DataSource(path="org/set", name="en", split="train[:2]")))
    assert asked == [(("org/set", "en"), {"split": "train[:2]"})]
    assert [row.where for row in rows] == ["org/set/train[:2]:row 1", "org/set/train[:2]:row 2"]


def test_a_file_of_another_kind_is_refused(tmp_path) -> None:
    (tmp_path / "d.txt").write_text("x")
    with pytest.raises(AlignError, match=r"d.txt: not a data file by its name; allowed: .jsonl"):
        read(tmp_path / "d.txt")


def test_sha256_is_the_files_own(tmp_path) -> None:
    path = write(tmp_path / "d.jsonl", ROWS)
    assert file_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


# ---------------------------------------------------------------- rows one at a time


def test_a_json_file_of_lines_is_read_a_line_at_a_time() -> None:
    """Behind a byte order mark and more white space than is looked at in one go."""
    line = b'{"prompt": "x"}\n'
    stream = io.BytesIO(b"\xef\xbb\xbf" + b" " * 70_000 + b"\n" + line * 1000)
    first = next(json_files.read_json(stream, Path("a.json")))
    assert isinstance(first, Row)
    assert first.where == "a.json:2"
    assert stream.tell() == 3 + 70_000 + 1 + len(line)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_arrows_rows_become_values_a_few_at_a_time(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pa.table({"prompt": [f"p{n}" for n in range(100)]})
    if name == "a.parquet":
        pq.write_table(table, tmp_path / name)
    else:
        with pa.ipc.new_file(str(tmp_path / name), table.schema) as file:
            file.write_table(table)
    made: list[int] = []

    class Counted:
        """A batch that says how many rows of it are asked for."""

        def __init__(self, batch: pa.RecordBatch) -> None:
            self.batch, self.num_rows, self.nbytes = batch, batch.num_rows, batch.nbytes

        def slice(self, start: int, count: int) -> Counted:
            return Counted(self.batch.slice(start, count))

        def to_pylist(self) -> list[dict[str, str]]:
            made.append(self.num_rows)
            return self.batch.to_pylist()

    original = arrow_files._values
    monkeypatch.setattr(arrow_files, "BATCH", 7)
    monkeypatch.setattr(arrow_files, "_values", lambda batch: original(Counted(batch)))
    found = read(tmp_path / name)
    assert [row.values["prompt"] for row in found] == [f"p{n}" for n in range(100)]
    assert found[99].where.endswith(":row 100")
    assert max(made) == 7


def test_of_a_parquet_file_one_row_group_is_in_memory(tmp_path: Path) -> None:
    """Of 40 groups, 8 MB; pyarrow counts what it holds, with what it reads ahead."""
    rng = random.Random(0)
    table = pa.table({"prompt": [rng.randbytes(1000).hex() for _ in range(4000)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    size = table.nbytes
    del table
    before = pa.total_allocated_bytes()
    most = 0
    for row in sources.read_file(tmp_path / "a.parquet"):
        assert isinstance(row, Row)
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < size / 4


def test_a_hub_set_is_gone_through_and_never_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    class Mapped:
        def __iter__(self) -> Any:
            return (taken.append(n) or {"prompt": f"p{n}"} for n in range(10))

    monkeypatch.setattr("align.data.sources.require_on_the_hub", lambda *_: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: Mapped())
    found = read_source(DataSource(path="org/name"))
    for number in range(3):
        next(found)
        assert len(taken) == number + 1


@pytest.mark.parametrize("name", ["data", "rows"])
@pytest.mark.parametrize("indent", [None, 1])
def test_one_object_around_the_rows_is_refused(tmp_path, name: str, indent: int | None) -> None:
    path = tmp_path / "d.json"
    path.write_text(json.dumps({"version": 1, name: [{"text": "a"}]}, indent=indent))
    with pytest.raises(AlignError, match=rf"d.json: is one object, whose '{name}' holds the rows;"):
        list(sources.read_file(path))


@pytest.mark.parametrize("rows", [1, 2])
def test_lines_in_a_json_file_whose_values_are_lists(tmp_path, rows: int) -> None:
    line = json.dumps({"messages": [{"role": "user", "content": "q"}], "data": ["a"]})
    path = tmp_path / "d.json"
    path.write_text(f"{line}\n" * rows)
    found = list(sources.read_file(path))
    assert [row.where for row in found] == [f"{path}:{n + 1}" for n in range(rows)]
    assert found[0].values["data"] == ["a"]


def test_a_list_on_one_line_of_jsonl_is_refused(tmp_path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('[{"text": "a"}, {"text": "b"}]\n')
    with pytest.raises(AlignError, match=r"d.jsonl: is one JSON list, .*; call it .json"):
        list(sources.read_file(path))
