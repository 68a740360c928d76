"""Intervals of one system's numbers, and the resampling that the paired tests share.

All of it is fixed by a seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from align.evaluation.bleu import CORPUS_METRICS

# sacreBLEU's own default, so that our p is what its command line prints
DEFAULT_SEED = 12345


def mean_ci95(values: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """Mean and its 95% interval by Student's t; no interval for a single value."""
    numbers = finite_values(values, "values")
    mean = float(numbers.mean())
    if len(numbers) == 1:
        return mean, None
    standard_error = float(numbers.std(ddof=1)) / math.sqrt(len(numbers))
    half_width = student_t_975(len(numbers) - 1) * standard_error
    return mean, (mean - half_width, mean + half_width)


def corpus_ci95(
    statistics: np.ndarray, metric: str, *, num_resamples: int = 1000, seed: int = DEFAULT_SEED
) -> tuple[float, float]:
    """Percentile interval of a corpus score over bootstrap resamples of its ``[rows, n]``."""
    score = corpus_scorer(metric)
    rows = bootstrap_rows(len(statistics), num_resamples, seed)
    return percentiles(np.array([score(statistics[r].sum(0)) for r in rows]))


def proportion_ci95(share: float, count: int) -> tuple[float, float]:
    """Wilson's interval of a share of ``count`` cases; stays inside [0, 1]."""
    z2 = NormalDist().inv_cdf(0.975) ** 2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = math.sqrt(z2 * (share * (1 - share) / count + z2 / (4 * count**2))) / (1 + z2 / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def student_t_975(df: int) -> float:
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


def corpus_scorer(metric: str) -> Callable[[np.ndarray], float]:
    """Summed statistics ``[n]`` -> the score."""
    scorer: Any = CORPUS_METRICS[metric]()
    return lambda sums: float(scorer._compute_score_from_stats(sums).score)


def bootstrap_rows(num_rows: int, num_resamples: int, seed: int) -> np.ndarray:
    """The rows of every resample; drawn exactly as sacreBLEU draws them."""
    rng = np.random.default_rng(seed)
    return rng.choice(num_rows, size=(num_resamples, num_rows), replace=True)


def percentiles(resampled: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(low), float(high)


def finite_values(values: Sequence[float] | np.ndarray, name: str) -> np.ndarray:
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or not len(numbers) or not np.isfinite(numbers).all():
        raise ValueError(f"{name}: must be one or more finite numbers, got shape {numbers.shape}")
    return numbers
