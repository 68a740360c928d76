from __future__ import annotations

import random

import pytest

from align.evaluation.text import distinct_n, distinct_n_ci95, exact_matches, repetition


def test_distinct() -> None:
    # unigrams a b a b a: 2 of 5; bigrams ab ba ab | ba... of two texts "a b a", "b a": ab ba ba
    assert distinct_n(["a b a", "b a"], 1) == pytest.approx(2 / 5)
    assert distinct_n(["a b a", "b a"], 2) == pytest.approx(2 / 3)
    assert distinct_n(["a"], 2) == 0
    assert distinct_n(["aab"], 1, words=list) == pytest.approx(2 / 3)


def test_distinct_interval_is_the_jackknife() -> None:
    texts = ["a b a c", "b a", "c c d", "a"]
    score = distinct_n(texts, 1)
    without = [distinct_n(texts[:i] + texts[i + 1 :], 1) for i in range(4)]
    mean = sum(without) / 4
    error = (3 / 4 * sum((w - mean) ** 2 for w in without)) ** 0.5
    t = 3.18245  # of three degrees of freedom
    expected = (max(0, score - t * error), min(1, score + t * error))
    assert distinct_n_ci95(texts, 1) == pytest.approx(expected)
    assert distinct_n_ci95(["a b"], 1) is None
    assert distinct_n_ci95(["", ""], 1) is None
    # all different: that the next text repeats a word is not ruled out
    assert distinct_n_ci95(["a", "b", "c"], 1) is None


def test_distinct_interval_covers() -> None:
    """Texts of 8 words out of 40: the spread over fresh samples is what the interval says."""

    def texts(seed: int) -> list[str]:
        rng = random.Random(seed)
        return [" ".join(str(rng.randrange(40)) for _ in range(8)) for _ in range(60)]

    scores = [distinct_n(texts(seed), 2) for seed in range(200)]
    truth = sum(scores) / len(scores)
    hits = 0
    for seed in range(100):
        low, high = distinct_n_ci95(texts(1000 + seed), 2) or (0, 0)
        hits += low <= truth <= high
    assert hits >= 90


def test_repetition() -> None:
    assert repetition("a b c d e f") == 0
    # 4-grams abcd bcda cdab dabc abcd: 4 different of 5
    assert repetition("a b c d a b c d") == pytest.approx(1 / 5)
    assert repetition("a b") == 0


def test_exact_matches() -> None:
    assert exact_matches(["a", " b ", "D"], [["x", "a"], ["b"], ["d"]]) == [1, 1, 0]
