"""Files whose columns have foreign names: what is said about them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from align.cli import main
from align.config.sections import DataSource
from align.data.examples import load_examples
from align.data.formats.naming import mapping
from align.types import AlignError

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
        (
            "preference",
            {"messages": [{"role": "user", "content": "q"}], "label": True},
            "answers with a label each (KTO), and there is no KTO: `align sft` with data.on_bad",
        ),
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


def test_answers_with_one_label_a_prompt_are_told_what_does_read_them(tmp_path: Path) -> None:
    """TRL's unpaired rows; the column is called by its name."""
    rows = [{"prompt": f"q{n}", "completion": "a", "label": n % 2 == 0} for n in range(4)]
    source = DataSource(path=write(tmp_path / "kto.jsonl", rows))
    with pytest.raises(AlignError) as caught:
        load_examples([source], kind="preference")
    assert "kto.jsonl:1: label: nothing rated otherwise to compare with; a pair needs" in (
        line := str(caught.value)
    )
    assert line.endswith(
        "there is no KTO: `align sft` with data.on_bad_row=skip learns from the "
        "answers whose label is true"
    )
    loaded = load_examples([source], kind="sft", on_bad_row="skip")  # as advised
    assert [example.id[-1] for example in loaded.examples] == ["1", "3"]
    scored = [{"prompt": f"q{n}", "response": "a", "rating": n} for n in range(2)]
    with pytest.raises(AlignError, match=r"rating: nothing rated otherwise.* different scores$"):
        load_examples([DataSource(path=write(tmp_path / "s.jsonl", scored))], kind="preference")


def test_a_column_with_a_space_is_advised_so_that_a_shell_takes_it(tmp_path: Path) -> None:
    row = {"prompt": "q", "Completion ": "a"}
    with pytest.raises(AlignError, match="--columns 'completion=Completion '"):
        load_examples([DataSource(path=write(tmp_path / "d.jsonl", [row]))], kind="sft")


def test_several_files_in_one_word_are_told_to_be_a_list(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = (write(tmp_path / f"{name}.jsonl", [{"prompt": "q"}]) for name in "ab")
    told = f"{a},{b}: no such file or folder; several sources are a list: 'data=[{a},{b}]'"
    with pytest.raises(AlignError) as caught:
        load_examples([DataSource(path=f"{a},{b}")], kind="prompt")
    assert str(caught.value) == told
    override = f"data={a}, {b}"
    assert main(["check", "tiny/sft", override, f"output_dir={tmp_path / 'o'}"]) == 2
    assert f"several sources are a list: 'data=[{a},{b}]'" in capsys.readouterr().err


def test_a_role_that_nobody_has_is_named_where_nothing_is_learnt(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "ai", "value": "a"}]
    source = DataSource(path=write(tmp_path / "d.jsonl", [{"conversations": turns}]))
    ((_, answer),) = (e.messages for e in load_examples([source], kind="sft").examples)
    assert answer == {"role": "assistant", "content": "a"}
    turns[1]["from"] = "oracle"
    write(tmp_path / "d.jsonl", [{"conversations": turns}])
    line = "no assistant turn to learn from; nobody knows the role 'oracle'; allowed: system, "
    with pytest.raises(AlignError, match=line):
        load_examples([source], kind="sft")


def test_turns_as_text_in_parquet_are_told_how_to_become_a_list(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = tmp_path / "d.parquet"
    pq.write_table(pa.table({"messages": [json.dumps(turns)]}), path)
    with pytest.raises(AlignError, match=r"df\[NAME\] = df\[NAME\].map\(json.loads\)"):
        load_examples([DataSource(path=str(path))], kind="sft")
