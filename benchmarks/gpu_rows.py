"""Token groups to compare kernels on: one opening, prompts and answers of many lengths."""

from __future__ import annotations

import numpy as np

from align.types import TokenGroup, TokenSequence


def groups(vocabulary: int) -> list[TokenGroup]:
    """Six prompts of 30 to 230 tokens behind one opening, two answers of 5 to 165 tokens each."""
    rng = np.random.default_rng(0)

    def tokens(count: int) -> np.ndarray:
        return rng.integers(5, vocabulary, count).astype(np.int32)

    def answer(count: int) -> TokenSequence:
        return TokenSequence(tokens(count), np.ones(count, dtype=bool))

    opening = tokens(20)
    return [
        TokenGroup(
            np.concatenate([opening, tokens(10 + 40 * n)]),
            (answer(5 + 30 * n), answer(15 + 30 * n)),
        )
        for n in range(6)
    ]
