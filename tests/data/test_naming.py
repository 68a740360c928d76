"""Files whose columns have foreign names: what is said about them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from align.cli import main
from align.data.naming import mapping
from align.data.preferences import load_examples
from align.types import AlignError, DataSource

FOREIGN = [{"question": f"q{n}", "good": "yes", "bad": "no"} for n in range(3)]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_columns_that_look_like_ours() -> None:
    assert mapping("preference", ["Question", "good", "x"]) == {
        "prompt": "Question",
        "chosen": "good",
        "rejected": "NAME",
    }
    assert mapping("sft", ["prompt", "answer"]) == {"completion": "answer"}


def test_a_file_of_foreign_columns_is_told_how_to_name_them(tmp_path: Path) -> None:
    source = DataSource(path=write(tmp_path / "d.jsonl", FOREIGN))
    with pytest.raises(AlignError) as caught:
        load_examples([source], kind="preference")
    line = str(caught.value)
    assert "none of 3 rows has the columns of pairs" in line
    assert "its columns: question, good, bad; say which is which: " in line
    told = "data.columns.prompt=question data.columns.chosen=good data.columns.rejected=bad"
    assert told in line
    assert "on_bad_row" not in line
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    assert len(
        load_examples([DataSource(path=source.path, columns=columns)], kind="preference").examples
    )


def test_to_skip_is_advised_where_that_leaves_a_row(tmp_path: Path) -> None:
    """Also where the bad row comes first."""
    rows = [{"prompt": "p"}, {"prompt": "p", "completion": "c"}]
    with pytest.raises(AlignError, match=r"d.jsonl:1: completion: .*data.on_bad_row=skip$"):
        load_examples([DataSource(path=write(tmp_path / "d.jsonl", rows))], kind="sft")


def test_to_skip_is_not_advised_where_every_row_is_bad(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "completion": ""}] * 2
    with pytest.raises(
        AlignError, match=r"none of 2 rows can be used; the first: .*empty"
    ) as caught:
        load_examples([DataSource(path=write(tmp_path / "d.jsonl", rows))], kind="sft")
    assert "on_bad_row" not in str(caught.value)


def test_data_check_says_what_foreign_columns_could_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "d.jsonl", FOREIGN)
    assert main(["data", "check", path]) == 2
    line = capsys.readouterr().err
    assert line.startswith(
        f"align: {path}:1: columns: do not tell what the row is; they are question,"
    )
    for way in (
        "for pairs --columns prompt=question chosen=good rejected=bad",
        "for prompts --columns prompt=question",
        "for SFT rows --columns prompt=question completion=NAME",
        "data.columns.prompt=question",
    ):
        assert way in line
    assert main(["data", "check", path, *way_of_pairs(line)]) == 0


def way_of_pairs(line: str) -> list[str]:
    return line.split("for pairs ")[1].split(";")[0].split()


def test_capitals_are_foreign_names_that_look_like_ours() -> None:
    assert mapping("sft", ["Prompt", "Completion "]) == {
        "prompt": "Prompt",
        "completion": "Completion ",
    }
    assert mapping("sft", ["prompt", "completion"]) == {}


@pytest.mark.parametrize(
    ("kind", "row", "said"),
    [
        (
            "sft",
            FOREIGN[0] | {"chosen": "a", "rejected": "b"},
            "pairs, which `align rm` and ",
        ),
        ("sft", {"prompt": "q", "references": ["r"]}, "prompts, which `align ppo`, "),
        ("preference", {"prompt": "q", "completion": "a"}, "SFT rows, which `align sft` reads"),
        ("preference", {"prompt": "q", "chosn": "a", "rejected": "b"}, None),
        ("sft", {"prompt": "q", "response": "a"}, None),
    ],
)
def test_rows_of_another_kind_are_told(tmp_path: Path, kind, row, said) -> None:
    source = DataSource(path=write(tmp_path / "d.jsonl", [row]))
    with pytest.raises(AlignError) as caught:
        load_examples([source], kind=kind)
    assert ("they are" in str(caught.value)) is (said is not None)
    assert said is None or f"; they are {said}" in str(caught.value)
