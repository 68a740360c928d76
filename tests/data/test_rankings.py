"""Rows that pairs are made of: rankings and ratings, through the one loader."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from align.config.sections import DataSource
from align.data.examples import load_examples
from align.data.formats.columns import kind_of
from align.data.sources import Row
from align.types import AlignError


def load(path: Path, rows: list[dict], **options):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_examples([DataSource(path=str(path), **options)], kind="preference")


def pairs(loaded) -> list[tuple]:
    return [(e.prompt, e.chosen, e.rejected, e.margin) for e in loaded.examples]


def test_a_ranking_gives_all_its_pairs_and_they_trace_back(tmp_path) -> None:
    loaded = load(tmp_path / "r.jsonl", [{"prompt": "q", "responses": ["best", "mid", "worst"]}])
    assert pairs(loaded) == [
        ("q", "best", "mid", None),
        ("q", "best", "worst", None),
        ("q", "mid", "worst", None),
    ]
    assert [e.id for e in loaded.examples][1] == f"{tmp_path}/r.jsonl:1[0>2]"
    assert (loaded.reports[0].rows_read, loaded.reports[0].rows_kept) == (1, 1)


def test_rankings_of_turns(tmp_path) -> None:
    asked = [{"role": "user", "content": "q"}]
    answers = [[{"role": "assistant", "content": c}] for c in "ab"]
    loaded = load(tmp_path / "r.jsonl", [{"prompt": asked, "responses": answers}])
    assert loaded.examples[0].rejected == ({"role": "assistant", "content": "b"},)


@pytest.mark.parametrize(
    ("responses", "said"),
    [
        (["one"], "r.jsonl:1: responses: not a list of at least two"),
        ("best", "r.jsonl:1: responses: not a list of at least two"),
        (["a", "a"], "r.jsonl:1: responses: holds the same response twice"),
        (["a", " "], "r.jsonl:1: responses[1]: empty"),
    ],
)
def test_bad_rankings_name_their_field(tmp_path, responses, said: str) -> None:
    with pytest.raises(AlignError) as caught:
        load(tmp_path / "r.jsonl", [{"prompt": "q", "responses": responses}])
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["ranking", "scores"])
def test_an_order_beside_the_responses_is_not_ignored(tmp_path, name: str) -> None:
    with pytest.raises(AlignError, match=f"r.jsonl:1: {name}: would be ignored"):
        load(tmp_path / "r.jsonl", [{"prompt": "q", "responses": ["bad", "good"], name: [2, 1]}])


def test_ratings_of_a_prompt_become_pairs_with_margins(tmp_path) -> None:
    rows = [
        {"prompt": "q", "response": "fair", "score": 3},
        {"prompt": "other", "response": "alone", "score": 1},
        {"prompt": "q", "response": "good", "score": 4.5},
        {"prompt": "q", "response": "as fair", "score": 3},
    ]
    loaded = load(tmp_path / "r.jsonl", rows)
    assert pairs(loaded) == [("q", "good", "fair", 1.5), ("q", "good", "as fair", 1.5)]
    assert [e.id.rpartition("/")[2] for e in loaded.examples] == ["r.jsonl:3>1", "r.jsonl:3>4"]
    (report,) = loaded.reports
    assert report.dropped == {"score: nothing rated otherwise to compare with": 1}
    assert (report.rows_read, report.rows_kept) == (4, 3)


def test_trls_unpaired_preferences_are_ratings(tmp_path) -> None:
    rows = [
        {"prompt": "q", "completion": "no", "label": False},
        {"prompt": "q", "completion": "yes", "label": True},
    ]
    assert pairs(load(tmp_path / "r.jsonl", rows)) == [("q", "yes", "no", 1.0)]


@pytest.mark.parametrize("name", ["label", "score", "rating"])
def test_a_rating_that_is_null_is_named(tmp_path, name: str) -> None:
    rows = [{"prompt": "q", "completion": "a", name: None}]
    with pytest.raises(AlignError, match=f"r.jsonl:1: {name}: null; give it a value"):
        load(tmp_path / "r.jsonl", rows)
    # a column without values does not make ratings of demonstrations
    assert kind_of(Row(rows[0], "f:7"), columns={}) == "sft"


def test_a_score_that_is_no_number_is_bad(tmp_path) -> None:
    with pytest.raises(AlignError, match="score: not a finite number"):
        load(tmp_path / "r.jsonl", [{"prompt": "q", "response": "a", "score": "nan"}])


def test_a_weight_keeps_the_pairs_of_a_prompt_together(tmp_path) -> None:
    rows = [{"prompt": f"q{n}", "responses": ["a", "b", "c"]} for n in range(4)]
    loaded = load(tmp_path / "r.jsonl", rows, weight=0.5)
    prompts = [e.prompt for e in loaded.examples]
    assert len(set(prompts)) == 2
    assert [prompts.count(p) for p in set(prompts)] == [3, 3]
    assert loaded.reports[0].dropped == {"left out by weight 0.5": 2}


def test_webgpt_comparisons(tmp_path) -> None:
    row = {
        "question": {"full_text": "Why?", "id": "1"},
        "quotes_0": {"title": [], "extract": []},
        "answer_0": "worse",
        "score_0": -0.5,
        "answer_1": "better",
        "score_1": 0.5,
    }
    assert pairs(load(tmp_path / "w.jsonl", [row])) == [("Why?", "better", "worse", None)]
    tie = {**row, "score_0": 0.5}
    loaded = load(tmp_path / "w.jsonl", [tie, row, tie])
    assert loaded.reports[0].dropped == {"score_0: a tie, which prefers neither": 2}
    assert loaded.reports[0].first_dropped == ()
    with pytest.raises(AlignError, match="none of 2 rows is used: score_0: a tie, which prefers"):
        load(tmp_path / "w.jsonl", [tie, tie])
