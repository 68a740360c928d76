"""Test whether A is better than B: a paired randomisation test over prompts, fixed by a seed.

Pairing matters: two systems fail on the same hard prompts, so their difference is known far better
than either score. If A and B are equally good, each prompt's two answers might as well be swapped.
p is the share of such swaps whose difference is at least as large as the one found, two-sided. All
swaps are counted if there are few enough, else a sample. So the type I error is at most 5% for
p < .05, for any metric, number of prompts, and number of ties.

Differs from sacreBLEU 2 ``significance.py``, which counts differences that are *larger* than the
one found, and so calls two systems that differ in a single answer different (p = .001): every swap
gives the same difference. Here differences count from "as large" upwards (Phipson and Smyth 2010).
sacreBLEU's bootstrap p, about half of a two-sided one, is not offered.

A system may have several training seeds: p and interval are then by Student's t over seeds
(``align.evaluation.seeds``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from align.base.intervals import (
    DEFAULT_SEED,
    Interval,
    are_shares,
    bootstrap_rows,
    finite_values,
    percentiles,
    share_ci95,
    student_ci95,
)
from align.evaluation.bleu import corpus_scorer, corpus_statistics
from align.evaluation.metrics import CORPUS_METRICS
from align.evaluation.seeds import SeedError, seed_error
from align.evaluation.verdict import prompts_needed, verdict

Test: TypeAlias = Literal["randomization", "seeds"]

# relative tolerance within which differences are equal
ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Outcome of a paired test.

    Attributes:
        a: Name of one system.
        b: Name of the other.
        metric: Name of the compared metric.
        difference: a minus b, in the metric's unit; positive = a scores higher.
        p: Probability of a difference at least this large if there were none, two-sided, for this
            comparison alone: not corrected for the number of comparisons.
        test: ``randomization`` over prompts, or Student's t over ``seeds``.
        ci95: Interval of the difference: Student's t over prompts for means (a score interval if
            all values are 0 or 1), bootstrap over prompts for corpus metrics; with several seeds
            Student's t over seeds. None if the data do not show how much it varies.
        num_seeds: Seeds of a and of b.
        num_prompts: Prompts that both answered.
        num_differing: Prompts on which the two differ: p < .05 is impossible with fewer than 6.
        num_prompts_needed: Prompts needed to show a difference of this size with power .8; None
            without a difference, and with several seeds, where more prompts do not settle it.
        verdict: The outcome of a against b in words.
    """

    a: str
    b: str
    metric: str
    difference: float
    p: float
    test: Test
    ci95: Interval | None
    num_seeds: tuple[int, int]
    num_prompts: int
    num_differing: int
    num_prompts_needed: int | None
    verdict: str


def compare_corpus(
    a: tuple[str, Sequence[str]],
    b: tuple[str, Sequence[str]],
    references: Sequence[Sequence[str]],
    *,
    metric: str = "bleu",
    num_resamples: int = 1000,
    seed: int = DEFAULT_SEED,
) -> Comparison:
    """Compare two systems by a corpus metric (BLEU, chrF, TER).

    Args:
        a: Name and outputs of one system.
        b: The same for the other, for the same prompts.
        references: One or more for each prompt.
        metric: A key of ``CORPUS_METRICS``.
        num_resamples: Swaps of the test, and resamples of the interval.
        seed: Same seed, same result.
    """
    scorer = CORPUS_METRICS[metric]()
    (name_a, outputs_a), (name_b, outputs_b) = a, b
    return compare_statistics(
        (name_a, corpus_statistics(scorer, outputs_a, references)),
        (name_b, corpus_statistics(scorer, outputs_b, references)),
        metric=metric,
        num_resamples=num_resamples,
        seed=seed,
    )


def compare_statistics(
    a: tuple[str, np.ndarray],
    b: tuple[str, np.ndarray],
    *,
    metric: str,
    num_resamples: int = 1000,
    seed: int = DEFAULT_SEED,
) -> Comparison:
    """Compare by statistics ``[rows, n]``, or ``[seeds, rows, n]``; see ``compare_corpus``.

    Source: Riezler and Maxwell 2005; sacreBLEU 2 for drawing the swaps, not for counting them.
    """
    score = corpus_scorer(metric)
    seeds_a, seeds_b = (x if x.ndim == 3 else x[None] for x in (a[1], b[1]))
    # means, not sums: swapped rows must have equal weight for any number of seeds
    stats_a, stats_b = seeds_a.mean(0), seeds_b.mean(0)
    score_a, score_b = score(stats_a.sum(0)), score(stats_b.sum(0))
    differs = (stats_a != stats_b).any(axis=1)
    swaps = _swaps(differs, num_resamples, seed)
    # matrix products: sums of swapped and of unswapped rows
    moved = swaps.rows @ (stats_b - stats_a)
    swapped = [score(stats_a.sum(0) + m) - score(stats_b.sum(0) - m) for m in moved]
    rows = bootstrap_rows(len(stats_a), num_resamples, seed)
    resampled = np.array([score(stats_a[r].sum(0)) - score(stats_b[r].sum(0)) for r in rows])
    return _comparison(
        a[0],
        b[0],
        metric,
        _Found(
            difference=score_a - score_b,
            rounding=ROUNDING * (1 + abs(score_a) + abs(score_b)),
            swapped=np.array(swapped),
            swaps=swaps,
            # outputs with equal statistics in every row have no difference
            interval=percentiles(resampled, len(rows[0])) if differs.any() else (0.0, 0.0),
            # prompts_needed wants the std of a mean; a corpus score is not one: bootstrap std
            paired_std=float(resampled.std()) * math.sqrt(len(stats_a)),
        ),
        num_seeds=(len(seeds_a), len(seeds_b)),
        over_seeds=seed_error(
            *(np.array([score(one.sum(0)) for one in side]) for side in (seeds_a, seeds_b))
        ),
    )


def compare_values(
    a: tuple[str, Sequence[float] | np.ndarray],
    b: tuple[str, Sequence[float] | np.ndarray],
    *,
    metric: str,
    num_resamples: int = 1000,
    seed: int = DEFAULT_SEED,
    num_seeds: tuple[int, int] | None = None,
    over_seeds: SeedError | None = None,
) -> Comparison:
    """Compare the means of per-prompt numbers: rewards, sentence scores, lengths, wins.

    Args:
        a: Name and numbers of one system, ``[prompts]`` or ``[seeds, prompts]``.
        b: The same for the other, for the same prompts in the same order.
        metric: Name of the numbers.
        num_resamples: Swaps of the test.
        seed: Same seed, same result.
        num_seeds: Seeds behind numbers that are already means over seeds.
        over_seeds: Error of their difference over seeds.
    """
    seeds_a, seeds_b = _by_seed(a[1], a[0]), _by_seed(b[1], b[0])
    differences = seeds_a.mean(0) - seeds_b.mean(0)
    rounding = ROUNDING * float(np.abs(differences).mean())
    swaps = _swaps(np.abs(differences) > rounding, num_resamples, seed)
    shares = are_shares(metric, seeds_a, seeds_b)
    return _comparison(
        a[0],
        b[0],
        metric,
        _Found(
            difference=float(differences.mean()),
            rounding=rounding,
            swapped=np.where(swaps.rows, -differences, differences).mean(axis=1),
            swaps=swaps,
            interval=_share_difference(differences) if shares else student_ci95(differences),
            paired_std=float(differences.std(ddof=1)) if len(differences) > 1 else math.nan,
        ),
        num_seeds=num_seeds or (len(seeds_a), len(seeds_b)),
        over_seeds=over_seeds or seed_error(seeds_a.mean(1), seeds_b.mean(1)),
    )


@dataclass(frozen=True)
class _Swaps:
    """Prompts that change sides, ``[swaps, prompts]``; ``all`` if they are all possible swaps."""

    rows: np.ndarray
    num_differing: int
    all: bool

    @property
    def least_p(self) -> float:
        """Smallest p that this test can give."""
        if self.all:
            return min(1.0, 2.0 ** (1 - self.num_differing))
        return 1 / (len(self.rows) + 1)


def _swaps(differs: np.ndarray, num_resamples: int, seed: int) -> _Swaps:
    """List all swaps of the differing prompts, if ``num_resamples`` suffices, else draw some."""
    differing = np.flatnonzero(differs)
    if 2 ** len(differing) <= num_resamples:
        rows = np.zeros((2 ** len(differing), len(differs)), dtype=bool)
        rows[:, differing] = np.arange(len(rows))[:, None] >> np.arange(len(differing)) & 1
        return _Swaps(rows, len(differing), all=True)
    shape = (num_resamples, len(differs))
    rows = np.random.default_rng(seed).integers(2, size=shape, dtype=bool)
    return _Swaps(rows, len(differing), all=False)


@dataclass(frozen=True)
class _Found:
    """A difference, the differences after swaps, and its interval over prompts."""

    difference: float
    rounding: float
    swapped: np.ndarray
    swaps: _Swaps
    interval: Interval | None
    paired_std: float

    def p(self) -> float:
        if abs(self.difference) <= self.rounding:
            return 1.0
        as_large = int((np.abs(self.swapped) >= abs(self.difference) - self.rounding).sum())
        if self.swaps.all:
            return as_large / len(self.swapped)
        # + 1 for the observed outcome, so p is never 0
        return (as_large + 1) / (len(self.swapped) + 1)


def _comparison(
    a: str,
    b: str,
    metric: str,
    found: _Found,
    *,
    num_seeds: tuple[int, int],
    over_seeds: SeedError | None,
) -> Comparison:
    num_prompts = found.swaps.rows.shape[1]
    difference = 0.0 if abs(found.difference) <= found.rounding else found.difference
    p, interval, least_p, needed = found.p(), found.interval, found.swaps.least_p, None
    by_seeds = None
    if over_seeds is not None:
        error_of_prompts = found.paired_std**2 / num_prompts
        by_seeds = over_seeds.test(difference, error_of_prompts, num_prompts - 1)
    elif num_prompts > 1:
        needed = prompts_needed(difference, found.paired_std)
    if by_seeds is not None:
        (p, interval), least_p = by_seeds, 0.0
    return Comparison(
        a=a,
        b=b,
        metric=metric,
        difference=difference,
        p=p,
        test="randomization" if by_seeds is None else "seeds",
        ci95=interval,
        num_seeds=num_seeds,
        num_prompts=num_prompts,
        num_differing=found.swaps.num_differing,
        num_prompts_needed=needed,
        verdict=verdict(
            metric,
            difference,
            p,
            num_prompts=num_prompts,
            num_differing=found.swaps.num_differing,
            needed=needed,
            num_seeds=num_seeds,
            least_p=least_p,
        ),
    )


def _share_difference(differences: np.ndarray) -> Interval | None:
    if len(differences) == 1:
        return None
    low, high = share_ci95((1 + differences) / 2)
    return 2 * low - 1, 2 * high - 1


def _by_seed(values: Sequence[float] | np.ndarray, name: str) -> np.ndarray:
    """Convert to ``[seeds, prompts]``."""
    rows = np.asarray(values, dtype=np.float64)
    rows = rows if rows.ndim == 2 else rows[None]
    return np.stack([finite_values(row, name) for row in rows])
