"""``align data rank``: from files of judgements to leaderboard, agreement and pairs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from align.cli import main
from align.config.sections import DataSource
from align.data.examples import load_examples
from align.feedback.outcomes import read_judgements
from align.feedback.pairs import choose_pairs
from align.feedback.report import agreement, leaderboard, preference_pairs
from align.types import AlignError


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def said(prompt: str, a: str, b: str, winner: str, annotator: str = "ann", **more) -> dict:
    return {"prompt": prompt, "a": a, "b": b, "winner": winner, "annotator": annotator, **more}


TRUTH = {"large": 1.0, "medium": 0.0, "small": -1.0}


def simulated(num: int = 400, seed: int = 0) -> list[dict]:
    """Three models; two annotators who judge by a logistic law, and one who throws a coin."""
    rng = np.random.default_rng(seed)
    rows = []
    for n in range(num):
        a, b = rng.permutation(list(TRUTH))[:2]
        for annotator in ("ann", "bob", "coin"):
            slope = 0.0 if annotator == "coin" else 1.5
            wins = rng.random() < 1 / (1 + np.exp(-slope * (TRUTH[a] - TRUTH[b])))
            winner = "tie" if rng.random() < 0.1 else "a" if wins else "b"
            texts = (f"{a} answer {n}", f"{b} answer {n}")
            names = {"model_a": str(a), "model_b": str(b)}
            rows.append(said(f"q{n}", *texts, winner, annotator, **names))
    return rows


def test_a_leaderboard_recovers_the_known_order(tmp_path) -> None:
    judgements = read_judgements([write(tmp_path / "j.jsonl", simulated())])
    rows = leaderboard(judgements)
    assert [row["name"] for row in rows] == ["large", "medium", "small"]
    assert sorted(rows, key=lambda r: -r["elo"]) == rows
    for row in rows:
        assert row["strength_low"] < row["strength"] < row["strength_high"]
        assert row["elo_low"] < row["elo"] < row["elo_high"]
    assert sum(r["wins"] + r["losses"] + r["ties"] for r in rows) == 2 * 1200
    # 1000 + 400 / ln 10 * strength
    assert rows[0]["scaled"] == pytest.approx(1000 + 173.7178 * rows[0]["strength"], abs=1e-3)


def test_the_coin_is_told_from_the_annotators(tmp_path) -> None:
    judgements = read_judgements([write(tmp_path / "j.jsonl", simulated(150))])
    # what is judged here are the models, so the same two are compared again and again
    by_model = [j.__class__(j.where, "q", j.models, j.is_tie, j.annotator) for j in judgements]
    found = agreement(by_model)
    slopes = {name: r["slope"] for name, r in found["reliability"].items()}
    assert slopes["coin"] < 0.35 < min(slopes["ann"], slopes["bob"])
    assert found["annotators"] == 3


def test_agreement_counts_the_same_question_whichever_side_it_was_shown_on(tmp_path) -> None:
    rows = [said("q", "x", "y", "a", "ann"), said("q", "y", "x", "b", "bob")]
    rows += [said("r", "x", "y", "a", "ann"), said("r", "x", "y", "b", "bob")]
    rows += [said("s", "x", "y", "tie", "ann"), said("s", "y", "x", "tie", "bob")]
    found = agreement(read_judgements([write(tmp_path / "j.jsonl", rows)]))
    (kappa,) = found["cohen_kappa"]
    # sorted, x is "low": ann low, low, tie; bob low, high, tie: p_o 2/3, p_e (2*1 + 1*1) / 9 = 1/3
    # Wilson's .2077 .. .9385 of two agreed in three, from p_e = 1/3 on
    ends = pytest.approx([-0.1885, 0.9078], abs=1e-4)
    half = pytest.approx(0.5)
    assert kappa == {"a": "ann", "b": "bob", "common": 3, "kappa": half, "ci95": ends}


def test_pairs_have_margins_that_grow_with_agreement(tmp_path) -> None:
    rows = [said("q", "good", "bad", "a")] * 3 + [said("r", "good", "bad", "a")]
    rows += [said("t", "this", "that", "tie")]
    judgements = read_judgements([write(tmp_path / "j.jsonl", rows)])
    pairs, left_out = preference_pairs(judgements)
    assert [(p["prompt"], p["chosen"], p["judgements"]) for p in pairs] == [
        ("q", "good", 3),
        ("r", "good", 1),
    ]
    assert pairs[0]["margin"] > pairs[1]["margin"] > 0
    assert left_out == {"scores too close": 1}


def test_contradictory_answers_are_settled_by_the_majority(tmp_path) -> None:
    rows = [said("q", "x", "y", w, f"ann{n}") for n, w in enumerate(["a", "b", "b"])]
    (pair,) = preference_pairs(read_judgements([write(tmp_path / "j.jsonl", rows)]))[0]
    assert (pair["chosen"], pair["rejected"]) == ("y", "x")


def test_whole_rankings_make_a_leaderboard_by_plackett_luce(tmp_path) -> None:
    orders = [["m", "n", "o"], ["m", "o", "n"], ["n", "m", "o"], ["o", "m", "n"]]
    rows = [{"ranking": order, "annotator": "ann"} for order in orders]
    found = leaderboard(read_judgements([write(tmp_path / "r.jsonl", rows)]))
    assert found[0]["name"] == "m"
    assert found[1]["strength"] == pytest.approx(found[2]["strength"])


def test_the_command_writes_pairs_that_the_loader_reads(tmp_path, capsys) -> None:
    file, out = write(tmp_path / "j.jsonl", simulated(30)), tmp_path / "pairs.jsonl"
    assert main(["data", "rank", file, "--pairs", str(out)]) == 0
    page = capsys.readouterr().out
    assert "leaderboard" in page
    assert "Krippendorff's alpha" in page
    loaded = load_examples([DataSource(path=str(out))], kind="preference")
    assert 20 <= len(loaded.examples) <= 30
    assert all(e.margin > 0 for e in loaded.examples)
    assert main(["data", "rank", file, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["leaderboard"]) == 3


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (said("q", "x", "y", "x"), "j.jsonl:1: winner: not one of a, b, tie"),
        ({"prompt": "q", "winner": "a"}, "j.jsonl:1: a: missing"),
        ({"prompt": "q", "a": "x", "b": "x", "winner": "a"}, "j.jsonl:1: b: the same as a"),
        ({"ranking": ["only"]}, "j.jsonl:1: ranking: not a list of at least two"),
        ({"ranking": ["x", "y"], "models": ["m"]}, "j.jsonl:1: models: 1 names for 2 items"),
    ],
)
def test_bad_judgements_name_their_field(tmp_path, row: dict, words: str) -> None:
    with pytest.raises(AlignError) as caught:
        read_judgements([write(tmp_path / "j.jsonl", [row])])
    assert words in str(caught.value)


def test_pairs_of_the_same_answer_by_two_models_end_in_one_line(tmp_path, capsys) -> None:
    row = {"prompt": "q", "a": "x", "b": "x", "model_a": "m", "model_b": "n", "winner": "a"}
    file = write(tmp_path / "j.jsonl", [row, row | {"winner": "b"}])
    assert main(["data", "rank", file, "--pairs", str(tmp_path / "p.jsonl")]) == 2
    assert "--pairs: no comparison: no two different answers" in capsys.readouterr().err


def test_a_ranking_that_has_no_maximum_says_what_to_do(tmp_path, capsys) -> None:
    rows = [{"a": "m", "b": "n", "winner": "a"}] * 3
    file = write(tmp_path / "j.jsonl", rows)
    assert main(["data", "rank", file]) == 2
    error = capsys.readouterr().err
    assert "no ranking by maximum likelihood: n and the others" in error
    assert "--prior 0.1" in error
    assert main(["data", "rank", file, "--prior", "0.1"]) == 0


# ---------------------------------------------------------------- pairs of given scores


@pytest.mark.parametrize(
    ("options", "pairs"),
    [
        ({"choose": "best_worst"}, [(1, 2)]),
        ({"choose": "all"}, [(1, 3), (1, 0), (1, 2), (3, 0), (3, 2), (0, 2)]),
        ({"choose": "all", "min_margin": 2.0}, [(1, 0), (1, 2), (3, 2)]),
        ({"choose": "threshold", "threshold": 2.0}, [(1, 0), (1, 2), (3, 0), (3, 2)]),
        ({"choose": "threshold", "threshold": 9.0}, []),
    ],
)
def test_pairs_by_score(options: dict, pairs: list) -> None:
    assert choose_pairs(list("abcd"), [1.0, 3.0, 0.0, 2.0], **options)[0] == pairs


def test_equal_scores_and_texts_are_left_out_and_counted() -> None:
    pairs, left_out = choose_pairs(["x", "x", "y"], [2.0, 1.0, 1.0], choose="all")
    assert pairs == [(0, 2)]
    assert left_out == {"the same text twice": 1, "scores too close": 1}


def test_a_winner_in_capitals_is_the_same_winner(tmp_path) -> None:
    for name, winner in (("A", "a"), ("B", "b"), ("Tie", "tie"), ("TIE", "tie")):
        files = [write(tmp_path / f"{w}.jsonl", [said("q", "x", "y", w)]) for w in (name, winner)]
        (capital,), (small,) = (read_judgements([file]) for file in files)
        assert (capital.items, capital.is_tie) == (small.items, small.is_tie)
    (b,) = read_judgements([write(tmp_path / "j.jsonl", [said("q", "x", "y", "B")])])
    assert b.items == ("y", "x")
