"""JSON files that are not one object on each line: what they are is said, and how to write them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from align.data.readers import json_files, json_shapes
from align.data.sources import BadRow, Row, read_file
from align.types import AlignError

ROWS = [{"prompt": "a", "chosen": "b"}, {"prompt": "c", "chosen": "d"}]
COLUMNS = {"prompt": ["a", "c"], "chosen": ["b", "d"]}
TURNS = [{"role": "user", "content": "a"}]
SHAPES = {
    "a list for each column": json.dumps(COLUMNS),
    "an object of row numbers for each column": json.dumps(
        {name: dict(enumerate(cells)) for name, cells in COLUMNS.items()}
    ),
    "its rows as lists apart": json.dumps(
        {"columns": ["prompt", "chosen"], "index": [0, 1], "data": [["a", "b"], ["c", "d"]]}
    ),
    "a row under each of its keys": json.dumps({"0": ROWS[0], "1": ROWS[1]}),
    "an object goes over several lines": "\n".join(json.dumps(row, indent=1) for row in ROWS),
}


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize("what", SHAPES)
@pytest.mark.parametrize("mark", ["", "\ufeff", "\n\n"])
def test_the_shape_and_the_way_out_are_named(
    tmp_path: Path, name: str, what: str, mark: str
) -> None:
    path = tmp_path / name
    path.write_text(mark + SHAPES[what], encoding="utf-8")
    with pytest.raises(AlignError) as caught:
        list(read_file(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert what in str(caught.value)
    assert 'to_json(path, orient="records", lines=True)' in str(caught.value)


@pytest.mark.parametrize("what", SHAPES)
def test_a_shape_that_is_longer_than_a_row_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """It is told by its beginning; `{"data": [{...` and a list on one line too."""
    path = tmp_path / "rows.json"
    path.write_text(SHAPES[what], encoding="utf-8")
    monkeypatch.setattr(json_shapes, "MAX_CHARS", 30)
    with pytest.raises(AlignError, match=r"row numbers|each|apart|several"):
        list(read_file(path))
    path.write_text(json.dumps({"data": ROWS}))
    with pytest.raises(AlignError, match="whose 'data' holds the rows"):
        list(read_file(path))


def test_a_long_first_row_is_no_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_shapes, "MAX_CHARS", 30)
    path = tmp_path / "rows.json"
    for row in ({"messages": TURNS}, {"prompt": "q" * 40}, {"info": {"post": "a" * 40}}):
        path.write_text(json.dumps(row))
        assert list(read_file(path)) == [Row(row, f"{path}:1")]


def test_columns_of_conversations_are_columns(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"messages": [TURNS, TURNS]}, indent=1))
    with pytest.raises(AlignError, match="a list for each column"):
        list(read_file(path))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TURNS},
        {"chosen": TURNS, "rejected": TURNS, "tags": ["a"]},
        {"prompt": TURNS, "responses": ["x"]},
        {"ranking": ["x", "y"], "models": ["m", "n"]},
        {"prompt": "q", "references": ["a", "b"]},
        {"chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}},
        {"info": {"post": "a"}, "summaries": [{"text": "b"}], "choice": 0},
    ],
)
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_one_row_with_lists_stays_a_row(tmp_path: Path, name: str, row: dict) -> None:
    path = tmp_path / name
    path.write_text(json.dumps(row))
    assert list(read_file(path)) == [Row(row, f"{path}:1")]


@pytest.mark.parametrize(("rows", "what"), [([["a", "b"]], "lists"), (["a", "b"], "texts")])
def test_a_list_of_what_has_no_names(tmp_path: Path, rows: list, what: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    with pytest.raises(AlignError, match=f"is a list of {what}, whose columns have no names"):
        list(read_file(path))


@pytest.mark.parametrize("text", ['[\n{"a":\n1}]', '[{"a": 1},\n{"a": 2}]', '[{"a": 1}, broken'])
def test_a_list_over_several_lines_of_jsonl(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(AlignError, match=r"is one JSON list, .*; call it \.json"):
        list(read_file(path))


def test_an_object_over_several_lines_that_is_broken_too(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{\n "prompt": "a",\n}\n')
    with pytest.raises(AlignError, match="goes over several lines"):
        list(read_file(path))


def test_a_first_line_that_is_cut_off_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "chos\n{"prompt": "c"}\n')
    bad, good = read_file(path)
    assert isinstance(bad, BadRow)
    assert (bad.where, bad.reason) == (f"{path}:1", "malformed JSON")
    assert good == Row({"prompt": "c"}, f"{path}:2")


def test_what_python_prints_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{ROWS[0]}\n")
    (bad,) = read_file(path)
    assert "write it with json.dumps" in str(bad)


# ---------------------------------------------------------------- a list, item by item


@pytest.mark.parametrize("piece", [1, 2, 7, 1 << 16])
def test_a_list_is_read_item_by_item(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    """However the pieces fall: inside a number, an escape, a character of several bytes."""
    monkeypatch.setattr(json_files, "PIECE", piece)
    path = tmp_path / "rows.json"
    rows = [{"a": 'é\n"\\ 😀'}, {"a": [1.5, -12, True, None]}, {"b": {"c": "}]"}}, {}]
    for indent in (None, 1):
        path.write_text(json.dumps(rows, indent=indent, ensure_ascii=bool(indent)), "utf-8")
        assert [row.values for row in read_file(path) if isinstance(row, Row)] == rows
    path.write_text('[{"a": 1}, 12, "x"]')
    assert [isinstance(row, Row) for row in read_file(path)] == [True, False, False]
    path.write_text(" [ ] ")
    assert list(read_file(path)) == []


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ('[\n{"a": 1},\n {"a": }]', r":3: .* at column 8"),
        ('[{"a": 1},]', r":1: .*Expecting value at column 11"),
        ('[{"a": 1}\n {"a": 2}]', r":2: .*Expecting ',' delimiter at column 2"),
        ('[{"a": 1}', r":1: .*Expecting ',' delimiter at column 10"),
        ('[{"a": "x', r":1: .*Unterminated string starting at column 8"),
        ('[{"a": 1}] x', r":1: .*Extra data at column 12"),
    ],
)
@pytest.mark.parametrize("piece", [1, 1 << 16])
def test_a_broken_list_names_line_and_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, where: str, piece: int
) -> None:
    monkeypatch.setattr(json_files, "PIECE", piece)
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(AlignError, match=where):
        list(read_file(path))


def test_a_list_is_not_copied_for_each_of_its_rows(tmp_path: Path) -> None:
    """A piece that is read is held as it is until all of its rows are gone through."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"a": number} for number in range(1000)], indent=1))
    with path.open("rb") as stream:
        text = json_files._Text(stream, path)
        text.more()
        whole, rows = text.rest, json_files._read_list(text)
        for number in range(999):
            row = next(rows)
            assert isinstance(row, Row)
            assert row.values == {"a": number}
            assert text.rest is whole


@pytest.mark.parametrize("piece", [1, 7, 1 << 16])
def test_rows_of_a_list_do_not_depend_on_the_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    """A row that is too long among them, and white space of more than a piece between them."""
    monkeypatch.setattr(json_files, "PIECE", piece)
    monkeypatch.setattr(json_files, "MAX_CHARS", 40)
    path = tmp_path / "rows.json"
    long = json.dumps({"a": "]" * 30 + '\\"', "b": [1, {"c": "}" * 30}]})
    path.write_text('[{"a": 1},' + " \n" * 20 + f'{long} , {{"a": 12}}\n,12345,{{"a": }}]')
    rows, found = read_file(path), []
    with pytest.raises(AlignError, match=r":22: .*Expecting value at column 14"):
        found.extend(row.values if isinstance(row, Row) else row.where for row in rows)
    assert found == [{"a": 1}, f"{path}:row 2", {"a": 12}, f"{path}:row 4"]
