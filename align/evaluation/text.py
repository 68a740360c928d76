"""Measure texts alone: exact matches, distinct n-grams, repetition.

Words are separated by white space; in Chinese, Japanese, Thai and other scripts written without
spaces each letter is a word.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from align.base.intervals import student_t_quantile
from align.evaluation.scripts import words as script_words

Words = Callable[[str], Sequence[str]]


def exact_matches(texts: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Return 1 for a text that equals one of its references, ends stripped, else 0."""
    return [
        float(text.strip() in {reference.strip() for reference in row})
        for text, row in zip(texts, references, strict=True)
    ]


def distinct_n(texts: Sequence[str], n: int, *, words: Words = script_words) -> float:
    """Compute different n-grams / all n-grams of all texts; 0 without n-grams.

    Source: Li et al. 2016, section 5.2 (arXiv:1510.03055). It falls with the amount of text, so
    compare it over the same number of prompts only.
    """
    grams = [gram for text in texts for gram in _ngrams(text, n, words)]
    return len(set(grams)) / len(grams) if grams else 0.0


def distinct_n_ci95(
    texts: Sequence[str], n: int, *, words: Words = script_words
) -> tuple[float, float] | None:
    """95% interval of ``distinct_n`` by the jackknife over texts, with Student's t.

    A bootstrap fails, since it repeats texts, and a repeated text has no new n-gram. None below two
    texts, and if removing any text changes nothing, since the spread is then unknown.
    """
    rows = [_ngrams(text, n, words) for text in texts]
    owners = Counter(gram for row in rows for gram in set(row))
    num_different, num_all = len(owners), sum(map(len, rows))
    num_texts = len(rows)
    if num_texts < 2 or not num_all:
        return None
    without = np.zeros(num_texts)
    for i, row in enumerate(rows):
        only_here = sum(owners[gram] == 1 for gram in set(row))
        without[i] = (num_different - only_here) / max(num_all - len(row), 1)
    variance = (num_texts - 1) / num_texts * float(np.square(without - without.mean()).sum())
    if variance < 1e-18:
        return None
    score = num_different / num_all
    half_width = student_t_quantile(0.975, num_texts - 1) * variance**0.5
    return max(0.0, score - half_width), min(1.0, score + half_width)


def repetition(text: str, n: int = 4, *, words: Words = script_words) -> float:
    """Share of a text's n-grams that occurred in it before; 0 = nothing is repeated.

    Source: seq-rep-n of Welleck et al. 2020, section 5 (arXiv:1908.04319).
    """
    grams = _ngrams(text, n, words)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _ngrams(text: str, n: int, words: Words) -> list[tuple[str, ...]]:
    parts = words(text)
    return [tuple(parts[i : i + n]) for i in range(len(parts) - n + 1)]
