"""Test a difference between models trained several times: Student's t over their seeds.

A rerun moves a model further than most prompts do, so a test over prompts alone calls nearly every
two sets of seeds different. Here the seeds are the sample; the prompts' share of the error is added
to theirs, and prompts never count as more seeds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from align.base.intervals import Interval, student_t_p, student_t_quantile


@dataclass(frozen=True)
class SeedError:
    """Error of a difference between reruns.

    Attributes:
        variance: Variance of the difference over the seeds of both sides, in its unit squared.
        df: Degrees of freedom of that estimate.
    """

    variance: float
    df: float

    def test(
        self, difference: float, variance_of_prompts: float, df_of_prompts: int
    ) -> tuple[float, Interval] | None:
        """Return p, two-sided, and the 95% interval of the difference.

        Degrees of freedom are Welch's of both errors, at most those of the seeds: few prompts cost
        as much as few seeds. None with one prompt, and if neither seeds nor prompts vary, since the
        error is then unknown.
        """
        if df_of_prompts < 1 or self.variance + variance_of_prompts == 0:
            return None
        both = self.variance + variance_of_prompts
        parts = self.variance**2 / self.df + variance_of_prompts**2 / df_of_prompts
        df = min(self.df, both**2 / parts)
        half = student_t_quantile(0.975, df) * math.sqrt(both)
        return student_t_p(difference / math.sqrt(both), df), (difference - half, difference + half)


def seed_error(of_a: np.ndarray, of_b: np.ndarray) -> SeedError | None:
    """Estimate the error from one score for each seed of a and b; None if both have one seed.

        variance = var(a) / n_a + var(b) / n_b

    A side with one seed is assumed to vary like the other.

    Source: Welch 1947; Colas et al. 2019 (arXiv:1904.06979) on comparing trained policies with it.
    """
    if max(len(of_a), len(of_b)) == 1:
        return None
    several = [x for x in (of_a, of_b) if len(x) > 1]
    if len(several) == 1:
        spread = float(several[0].var(ddof=1))
        return SeedError(spread * (1 + 1 / len(several[0])), len(several[0]) - 1)
    parts = [float(x.var(ddof=1)) / len(x) for x in several]
    least = min(len(x) for x in several) - 1
    if sum(parts) == 0:
        return SeedError(0.0, least)
    squares = sum(part**2 / (len(x) - 1) for part, x in zip(parts, several, strict=True))
    return SeedError(sum(parts), max(least, sum(parts) ** 2 / squares))


def seed_error_of_pairs(differences: np.ndarray, num_seeds: tuple[int, int]) -> SeedError | None:
    """Estimate the error if seeds meet in pairs, from one difference for each pair."""
    least = min(num_seeds)
    if least == 1:
        return seed_error(differences, np.zeros(1))
    return SeedError(float(differences.var(ddof=1)) / least, least - 1)
