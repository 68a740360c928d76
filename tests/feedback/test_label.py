"""The labelling page without a browser: the store, the choice of pairs, the server's answers."""

from __future__ import annotations

import json
import sqlite3
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from align.cli import main
from align.feedback.choosing import Chooser
from align.feedback.ranking import bradley_terry
from align.feedback.server import make_app
from align.feedback.store import Answer, Response, Store
from align.types import AlignError

ROWS = [("q", text, model) for text, model in (("x", "m"), ("y", "n"), ("z", None))]
ROWS += [("r", "lone", None)]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "answers.sqlite")
    assert store.add_responses(ROWS) == 4
    return store


# ---------------------------------------------------------------- the store


def test_answers_are_on_disk_at_once_and_only_once(store: Store) -> None:
    assert store.add_answer(Answer("ann", 1, 2, "left"), seconds=1.0)
    other = sqlite3.connect(store.path)  # another process sees what is on disk
    assert other.execute("SELECT annotator, said FROM answers").fetchall() == [("ann", "left")]
    assert not store.add_answer(Answer("ann", 2, 1, "left"), seconds=1.0)
    assert store.add_answer(Answer("bob", 2, 1, "tie"), seconds=1.0)
    assert len(store.answers()) == 2


def test_undo_takes_back_the_annotators_own_last_answer(store: Store) -> None:
    store.add_answer(Answer("ann", 1, 2, "left"), seconds=1.0)
    store.add_answer(Answer("bob", 1, 2, "right"), seconds=1.0)
    assert store.undo("ann") == Answer("ann", 1, 2, "left")
    assert store.undo("ann") is None
    assert store.answers() == [Answer("bob", 1, 2, "right")]
    assert store.add_answer(Answer("ann", 1, 2, "tie"), seconds=1.0)


def test_responses_are_added_once_and_the_token_stays(store: Store) -> None:
    again = Store(store.path)
    assert again.add_responses(ROWS) == 0
    assert again.token == store.token
    assert len(store.token) >= 32
    assert store.path.stat().st_mode & 0o077 == 0


def test_judgements_are_rows_of_the_rank_command(store: Store) -> None:
    store.add_answer(Answer("ann", 2, 1, "left"), seconds=1.0)
    store.add_answer(Answer("ann", 1, 3, "tie"), seconds=1.0)
    store.add_answer(Answer("ann", 2, 3, "skip"), seconds=1.0)
    first, second = store.judgements()
    assert first == {
        "prompt": "q",
        "a": "y",
        "b": "x",
        "winner": "a",
        "annotator": "ann",
        "model_a": "n",
        "model_b": "m",
    }
    assert (second["winner"], "model_a" in second) == ("tie", False)


def test_a_file_that_is_no_store_is_one_line(tmp_path) -> None:
    path = tmp_path / "text.sqlite"
    path.write_text("this is no database, whatever its name may say " * 100, encoding="utf-8")
    with pytest.raises(AlignError, match="cannot be opened as a store of answers"):
        Store(path)


# ---------------------------------------------------------------- which pair comes next


def responses(num_prompts: int, each: int) -> list[Response]:
    ids = iter(range(1, num_prompts * each + 1))
    return [
        Response(next(ids), json.dumps(f"q{n}"), f"r{k}", None)
        for n in range(num_prompts)
        for k in range(each)
    ]


def test_everybody_sees_every_pair_once() -> None:
    chooser = Chooser(responses(3, 3), [])
    for annotator in ("ann", "bob"):
        seen = []
        while (pair := chooser.next(annotator)) is not None:
            seen.append(tuple(sorted(pair)))
            chooser.add(Answer(annotator, *pair, "left"))
        assert sorted(seen) == sorted(chooser.pairs)
        assert chooser.done(annotator) == 9


def test_sides_are_shuffled() -> None:
    chooser = Chooser(responses(100, 2), [])
    swapped = []
    while (pair := chooser.next("ann")) is not None:
        swapped.append(pair[0] > pair[1])
        chooser.add(Answer("ann", *pair, "left"))
    assert 35 <= sum(swapped) <= 65


def test_the_least_certain_pair_comes_first() -> None:
    """1 beat 2 and 3 three times over; what is open is 2 against 3."""
    answers = [Answer(f"old{n}", 1, k, "left") for n in range(3) for k in (2, 3)]
    assert sorted(Chooser(responses(1, 3), answers, overlap=0.0).next("new") or ()) == [2, 3]


def test_chosen_pairs_rank_better_than_random_ones() -> None:
    """8 responses, 20 noisy answers: the error of the strengths, mean of 40 runs."""
    truth = np.linspace(2, -2, 8)

    def error(choose: str, seed: int) -> float:
        rng = np.random.default_rng(seed)
        chooser = Chooser(responses(1, 8), [], overlap=0.0)
        order = rng.permutation(len(chooser.pairs))
        asked = []
        for n in range(20):
            pair = chooser.next("a") if choose == "chosen" else chooser.pairs[order[n]]
            assert pair is not None
            i, j = pair[0] - 1, pair[1] - 1
            won = bool(rng.random() < 1 / (1 + np.exp(truth[j] - truth[i])))
            chooser.add(Answer("a", *pair, "left" if won else "right"))
            asked.append((i, j, float(won)))
        found = bradley_terry(asked, 8, prior=1.0).values
        return float(np.mean([found[i] <= found[j] for i, j in combinations(range(8), 2)]))

    chosen, at_random = (
        np.mean([error(choose, seed) for seed in range(40)]) for choose in ("chosen", "random")
    )
    assert chosen < at_random


def test_a_share_of_pairs_is_one_that_others_have_answered() -> None:
    first = Chooser(responses(30, 2), [])
    answers = []
    for _ in range(10):
        pair = first.next("ann")
        assert pair is not None
        answers.append(Answer("ann", *pair, "left"))
        first.add(answers[-1])
    second = Chooser(responses(30, 2), answers, overlap=0.5)
    shared = 0
    for _ in range(10):
        pair = second.next("bob")
        assert pair is not None
        shared += tuple(sorted(pair)) in {a.pair for a in answers}
        second.add(Answer("bob", *pair, "right"))
    assert shared == 5


# ---------------------------------------------------------------- the server


def test_a_round_of_answers(store: Store) -> None:
    client, at = make_app(store).test_client(), f"/{store.token}"
    state = client.get(f"{at}/state?annotator=ann", headers={"Host": "127.0.0.1:80"}).get_json()
    assert (state["done"], state["total"]) == (0, 3)
    assert state["prompt"] == [{"role": "", "content": "q"}]
    assert "m" not in json.dumps({k: state[k] for k in ("left", "right")})  # blind: no names
    assert set(state) == {
        *("done", "total", "annotators", "shared", "same", "alpha", "prompt"),
        *("left", "right", "pair"),
    }
    for said in ("left", "tie", "skip"):
        body = {"annotator": "ann", "pair": state["pair"], "said": said}
        state = client.post(f"{at}/answer", json=body, headers={"Host": "localhost:1"}).get_json()
    assert (state["done"], "pair" in state) == (3, False)
    assert [a.said for a in store.answers()] == ["left", "tie", "skip"]
    local = {"Host": "127.0.0.1"}
    undone = client.post(f"{at}/undo", json={"annotator": "ann"}, headers=local).get_json()
    assert undone["done"] == 2
    assert sorted(undone["pair"]) == sorted(body["pair"])


def test_a_repeated_answer_changes_nothing(store: Store) -> None:
    client, at = make_app(store).test_client(), f"/{store.token}"
    pair = client.get(f"{at}/state?annotator=ann").get_json()["pair"]
    for said in ("left", "right"):
        reply = client.post(f"{at}/answer", json={"annotator": "ann", "pair": pair, "said": said})
        assert reply.get_json()["done"] == 1
    assert [a.said for a in store.answers()] == ["left"]


def test_agreement_is_shown_over_shared_pairs(store: Store) -> None:
    for name, said in (("ann", "left"), ("bob", "left"), ("eve", "right")):
        store.add_answer(Answer(name, 1, 2, said), seconds=0.0)
    client = make_app(store).test_client()
    state = client.get(f"/{store.token}/state?annotator=ann").get_json()
    assert (state["annotators"], state["shared"], state["same"]) == (3, 1, 0)


def test_a_goal_ends_the_work(store: Store) -> None:
    client = make_app(store, goal=1).test_client()
    pair = client.get(f"/{store.token}/state?annotator=ann").get_json()["pair"]
    body = {"annotator": "ann", "pair": pair, "said": "left"}
    state = client.post(f"/{store.token}/answer", json=body).get_json()
    assert (state["total"], "pair" in state) == (1, False)


def test_strangers_are_turned_away(store: Store) -> None:
    client, at = make_app(store).test_client(), f"/{store.token}"
    assert client.get("/wrong/").status_code == 404
    assert client.get("/").status_code == 404
    assert client.get(f"{at}/", headers={"Host": "evil.example"}).status_code == 403
    assert client.get(f"{at}/", headers={"Host": "127.0.0.1.evil.example:80"}).status_code == 403
    page = client.get(f"{at}/")
    assert page.status_code == 200
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert "http" not in page.get_data(as_text=True).replace("http://www.w3.org", "")


@pytest.mark.parametrize(
    "body",
    [
        {"annotator": "", "pair": [1, 2], "said": "left"},
        {"annotator": "a" * 41, "pair": [1, 2], "said": "left"},
        {"annotator": "ann", "pair": [1, 4], "said": "left"},
        {"annotator": "ann", "pair": [1, 1], "said": "left"},
        {"annotator": "ann", "pair": [1, "2"], "said": "left"},
        {"annotator": "ann", "pair": [1, 2], "said": "both"},
    ],
)
def test_answers_that_make_no_sense_are_refused(store: Store, body: dict) -> None:
    client = make_app(store).test_client()
    assert client.post(f"/{store.token}/answer", json=body).status_code == 400
    assert store.answers() == []


# ---------------------------------------------------------------- the command


def test_export_is_what_the_rank_command_reads(store: Store, tmp_path, capsys) -> None:
    for n, pair in enumerate([(1, 2), (2, 3), (1, 3)]):
        store.add_answer(Answer("ann", *pair, ("left", "right", "tie")[n]), seconds=0.0)
    out = str(tmp_path / "judgements.jsonl")
    assert main(["label", "--answers", str(store.path), "--export", out]) == 0
    assert main(["data", "rank", out, "--prior", "0.1"]) == 0
    assert "3 judgements of 1 annotators" in capsys.readouterr().out


def test_samples_of_generate_and_rows_of_responses_are_read(tmp_path, capsys) -> None:
    rows = [
        {"prompt": "q", "response": "x", "score": 1.0, "finished": True},
        {"prompt": "q", "response": "y", "model": "m"},
        {"prompt": [{"role": "user", "content": "r"}], "responses": ["x", "y"], "models": ["m"]},
    ]
    samples = tmp_path / "samples.jsonl"
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    answers, out = tmp_path / "answers.sqlite", tmp_path / "out.jsonl"
    command = ["label", str(samples), "--answers", str(answers), "--export", str(out)]
    assert main(command) == 0
    assert [(r.text, r.model) for r in Store(answers).responses()] == [
        *(("x", None), ("y", "m"), ("x", "m"), ("y", None)),
    ]
    samples.write_text('{"prompt": "q"}\n', encoding="utf-8")
    assert main(["label", str(samples), "--answers", str(answers)]) == 2
    assert "samples.jsonl:1: response: missing" in capsys.readouterr().err
    assert main(["label", "--answers", str(tmp_path / "none.sqlite")]) == 2
