"""Intervals of one system's numbers, and the resampling that the paired tests share.

All of it is fixed by a seed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from align.evaluation.bleu import CORPUS_METRICS

# sacreBLEU's own default, so that our p is what its command line prints
DEFAULT_SEED = 12345

# Gauss and Legendre's, for an integral over [-1, 1]
NODES, WEIGHTS = np.polynomial.legendre.leggauss(100)


def mean_ci95(values: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """Mean and its 95% interval by Student's t; no interval for a single value."""
    numbers = finite_values(values, "values")
    mean = float(numbers.mean())
    if len(numbers) == 1:
        return mean, None
    standard_error = float(numbers.std(ddof=1)) / math.sqrt(len(numbers))
    half_width = student_t_quantile(0.975, len(numbers) - 1) * standard_error
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


def student_t_p(t: float, df: float) -> float:
    """P(|T| >= |t|) for Student's t, ``df`` >= 1.

    T = sqrt(df) tan(angle), where angle has density cos(angle)^(df - 1) up to a constant
    """
    start = math.atan2(abs(t), math.sqrt(df))
    half = (math.pi / 2 - start) / 2
    tail = half * float(WEIGHTS @ np.cos(start + half * (1 + NODES)) ** (df - 1))
    whole = math.sqrt(math.pi) / 2 * math.exp(math.lgamma(df / 2) - math.lgamma((df + 1) / 2))
    return min(1.0, tail / whole)


@functools.cache
def student_t_quantile(share: float, df: float) -> float:
    """Above 0 for ``share`` above one half; halving, on the angle of ``student_t_p``."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        too_low = student_t_p(math.sqrt(df) * math.tan(angle), df) > 2 * (1 - share)
        low, high = (angle, high) if too_low else (low, angle)
    return math.sqrt(df) * math.tan((low + high) / 2)


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
