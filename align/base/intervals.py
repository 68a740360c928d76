"""95% intervals of one number, and resampling shared by the paired tests.

`python -m benchmarks.statistics` simulates how often each interval covers the truth, from 3 prompts
to 400; docs/evaluation.md has its table. An interval is None if the data do not show how much the
number varies: one value, equal values of unknown range, or too few rows for a bootstrap. Results
are fixed by a seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from scipy import optimize, special

Interval: TypeAlias = tuple[float, float]

# sacreBLEU's own default
DEFAULT_SEED = 12345

MIN_BOOTSTRAP_ROWS = 8
"""Fewest rows for a bootstrap; below it, resamples are too few for percentiles to cover 95%."""

Z95 = float(special.ndtri(0.975))


# tokens and nats are not shares, even if every value is 0 or 1
NO_SHARES = {"length", "kl"}


def mean_ci95(values: Sequence[float], metric: str = "") -> tuple[float, Interval | None]:
    """Mean and its 95% interval by Student's t.

    Values that are all 0 or 1 are shares, unless ``metric`` counts something, and get the interval
    of ``share_ci95``. A single value and equal values have no interval: 3 rewards of 10 do not show
    that the mean is exactly 10.
    """
    numbers = finite_values(values, "values")
    mean = float(numbers.mean())
    if len(numbers) == 1:
        return mean, None
    if are_shares(metric, numbers):
        return mean, share_ci95(numbers)
    return mean, student_ci95(numbers)


def are_shares(metric: str, *values: np.ndarray) -> bool:
    return metric not in NO_SHARES and all(np.isin(x, (0.0, 1.0)).all() for x in values)


def student_ci95(numbers: np.ndarray) -> Interval | None:
    """Student's t interval of the mean; None without any spread."""
    if len(numbers) < 2 or np.ptp(numbers) == 0:
        return None
    mean, df = float(numbers.mean()), len(numbers) - 1
    half = student_t_quantile(0.975, df) * float(numbers.std(ddof=1)) / math.sqrt(len(numbers))
    return mean - half, mean + half


def share_ci95(
    shares: Sequence[float] | np.ndarray, weights: Sequence[float] | None = None
) -> Interval:
    """Score interval of the mean of numbers in [0, 1]: wins, ties as 1/2, shares of a judge.

        { m : (mean - m)^2 <= z^2 Var_m / n },   z = 1.96

    where Var_m is the variance of the likeliest distribution on [0, 1] that has mean m, given the
    values (a multinomial over them and both ends). For 0 and 1 alone this is Wilson's interval;
    with ties, values of 1/2, it is Tango's.

    Args:
        shares: Numbers in [0, 1].
        weights: One for each, equal by default; n is then (sum w)^2 / sum w^2.

    Source: Wilson 1927; Tango 1998 (Statistics in Medicine 17:891); Owen 2001, Empirical
        Likelihood, section 2, for the constrained maximum.
    """
    x = np.asarray(shares, dtype=float)
    w = np.ones(len(x)) if weights is None else np.asarray(weights, dtype=float)
    count = float(w.sum() ** 2 / (w**2).sum())
    x, group = np.unique(x, return_inverse=True)
    w = np.bincount(group, w) / w.sum()
    return 1 - _upper_end(1 - x, w, count), _upper_end(x, w, count)


def _upper_end(x: np.ndarray, w: np.ndarray, count: float) -> float:
    mean = float(w @ x)

    def excess(m: float) -> float:
        return (m - mean) ** 2 * count - Z95**2 * _variance_at(x, w, m)

    # at the mean itself both terms may be 0; no mean exceeds 1
    start, end = mean + 1e-9 * (1 - mean), 1 - 1e-12
    if start >= end or excess(end) <= 0:
        return 1.0
    return float(optimize.brentq(excess, start, end, xtol=1e-10))


def _variance_at(x: np.ndarray, w: np.ndarray, m: float) -> float:
    """Variance of the likeliest distribution with mean ``m`` above that of ``x`` weighted ``w``.

        p_i = w_i / (1 - t (x_i - m)),   0 <= t <= 1 / (1 - m)

    with the remaining mass at 1 if t is at its bound.
    """
    gap, bound = x - m, 1 / (1 - m)
    t = bound
    with np.errstate(divide="ignore"):
        if (w / (1 - bound * gap)).sum() > 1:  # a value of 1 makes this infinite
            high = bound * (1 - 1e-13)
            t = optimize.brentq(lambda t: float(w @ (gap / (1 - t * gap))), 0.0, high, xtol=1e-14)
    p = w / (1 - t * gap)
    return float(p @ gap**2 + max(0.0, 1 - p.sum()) * (1 - m) ** 2)


def proportion_ci95(share: float, count: int) -> Interval:
    """Wilson's interval of a share of ``count`` cases; stays inside [0, 1]."""
    centre = (share + Z95**2 / (2 * count)) / (1 + Z95**2 / count)
    spread = Z95**2 * (share * (1 - share) / count + Z95**2 / (4 * count**2))
    half = math.sqrt(spread) / (1 + Z95**2 / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def percentiles(resampled: np.ndarray, num_rows: int) -> Interval | None:
    """Percentile interval, wider than [2.5%, 97.5%] as Student's t is wider than the normal.

        level = Phi(-t_{.975, n - 1} sqrt(n / (n - 1)))

    The plain interval is too narrow with few rows: resamples vary by (n - 1) / n of the variance,
    and its own error is ignored. At 400 rows the level is 2.45%.

    Returns:
        None below ``MIN_BOOTSTRAP_ROWS`` rows, and if all resamples are equal.

    Source: Hesterberg 2015 (The American Statistician 69:371), section 4.3, "expanded percentile".
    """
    if num_rows < MIN_BOOTSTRAP_ROWS or np.ptp(resampled) == 0:
        return None
    wider = student_t_quantile(0.975, num_rows - 1) * math.sqrt(num_rows / (num_rows - 1))
    level = 100 * float(special.ndtr(-wider))
    low, high = np.percentile(resampled, [level, 100 - level])
    return float(low), float(high)


def student_t_p(t: float, df: float) -> float:
    """P(|T| >= |t|) for Student's t."""
    return float(2 * special.stdtr(df, -abs(t)))


def student_t_quantile(share: float, df: float) -> float:
    return float(special.stdtrit(df, share))


def bootstrap_rows(num_rows: int, num_resamples: int, seed: int) -> np.ndarray:
    """Draw the rows of every resample, exactly as sacreBLEU does."""
    rng = np.random.default_rng(seed)
    return rng.choice(num_rows, size=(num_resamples, num_rows), replace=True)


def finite_values(values: Sequence[float] | np.ndarray, name: str) -> np.ndarray:
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or not len(numbers) or not np.isfinite(numbers).all():
        raise ValueError(f"{name}: must be one or more finite numbers, got shape {numbers.shape}")
    return numbers
