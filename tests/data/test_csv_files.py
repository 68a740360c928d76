"""CSV and TSV: blank cells are null, and a last line that is cut off is a bad row."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.config.sections import DataSource
from align.data.examples import load_examples
from align.data.sources import BadRow, Row, read_file
from align.types import AlignError, PreferencePair, SFTExample


def test_a_blank_cell_is_null(tmp_path: Path) -> None:
    path = tmp_path / "d.tsv"
    path.write_text('prompt\tmargin\tnote\na\t\t" "\nb\t2\tx\n')
    assert [row.values for row in read_file(path) if isinstance(row, Row)] == [
        {"prompt": "a", "margin": None, "note": None},
        {"prompt": "b", "margin": "2", "note": "x"},
    ]


def test_a_pair_without_its_margin_and_a_row_without_its_input(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("prompt,chosen,rejected,margin\nq,good,bad,\nr,good,bad,2\n")
    read = load_examples([DataSource(path=str(pairs))], kind="preference").examples
    assert [p.margin for p in read if isinstance(p, PreferencePair)] == [None, 2.0]
    alpaca = tmp_path / "alpaca.csv"
    alpaca.write_text("instruction,input,output,system\nSay hi,,hi,\n")
    (row,) = load_examples([DataSource(path=str(alpaca))], kind="sft").examples
    assert isinstance(row, SFTExample)
    assert row.messages == (
        {"role": "user", "content": "Say hi"},
        {"role": "assistant", "content": "hi"},
    )


def test_a_blank_cell_that_is_needed_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("prompt,completion\na,b\nc,\n")
    with pytest.raises(AlignError, match=r"d.csv:3: completion: null; give it a value"):
        load_examples([DataSource(path=str(path))], kind="sft")


@pytest.mark.parametrize("name", ["d.csv", "d.tsv"])
@pytest.mark.parametrize("end", ['3,"four and', '3,"four\nand a', '3,"', "3", '"3'])
def test_a_last_line_that_is_cut_off_is_a_bad_row(tmp_path: Path, name: str, end: str) -> None:
    path = tmp_path / name
    text = 'a,b\n1,"x\ny"\n' + end
    path.write_text(text.replace(",", "\t") if name == "d.tsv" else text)
    good, bad = read_file(path)
    assert good == Row({"a": "1", "b": "x\ny"}, f"{path}:2")
    assert isinstance(bad, BadRow)
    assert bad.where == f"{path}:4"
    assert bad.reason in ("breaks off inside a quoted cell", "wrong number of cells")


def test_a_quote_that_hides_rows_up_to_the_end_is_no_cut_line(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text('a,b\n1,"2\n3,4\n5,6\n')
    with pytest.raises(AlignError, match=r"d.csv:2: .* a cell that begins with a quote"):
        list(read_file(path))


def test_a_quote_inside_a_cell_is_text(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text('a,b\n5" disk,3" disk\n1,2\n')
    assert [dict(row.values) for row in read_file(path) if isinstance(row, Row)] == [
        {"a": '5" disk', "b": '3" disk'},
        {"a": "1", "b": "2"},
    ]


@pytest.mark.parametrize("name", ["d.csv", "d.tsv"])
def test_what_a_spreadsheet_exports_around_the_table_is_passed_over(
    tmp_path: Path, name: str
) -> None:
    """Columns without a name behind the last one, and lines of separators, with nothing in them."""
    path = tmp_path / name
    text = "\n,,,\nprompt,completion,, \na,b,, \n,,,\nc,d,,\n,,,\n,,,\n"
    path.write_text(text.replace(",", "\t") if name == "d.tsv" else text)
    assert list(read_file(path)) == [
        Row({"prompt": "a", "completion": "b"}, f"{path}:4"),
        Row({"prompt": "c", "completion": "d"}, f"{path}:6"),
    ]


def test_a_cell_behind_the_last_named_column_is_a_bad_row(tmp_path: Path) -> None:
    """An unquoted comma would else shift a text's end out of the table without a word."""
    path = tmp_path / "d.csv"
    path.write_text('prompt,completion,,\na,b,,\nq,"yes", and no,\n')
    good, bad = read_file(path)
    assert good == Row({"prompt": "a", "completion": "b"}, f"{path}:2")
    assert str(bad) == (
        f"{path}:3: row: a cell behind the last column that has a name; "
        "' and no': quote the commas of the line, or name the column"
    )


def test_the_index_that_pandas_writes_is_a_column_that_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text(",prompt,completion,\n0,a,b,\n1,c,d,\n")
    loaded = load_examples([DataSource(path=str(path))], kind="sft")
    assert [report.unread for report in loaded.reports] == [("Unnamed: 0",)]
    assert len(loaded.examples) == 2
    path.write_text(",,prompt,completion\n0,7,a,b\n")
    (row,) = read_file(path)
    assert isinstance(row, Row)
    assert row.values == {"Unnamed: 0": "0", "Unnamed: 1": "7", "prompt": "a", "completion": "b"}


def test_columns_of_one_name_are_refused_where_the_header_is(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("\n,\na,a\n1,2\n")
    with pytest.raises(AlignError, match=r"d.csv:3: two columns are called 'a'; rename one"):
        list(read_file(path))
