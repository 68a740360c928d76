"""``align data check`` of judgements says that they are some, and points to `align data rank`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from align.cli import main

COMPARED = {"prompt": "q", "a": "x", "b": "y", "winner": "a"}
RANKED = {"prompt": "q", "ranking": ["x", "y", "z"]}
ADVICE = "`align data rank FILE --pairs pairs.jsonl` makes pairs of them"


def write(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(("row", "form"), [(COMPARED, "a + b + winner"), (RANKED, "ranking")])
def test_judgements_are_recognised(tmp_path, capsys, row, form) -> None:
    file = write(tmp_path / "j.jsonl", row, row)
    assert main(["data", "check", file]) == 0
    told = capsys.readouterr().out
    assert f"{file}: read as judgements, format: {form}" in told
    assert "2 of 2 rows usable" in told
    assert ADVICE in told


def test_bad_judgements_are_counted(tmp_path, capsys) -> None:
    rows = [COMPARED | {"winner": w} for w in ("A", "c", 1, None, "b")]
    file = write(tmp_path / "j.jsonl", *rows)
    assert main(["data", "check", file, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "judgements"
    (report,) = found["reports"]
    assert (report["rows_read"], report["rows_kept"]) == (5, 2)
    assert report["dropped"] == {"winner: not one of a, b, tie": 2, "winner: missing": 1}
    assert found["findings"][0]["level"] == "error"
    assert found["findings"][0]["places"][0].startswith(f"{file}:2: winner: not one of a, b, tie")


@pytest.mark.parametrize(
    "command",
    [
        ["data", "convert", "{j}", "--to", "strings", "-o", "{j}.out.jsonl"],
        ["data", "check", "{pairs}", "{j}"],
        ["data", "check", "{j}", "--kind", "preference"],
    ],
)
def test_judgements_are_no_rows_to_train_on(tmp_path, capsys, command) -> None:
    pair = {"prompt": "q", "chosen": "x", "rejected": "y"}
    files = {
        "j": write(tmp_path / "j.jsonl", COMPARED),
        "pairs": write(tmp_path / "pairs.jsonl", pair),
    }
    assert main([word.format(**files) for word in command]) == 2
    assert ADVICE in capsys.readouterr().err


def test_their_prompts_alone_are_read_when_asked_for(tmp_path, capsys) -> None:
    file = write(tmp_path / "j.jsonl", COMPARED)
    assert main(["data", "check", file, "--kind", "prompt"]) == 0
    assert "read as prompt" in capsys.readouterr().out


def test_a_pair_with_a_ranking_beside_it_is_a_pair(tmp_path, capsys) -> None:
    row = {"prompt": "q", "chosen": "x", "rejected": "y", "ranking": [1, 2]}
    assert main(["data", "check", write(tmp_path / "d.jsonl", row)]) == 0
    assert "read as preference" in capsys.readouterr().out
