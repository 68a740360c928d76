"""Is A better than B? Paired tests over the same prompts, all fixed by a seed.

Pairing matters: two systems stumble over the same hard prompts, so that their difference is known
far better than either score. A system may be given as several training seeds: the verdict and the
interval are then by Student's t over seeds (``align.evaluation.seeds``), and the paired tests speak
of these very runs only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from align.evaluation.bleu import CORPUS_METRICS, corpus_statistics
from align.evaluation.intervals import (
    DEFAULT_SEED,
    bootstrap_rows,
    corpus_scorer,
    finite_values,
    percentiles,
)
from align.evaluation.seeds import SeedError, seed_error
from align.evaluation.verdict import prompts_needed, verdict

PairedTest: TypeAlias = Literal["bootstrap", "randomization"]

# differences of means that are equal but for rounding are equal
RELATIVE_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What the paired tests found.

    Attributes:
        a: Name of one system.
        b: Name of the other.
        metric: What was compared.
        difference: a minus b, in the metric's unit; positive = a scores higher.
        p: Probability of a difference this large if there were none: ``p_seeds`` with several
            seeds, else by the test asked for.
        ci95: Percentile interval of the difference over bootstrap resamples of the prompts; with
            several seeds Student's t over seeds.
        p_seeds: p by Student's t over seeds, two-sided; the verdict's. None with one on each side.
        p_bootstrap: p by the paired bootstrap over prompts.
        p_randomization: p by paired approximate randomisation over prompts, two-sided; the
            verdict's with one seed on each side.
        num_seeds: Of a and of b.
        num_prompts: How many prompts both answered.
        num_prompts_needed: That a difference of this size needs for power .8; None without one, and
            with several seeds, where more prompts are not what settles it.
        verdict: The outcome of a against b in words.
    """

    a: str
    b: str
    metric: str
    difference: float
    p: float
    ci95: tuple[float, float]
    p_seeds: float | None
    p_bootstrap: float
    p_randomization: float
    num_seeds: tuple[int, int]
    num_prompts: int
    num_prompts_needed: int | None
    verdict: str


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
    """Compare two systems by a corpus metric (BLEU, chrF, TER), with sacreBLEU's p.

    Args:
        a: Name and outputs of one system.
        b: The same for the other, for the same prompts.
        references: One or more for each prompt.
        metric: A key of ``CORPUS_METRICS``.
        test: Which p is ``p``: ``bootstrap`` or ``randomization``, each as sacreBLEU does it. Its
            bootstrap p comes out near half of a two-sided one; randomization is two-sided.
        num_resamples: Resamplings of the tests and of the interval.
        seed: Same seed, same result.
    """
    scorer = CORPUS_METRICS[metric]()
    (name_a, outputs_a), (name_b, outputs_b) = a, b
    return compare_statistics(
        (name_a, corpus_statistics(scorer, outputs_a, references)),
        (name_b, corpus_statistics(scorer, outputs_b, references)),
        metric=metric,
        test=test,
        num_resamples=num_resamples,
        seed=seed,
    )


def compare_statistics(
    a: tuple[str, np.ndarray],
    b: tuple[str, np.ndarray],
    *,
    metric: str,
    test: PairedTest = "bootstrap",
    num_resamples: int = 1000,
    seed: int = DEFAULT_SEED,
) -> Comparison:
    """``compare_corpus`` of statistics ``[rows, n]``, or ``[seeds, rows, n]``.

    Source: Koehn 2004; Riezler and Maxwell 2005; sacreBLEU 2 ``significance.py``, whose p this is
        for equal seeds. Differs: equal scores have p = 1 (sacreBLEU gives 1 / (num_resamples + 1)).
    """
    score = corpus_scorer(metric)
    seeds_a, seeds_b = (x if x.ndim == 3 else x[None] for x in (a[1], b[1]))
    # means, not sums: rows that change sides must weigh alike, however many seeds a side has
    stats_a, stats_b = seeds_a.mean(0), seeds_b.mean(0)
    difference = score(stats_a.sum(0)) - score(stats_b.sum(0))
    rows = bootstrap_rows(len(stats_a), num_resamples, seed)
    # float32 because sacreBLEU resamples in it: rounding could tip a p otherwise
    floats_a, floats_b = stats_a.astype(np.float32), stats_b.astype(np.float32)
    resampled = np.array([score(floats_a[r].sum(0)) - score(floats_b[r].sum(0)) for r in rows])
    spread = np.abs(resampled) - np.abs(resampled).mean()
    swapped = _swapped_differences(stats_a, stats_b, score, num_resamples, seed)
    ps = (_share_beyond(spread, difference), _share_beyond(swapped, difference))
    return _comparison(
        a[0],
        b[0],
        metric,
        difference,
        ps=(1.0, 1.0) if difference == 0 else ps,
        test=test,
        resampled=resampled,
        num_prompts=len(stats_a),
        # of a mean: here of a score that is no mean, by the spread of its resamples
        paired_std=float(resampled.std()) * math.sqrt(len(stats_a)),
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
    test: PairedTest = "randomization",
    num_resamples: int = 1000,
    seed: int = DEFAULT_SEED,
    num_seeds: tuple[int, int] | None = None,
    over_seeds: SeedError | None = None,
) -> Comparison:
    """Compare the means of per-prompt numbers: rewards, sentence scores, lengths, wins.

    Args:
        a: Name and numbers of one system, ``[prompts]`` or ``[seeds, prompts]``.
        b: The same for the other, for the same prompts in the same order.
        metric: What the numbers are.
        test: Which p is ``p``: ``randomization`` swaps the two systems' numbers prompt by prompt at
            random; ``bootstrap`` resamples prompts and centres the resampled differences on 0. Both
            are two-sided.
        num_resamples: Resamplings of the tests and of the interval.
        seed: Same seed, same result.
        num_seeds: Behind numbers that are means over seeds already.
        over_seeds: And what reruns move their difference by.
    """
    seeds_a, seeds_b = _by_seed(a[1], a[0]), _by_seed(b[1], b[0])
    differences = seeds_a.mean(0) - seeds_b.mean(0)
    difference = float(differences.mean())
    rows = bootstrap_rows(len(differences), num_resamples, seed)
    resampled = differences[rows].mean(axis=1)
    swap = np.random.default_rng(seed).integers(2, size=rows.shape, dtype=bool)
    swapped = np.where(swap, -differences, differences).mean(axis=1)

    def p_of(under_null: np.ndarray) -> float:
        as_large = np.abs(under_null) >= abs(difference) * (1 - RELATIVE_ROUNDING)
        return _p_value(int(as_large.sum()), num_resamples)

    return _comparison(
        a[0],
        b[0],
        metric,
        difference,
        ps=(p_of(resampled - difference), p_of(swapped)),
        test=test,
        resampled=resampled,
        num_prompts=len(differences),
        paired_std=float(differences.std(ddof=1)) if len(differences) > 1 else 0.0,
        num_seeds=num_seeds or (len(seeds_a), len(seeds_b)),
        over_seeds=over_seeds or seed_error(seeds_a.mean(1), seeds_b.mean(1)),
    )


def _comparison(
    a: str,
    b: str,
    metric: str,
    difference: float,
    *,
    ps: tuple[float, float],
    test: PairedTest,
    resampled: np.ndarray,
    num_prompts: int,
    paired_std: float,
    num_seeds: tuple[int, int],
    over_seeds: SeedError | None,
) -> Comparison:
    by_bootstrap, by_swaps = ps
    by_seeds, interval, needed = None, percentiles(resampled), None
    if over_seeds is None:
        needed = prompts_needed(difference, paired_std)
    else:
        by_seeds, interval = over_seeds.test(difference, paired_std**2 / num_prompts)
    by_prompts = by_bootstrap if test == "bootstrap" else by_swaps
    # a two-sided test, where sacreBLEU's bootstrap is about one-sided
    decides = by_swaps if by_seeds is None else by_seeds
    return Comparison(
        a=a,
        b=b,
        metric=metric,
        difference=difference,
        p=by_prompts if by_seeds is None else by_seeds,
        ci95=interval,
        p_seeds=by_seeds,
        p_bootstrap=by_bootstrap,
        p_randomization=by_swaps,
        num_seeds=num_seeds,
        num_prompts=num_prompts,
        num_prompts_needed=needed,
        verdict=verdict(
            metric,
            difference,
            decides,
            num_prompts=num_prompts,
            needed=needed,
            num_seeds=num_seeds,
        ),
    )


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


def _share_beyond(resampled: np.ndarray, difference: float) -> float:
    """p: the share of resampled differences, in size, that are larger than the one found."""
    return _p_value(int((resampled > abs(difference)).sum()), len(resampled))


def _p_value(num_as_large: int, num_resamples: int) -> float:
    # + 1: the sample itself is one of the outcomes, so p is never 0
    return (num_as_large + 1) / (num_resamples + 1)


def _by_seed(values: Sequence[float] | np.ndarray, name: str) -> np.ndarray:
    """``[seeds, prompts]``."""
    rows = np.asarray(values, dtype=np.float64)
    rows = rows if rows.ndim == 2 else rows[None]
    return np.stack([finite_values(row, name) for row in rows])
