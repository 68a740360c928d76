"""Corpus BLEU, chrF, chrF++ and TER by sacreBLEU, with the signature that makes them comparable.

sacreBLEU alone tokenises, lower-cases and smooths; its signature says how.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
from sacrebleu.metrics.base import Metric

from align.base.intervals import DEFAULT_SEED, Interval, bootstrap_rows, percentiles
from align.evaluation.metrics import CORPUS_METRICS
from align.types import AlignError


@dataclass(frozen=True)
class MetricResult:
    """A corpus score, 0-100, with sacreBLEU's signature."""

    score: float
    signature: str


def corpus_bleu(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> MetricResult:
    """BLEU-4 of the whole corpus, tokenizer 13a, mixed case, exponential smoothing.

    Args:
        hypotheses: One text for each prompt.
        references: For each prompt one or more texts; their number may differ.
    """
    return corpus_score("bleu", hypotheses, references)


def corpus_chrf(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> MetricResult:
    """chrF2 of the whole corpus: F-score of character 1- to 6-grams, recall weighted double."""
    return corpus_score("chrf", hypotheses, references)


def corpus_score(
    metric: str, hypotheses: Sequence[str], references: Sequence[Sequence[str]]
) -> MetricResult:
    """Score with the metric ``CORPUS_METRICS[metric]``."""
    # a new scorer each time: its signature keeps the number of references it last saw
    scorer = CORPUS_METRICS[metric]()
    score = scorer.corpus_score(hypotheses, reference_streams(hypotheses, references)).score
    return MetricResult(float(score), str(scorer.get_signature()))


def corpus_statistics(
    scorer: Metric, hypotheses: Sequence[str], references: Sequence[Sequence[str]]
) -> np.ndarray:
    """Count ``[rows, n]``; the sum over any rows determines the score of these rows.

    So a resample need not be tokenised again.
    """
    streams = reference_streams(hypotheses, references)
    return np.array(scorer._extract_corpus_statistics(hypotheses, streams))


def corpus_scorer(metric: str) -> Callable[[np.ndarray], float]:
    """Return the function from summed statistics ``[n]`` to the score."""
    scorer: Any = CORPUS_METRICS[metric]()
    return lambda sums: float(scorer._compute_score_from_stats(sums).score)


def corpus_ci95(
    statistics: np.ndarray, metric: str, *, num_resamples: int = 1000, seed: int = DEFAULT_SEED
) -> Interval | None:
    """Bootstrap interval of a corpus score over resamples of its ``[rows, n]``."""
    score = corpus_scorer(metric)
    rows = bootstrap_rows(len(statistics), num_resamples, seed)
    return percentiles(np.array([score(statistics[r].sum(0)) for r in rows]), len(statistics))


def reference_streams(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]]
) -> list[list[str | None]]:
    """Transpose references as sacreBLEU takes them: the first of every row, the second, ...

    Raises:
        AlignError: There is nothing to score, or a row has no reference.
    """
    if not hypotheses:
        raise AlignError("BLEU and chrF: no outputs to score; check data.test")
    if len(hypotheses) != len(references):
        raise AlignError(f"BLEU and chrF: {len(hypotheses)} outputs, {len(references)} references")
    missing = [row for row, row_references in enumerate(references) if not row_references]
    if missing:
        raise AlignError(
            f"BLEU and chrF: row {missing[0]} has no reference ({len(missing)} such rows of "
            f"{len(references)}); add a `references` column or name it in data.columns"
        )
    # None pads rows with fewer references than another
    return [list(stream) for stream in zip_longest(*references)]
