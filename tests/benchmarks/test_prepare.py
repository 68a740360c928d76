from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from align.data.order import epoch_order, minibatches
from align.models import load_tokenizer
from benchmarks.data import Text, preference_rows
from benchmarks.prepare import SEED, write_rows

TINY = Path(__file__).parents[2] / "models" / "tiny"


def test_rows_have_the_lengths_of_dialogues() -> None:
    tokenizer = load_tokenizer(str(TINY))
    rows = list(preference_rows(tokenizer, 1000, seed=0))
    count = {
        key: np.array([len(tokenizer(row[key])["input_ids"]) for row in rows]) for key in rows[0]
    }
    replies = np.concatenate([count["chosen"], count["rejected"]])
    assert count["prompt"].mean() == pytest.approx(120, rel=0.06)
    assert replies.mean() == pytest.approx(64, rel=0.06)
    assert 300 < replies.max() <= 510
    again, same, other = (list(preference_rows(tokenizer, 50, seed=seed)) for seed in (0, 0, 1))
    assert again == same != other


def test_a_piece_costs_what_was_asked_for() -> None:
    tokenizer = load_tokenizer(str(TINY))
    text = Text(tokenizer)
    for tokens in (8, 100, 500):
        got = len(tokenizer(" " + text.piece(5000, tokens))["input_ids"])
        assert tokens - 8 < got <= tokens, "a word more would be too long"


def test_a_peer_reads_the_rows_of_each_step_in_order(tmp_path: Path) -> None:
    (tmp_path / "policy").symlink_to(TINY)
    facts = write_rows(tmp_path, "pairs-dpo", batch=3, steps=2)
    ours, theirs = (
        [json.loads(line) for line in (tmp_path / f"pairs-dpo{kind}.jsonl").open()]
        for kind in ("", ".peer")
    )
    shuffled = epoch_order("shuffled", [0] * 6, SEED)
    steps = list(minibatches(6, 3, shuffled, start=0, stop=2))
    assert theirs == [ours[i] for step in steps for i in step]
    assert theirs != ours
    tokenizer = load_tokenizer(str(TINY))

    def count(row: dict[str, str], *keys: str) -> int:
        return sum(len(tokenizer(row[key])["input_ids"]) for key in keys)

    # the prompt once; an end token after each of the two replies
    assert facts == [
        (
            sum(count(r, "prompt", "chosen", "rejected") + 2 for r in rows),
            sum(count(r, "chosen", "rejected") + 2 for r in rows),
        )
        for rows in (theirs[:3], theirs[3:])
    ]
