"""Two answers side by side: which columns they are, who won, and where neither can be told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.cli import main
from align.config.sections import DataSource
from align.data.examples import load_examples
from align.data.formats.columns import read_row
from align.data.formats.comparisons import comparison_of
from align.data.formats.naming import mapping
from align.data.sources import BadRow, Row
from align.data.stream_counts import Counts, SourceCounts, examples_of
from align.feedback.outcomes import read_judgements
from align.types import AlignError

USER = {"role": "user", "content": "q"}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def won(row: dict[str, Any]) -> tuple[Any, Any]:
    (pair,) = read_row(Row(row, "f:7"), "preference", columns={}, source="f")
    return pair.chosen, pair.rejected


def refusal(row: dict[str, Any]) -> str:
    with pytest.raises(BadRow) as caught:
        won(row)
    return str(caught.value)


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        ("response_a", "response_b", "winner"),
        ("Response A", "Response B", "preference"),
        ("answer_a", "answer_b", "label"),
        ("completion_a", "completion_b", "preferred"),
        ("model_a_output", "model_b_output", "winner"),
        ("output_model_a", "output_model_b", "verdict"),
        ("response_0", "response_1", "better_response_id"),
        ("response1", "response2", "choice"),
    ],
)
def test_columns_of_two_answers_are_found(a: str, b: str, verdict: str) -> None:
    found = comparison_of(["id", b, verdict, "prompt", a, "model_a", "model_b"])
    assert found is not None
    assert (found.a, found.b, found.verdict) == (a, b, verdict)


@pytest.mark.parametrize(
    "columns",
    [
        ("response_a", "winner"),
        ("response_a", "response_b"),
        ("response_a", "response_b", "answer_a", "answer_b", "winner"),  # of which?
        ("response_0", "response_1", "response_2", "label"),
        ("model_a", "model_b", "winner"),
        ("score_a", "score_b", "winner"),
        ("prompt_a", "prompt_b", "label"),
        ("sentence1", "sentence2", "label"),
    ],
)
def test_where_more_than_one_reading_is_possible_none_is_taken(columns: tuple[str, ...]) -> None:
    assert comparison_of(columns) is None


@pytest.mark.parametrize(
    ("verdict", "best"),
    [
        *((word, "x") for word in ("a", "A", "model_a", "Model A", "response_a", "assistant_a")),
        *((word, "x") for word in ("model-a", "left", "First", "first response")),
        *((word, "y") for word in ("b", " B ", "model_b", "response_b", "right", "second")),
    ],
)
def test_the_verdict_names_a_side(verdict: str, best: str) -> None:
    row = {"prompt": "q", "response_a": "x", "response_b": "y", "winner": verdict}
    assert won(row) == (("x", "y") if best == "x" else ("y", "x"))


@pytest.mark.parametrize(
    ("names", "first", "second"),
    [
        (("response_0", "response_1"), (0, "0", 0.0, "response_0", "a"), (1, "1", 1.0, "B")),
        (("answer_1", "answer_2"), (1, "1", 1.0, "answer_1", "left"), (2, "2", 2.0, "answer_2")),
    ],
)
def test_a_number_names_the_column_that_has_it(names, first, second) -> None:
    row = {"prompt": "q", names[0]: "x", names[1]: "y"}
    assert [won({**row, "label": value}) for value in first] == [("x", "y")] * len(first)
    assert [won({**row, "label": value}) for value in second] == [("y", "x")] * len(second)


NUMBERS: list[Any] = [0, 1, "1", 2, -1, 0.5, "-1", "+1", "1.0"]
WORDS: list[Any] = [True, "good", "a b", "gpt-4", ["a"], "-a", "a>b", "a is worse", "not a", "tie?"]


@pytest.mark.parametrize("value", [*NUMBERS, *WORDS, "a" * 500])
def test_a_verdict_that_could_mean_either_is_refused(value: Any) -> None:
    line = refusal({"prompt": "q", "response_a": "x", "response_b": "y", "winner": value})
    assert line.startswith(f"f:7: winner: not one of a, b, tie; it is {value!r:.40}")
    hint = ": which of the answers a number means is not said; write a, b or tie there"
    assert line.endswith(hint) is (value in NUMBERS and value is not True)


@pytest.mark.parametrize(
    ("names", "good", "bad"),
    [
        (("response_0", "response_1"), 1, -1),
        (("response_0", "response_1"), 1, "-1"),
        (("response_0", "response_1"), 1, "1.0"),
        (("response_0", "response_1"), 1, 0.5),
        (("response_0", "response_1"), "response_1", "response_2"),
        (("response_1", "response_2"), 1, 0),  # counted from 0
        (("response_1", "response_2"), 2, 0.0),
        (("response_1", "response_2"), "1", "-1"),
        (("response_1", "response_2"), 1, 5),  # a scale
    ],
)
def test_a_number_that_no_column_has_refuses_the_file(tmp_path: Path, names, good, bad) -> None:
    """The other half of the rows would be read the wrong way round."""
    row = {"prompt": "q", names[0]: "x", names[1]: "y"}
    rows = [{**row, "label": good}, {**row, "label": bad}]
    source = DataSource(path=write(tmp_path / "d.jsonl", rows))
    line = f"d.jsonl:2: label: not one of .*{names[0]}, {names[1]} or tie there, or .*winner=NAME"
    for on_bad_row in ("stop", "skip"):
        with pytest.raises(AlignError, match=line):
            load_examples([source], kind="preference", on_bad_row=on_bad_row)
        options: dict[str, Any] = {"kind": "preference", "on_bad_row": on_bad_row, "seed": 0}
        counts = SourceCounts(source.path)
        assert examples_of(Row(rows[0], "d.jsonl:1"), source, counts, **options)
        with pytest.raises(AlignError, match=line):
            examples_of(Row(rows[1], "d.jsonl:2"), source, counts, **options)
    with pytest.raises(AlignError, match=line):
        read_judgements([source.path])
    better = DataSource(path=write(tmp_path / "e.jsonl", [{**r, "winner": "b"} for r in rows]))
    (first, _) = load_examples([better], kind="preference").examples
    assert first.chosen == "y"


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"history": "q", "human_ref_A": "x", "human_ref_B": "y"}, "labels"),
        ({"info": {"post": "q"}, "summaries": [{"text": "x"}, {"text": "y"}]}, "choice"),
    ],
)
@pytest.mark.parametrize("number", [2, -1, 0.5])
def test_other_numbers_in_a_known_set_refuse_the_file(tmp_path: Path, row, name, number) -> None:
    path = write(tmp_path / "d.jsonl", [{**row, name: 1}, {**row, name: number}])
    with pytest.raises(AlignError, match=f"d.jsonl:2: {name}: not 0 or 1; it is {number}"):
        load_examples([DataSource(path=path)], kind="preference", on_bad_row="skip")


def test_prompts_and_answers_may_be_turns_or_whole_conversations() -> None:
    turns = {"prompt": [USER], "response_a": [said("x")], "response_b": [said("y")]}
    assert won({**turns, "winner": "b"}) == ((said("y"),), (said("x"),))
    arena = {"conversation_a": [USER, said("x")], "conversation_b": [USER, said("y")]}
    assert won({**arena, "winner": "model_a"}) == ((said("x"),), (said("y"),))
    for verdict in ("model_a", "tie", 5):  # which a prompt does not need
        row = Row({**arena, "winner": verdict}, "f:7")
        (prompt,) = read_row(row, "prompt", columns={}, source="f")
        assert prompt.prompt == (USER,)


def test_a_bad_answer_is_told_under_its_own_name() -> None:
    row = {"prompt": "q", "response_a": "x", "response_b": " ", "winner": "b"}
    assert refusal(row) == "f:7: response_b: empty; give it a text or remove the row"
    assert refusal({**row, "winner": None}).startswith("f:7: winner: null; give it a value")


TIES = ("tie", "tie (bothbad)", "both_bad", "Tie", "draw", "neither")


def test_ties_are_counted_and_end_nothing(tmp_path: Path, capsys) -> None:
    row = {"prompt": "q", "response_a": "x", "response_b": "y", "winner": "model_b"}
    rows = [*({**row, "winner": tie} for tie in TIES), row]
    source = DataSource(path=write(tmp_path / "d.jsonl", rows))
    loaded = load_examples([source], kind="preference", on_bad_row="stop")
    (report,) = loaded.reports
    reason = "winner: a tie, which prefers neither"
    assert (report.rows_read, report.rows_kept, dict(report.dropped)) == (7, 1, {reason: 6})
    counts = SourceCounts(source.path)
    for number, values in enumerate(rows):
        options: dict[str, Any] = {"kind": "preference", "on_bad_row": "stop", "seed": 0}
        examples_of(Row(values, f"d:{number}"), source, counts, **options)
    again = Counts.of(Counts([counts]).report()).sources[0]
    assert (again.num_kept, dict(again.bad.reasons)) == (1, {reason: 6})
    assert main(["data", "check", source.path]) == 0
    page = capsys.readouterr().out
    assert "read as preference, format: two answers and which won" in page
    assert f"left out: {reason}" in page
    only_ties = write(tmp_path / "t.jsonl", rows[:-1])
    with pytest.raises(AlignError, match=f"none of 6 rows is used: {reason}; give a file"):
        load_examples([DataSource(path=only_ties)], kind="preference")


def test_data_rank_reads_the_same_columns(tmp_path: Path, capsys) -> None:
    row = {"prompt": "q", "response_a": "x", "response_b": "y", "winner": "model_b"}
    path = write(tmp_path / "d.jsonl", [row, {**row, "winner": "tie (bothbad)"}])
    second, tie = read_judgements([path])
    assert (second.items, second.is_tie, tie.is_tie) == (("y", "x"), False, True)
    pairs = tmp_path / "pairs.jsonl"
    assert main(["data", "rank", path, "--pairs", str(pairs)]) == 0
    written = json.loads(pairs.read_text())
    assert (written["chosen"], written["rejected"]) == ("y", "x")
    same = write(tmp_path / "same.jsonl", [{**row, "response_b": "x"}])
    with pytest.raises(AlignError, match="response_b: the same as response_a"):
        read_judgements([same])


def test_a_column_that_may_say_who_won_is_not_advised_as_the_chosen_answer(tmp_path: Path) -> None:
    columns = ["prompt", "response_a", "response_b", "outcome"]
    assert mapping("preference", [*columns, "winner"]) == {}
    assert mapping("preference", ["question", "first", "second", "winner"]) == {
        "prompt": "question",
        "chosen": "NAME",
        "rejected": "NAME",
    }
    both = mapping("preference", ["prompt", "winner", "loser"])
    assert both == {"chosen": "winner", "rejected": "loser"}
    source = DataSource(path=write(tmp_path / "d.jsonl", [dict.fromkeys(columns, "x")]))
    with pytest.raises(AlignError, match="response_a and response_b are two answers side by side"):
        load_examples([source], kind="preference")


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("chosen_score", "rejected_score"),
        ("score_chosen", "score_rejected"),
        ("chosen-rating", "rejected-rating"),
        ("chosen_reward", "rejected_reward"),
    ],
)
def test_scores_that_contradict_a_pair_are_counted(tmp_path: Path, capsys, good, bad) -> None:
    row = {"prompt": "q", "chosen": "x", "rejected": "y"}
    scores: list[Any] = [(1, 9), (9, 1), (5, 5), ("2", "10"), (None, 1), ("low", "high")]
    rows = [{**row, "prompt": f"q{n}", good: a, bad: b} for n, (a, b) in enumerate(scores)]
    source = DataSource(path=write(tmp_path / "d.jsonl", rows))
    (report,) = load_examples([source], kind="preference").reports
    assert (report.rows_kept, dict(report.noted)) == (6, {f"{good}: below {bad}": 2})
    counts = SourceCounts(source.path)
    for number, values in enumerate(rows):
        options: dict[str, Any] = {"kind": "preference", "on_bad_row": "stop", "seed": 0}
        examples_of(Row(values, f"d:{number}"), source, counts, **options)
    again = Counts.of(Counts([counts]).report()).sources[0]
    assert again.noted == counts.noted
    assert dict(again.noted.reasons) == {f"{good}: below {bad}": 2}
    assert main(["data", "check", source.path]) == 0
    page = capsys.readouterr().out
    assert f"rows at odds with themselves: {good}: below {bad}" in page
    assert f"{source.path}:1: {good}: below {bad}; 1 against 9: " in page
    assert f"{source.path}:2" not in page
