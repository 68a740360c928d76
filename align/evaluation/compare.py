"""Is A better than B? Paired tests over the same prompts, and intervals; all fixed by a seed.

Pairing matters: two systems stumble over the same hard prompts, so that their difference is known
far better than either score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, TypeAlias

import numpy as np

from align.evaluation.bleu import CORPUS_METRICS, reference_streams

PairedTest: TypeAlias = Literal["bootstrap", "randomization"]

# sacreBLEU's own default, so that our p is what its command line prints
DEFAULT_SEED = 12345
# differences of means that are equal but for rounding are equal
RELATIVE_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a paired test found.

    Attributes:
        a: Name of one system.
        b: Name of the other.
        metric: What was compared.
        difference: a minus b, in the metric's unit; positive = a scores higher.
        p: Probability of a difference this large if there were none.
        ci95: Percentile interval of the difference over bootstrap resamples of the prompts.
    """

    a: str
    b: str
    metric: str
    difference: float
    p: float
    ci95: tuple[float, float]


def compare_corpus(
    a: tuple[str, Sequence[str]],
    b: tuple[str, Sequence[str]],
    references: Sequence[Sequence[str]],
    *,
    metric: str = "bleu",
    test: PairedTest = "bootstrap",
    num_resamples: int = 1000,
    seed: int = DEFAULT_SEED,
) -> Comparison:
    """Compare two systems by a corpus metric (BLEU, chrF), with sacreBLEU's p.

    Args:
        a: Name and outputs of one system.
        b: The same for the other, for the same prompts.
        references: One or more for each prompt.
        metric: A key of ``CORPUS_METRICS``.
        test: ``bootstrap`` or ``randomization``, each as sacreBLEU does it. Its bootstrap p comes
            out near half of a two-sided one; randomization is two-sided.
        num_resamples: Resamplings of the test and of the interval.
        seed: Same seed, same result.

    Source: Koehn 2004; Riezler and Maxwell 2005; sacreBLEU 2 ``significance.py``, whose p this is
        for equal seeds. Differs: equal scores have p = 1 (sacreBLEU gives 1 / (num_resamples + 1)).
    """
    scorer = CORPUS_METRICS[metric]()
    # sums of n-gram counts determine a corpus score, so a resample need not be tokenised again
    stats_a, stats_b = (
        np.array(scorer._extract_corpus_statistics(outputs, reference_streams(outputs, references)))
        for _, outputs in (a, b)
    )

    def score(stats: np.ndarray) -> float:
        return scorer._compute_score_from_stats(stats).score

    difference = score(stats_a.sum(0)) - score(stats_b.sum(0))
    # float32 because sacreBLEU resamples in it: rounding could tip a p otherwise
    floats_a, floats_b = stats_a.astype(np.float32), stats_b.astype(np.float32)
    resampled = np.array(
        [
            score(floats_a[rows].sum(0)) - score(floats_b[rows].sum(0))
            for rows in _bootstrap_rows(len(stats_a), num_resamples, seed)
        ]
    )
    if difference == 0:
        p = 1.0
    elif test == "bootstrap":
        spread = np.abs(resampled) - np.abs(resampled).mean()
        p = _p_value(int((spread > abs(difference)).sum()), num_resamples)
    else:
        swapped = _swapped_differences(stats_a, stats_b, score, num_resamples, seed)
        p = _p_value(int((swapped > abs(difference)).sum()), num_resamples)
    return Comparison(
        a=a[0], b=b[0], metric=metric, difference=difference, p=p, ci95=_percentiles(resampled)
    )


def compare_values(
    a: tuple[str, Sequence[float]],
    b: tuple[str, Sequence[float]],
    *,
    metric: str,
    test: PairedTest = "randomization",
    num_resamples: int = 1000,
    seed: int = DEFAULT_SEED,
) -> Comparison:
    """Compare the means of per-prompt numbers: rewards, sentence scores, lengths, wins.

    Args:
        a: Name and numbers of one system.
        b: The same for the other, for the same prompts in the same order.
        metric: What the numbers are.
        test: ``randomization`` swaps the two systems' numbers prompt by prompt at random;
            ``bootstrap`` resamples prompts and centres the resampled differences on 0. Both are
            two-sided.
        num_resamples: Resamplings of the test and of the interval.
        seed: Same seed, same result.
    """
    differences = _checked(a[1], a[0]) - _checked(b[1], b[0])
    difference = float(differences.mean())
    rows = _bootstrap_rows(len(differences), num_resamples, seed)
    resampled = differences[rows].mean(axis=1)
    if test == "bootstrap":
        under_null = resampled - difference
    else:
        swap = np.random.default_rng(seed).integers(2, size=rows.shape, dtype=bool)
        under_null = np.where(swap, -differences, differences).mean(axis=1)
    as_large = np.abs(under_null) >= abs(difference) * (1 - RELATIVE_ROUNDING)
    return Comparison(
        a=a[0],
        b=b[0],
        metric=metric,
        difference=difference,
        p=_p_value(int(as_large.sum()), num_resamples),
        ci95=_percentiles(resampled),
    )


def mean_ci95(values: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """Mean and its 95% interval by Student's t; no interval for a single value."""
    numbers = _checked(values, "values")
    mean = float(numbers.mean())
    if len(numbers) == 1:
        return mean, None
    standard_error = float(numbers.std(ddof=1)) / math.sqrt(len(numbers))
    half_width = _student_t_975(len(numbers) - 1) * standard_error
    return mean, (mean - half_width, mean + half_width)


def _bootstrap_rows(num_rows: int, num_resamples: int, seed: int) -> np.ndarray:
    """The rows of every resample; drawn exactly as sacreBLEU draws them."""
    rng = np.random.default_rng(seed)
    return rng.choice(num_rows, size=(num_resamples, num_rows), replace=True)


def _swapped_differences(
    stats_a: np.ndarray,
    stats_b: np.ndarray,
    score: Callable[[np.ndarray], float],
    num_resamples: int,
    seed: int,
) -> np.ndarray:
    """|a - b| after each prompt's outputs changed sides at random."""
    shape = (num_resamples, len(stats_a))
    swap = np.random.default_rng(seed).integers(2, size=shape, dtype=bool)
    mixed_a, mixed_b = ~swap @ stats_a + swap @ stats_b, swap @ stats_a + ~swap @ stats_b
    return np.array([abs(score(x) - score(y)) for x, y in zip(mixed_a, mixed_b, strict=True)])


def _p_value(num_as_large: int, num_resamples: int) -> float:
    # + 1: the sample itself is one of the outcomes, so p is never 0
    return (num_as_large + 1) / (num_resamples + 1)


def _percentiles(resampled: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(low), float(high)


def _checked(values: Sequence[float], name: str) -> np.ndarray:
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or not len(numbers) or not np.isfinite(numbers).all():
        raise ValueError(f"{name}: must be one or more finite numbers, got shape {numbers.shape}")
    return numbers


def _student_t_975(df: int) -> float:
    """97.5th percentile of Student's t: exact for 1 and 2, else Fisher's expansion (< 1% off)."""
    if df == 1:
        return math.tan(0.475 * math.pi)
    if df == 2:
        return 0.95 * math.sqrt(2 / (1 - 0.95**2))
    z = NormalDist().inv_cdf(0.975)
    terms = [
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    ]
    return sum(term / df**power for power, term in enumerate(terms))
