"""Rows of real text with the lengths of helpful-harmless dialogues, cut from the shipped Bible.

Prompts have 120 tokens on average, replies 64 with a long tail up to 500 (both lognormal), by the
tokenizer of the model that is measured. What a reply says does not matter for speed.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

SOURCE = Path(__file__).parents[1] / "data" / "kjv_web" / "base.jsonl.gz"
SHORTEST, LONGEST = 8, 500


class Text:
    """Running text whose pieces can be cut to a number of tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        with gzip.open(SOURCE, "rt", encoding="utf-8") as file:
            self.words = " ".join(json.loads(line)["text"] for line in file).split()
        distinct = sorted(set(self.words))
        ids = tokenizer([f" {word}" for word in distinct], add_special_tokens=False)["input_ids"]
        cost = {word: len(i) for word, i in zip(distinct, ids, strict=True)}
        self.ends = np.cumsum([cost[word] for word in self.words])

    def piece(self, start: int, tokens: int) -> str:
        """About ``tokens`` tokens from word ``start`` on, at least one word."""
        before = self.ends[start - 1] if start else 0
        stop = int(np.searchsorted(self.ends, before + tokens, side="right"))
        return " ".join(self.words[start : max(stop, start + 1)])


def lengths(rng: np.random.Generator, count: int, mean: float, sigma: float) -> np.ndarray:
    """Tokens, lognormal with this mean before they are clipped to 8 to 500."""
    drawn = rng.lognormal(math.log(mean) - sigma**2 / 2, sigma, size=count)
    return drawn.round().astype(int).clip(SHORTEST, LONGEST)


def preference_rows(
    tokenizer: PreTrainedTokenizerBase, count: int, *, seed: int, length: int | None = None
) -> Iterator[dict[str, str]]:
    """``prompt``, ``chosen``, ``rejected``; ``length`` tokens in all if it is set."""
    text = Text(tokenizer)
    rng = np.random.default_rng(seed)
    prompts = lengths(rng, count, 120, 0.6)
    replies = lengths(rng, 2 * count, 64, 0.8).reshape(count, 2)
    if length is not None:
        prompts[:], replies[:] = length // 2, length - length // 2
    starts = rng.integers(0, len(text.words) - 2 * LONGEST, size=(count, 3))
    for at, prompt, (chosen, rejected) in zip(starts, prompts, replies, strict=True):
        yield {
            "prompt": text.piece(at[0], prompt) + "\n",
            "chosen": text.piece(at[1], chosen),
            "rejected": text.piece(at[2], rejected),
        }


def write_jsonl(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
