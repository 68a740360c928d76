"""Is A better than B? Paired tests over the same prompts, and intervals; all fixed by a seed.

Pairing matters: two systems stumble over the same hard prompts, so that their difference is known
far better than either score. A system may be given as several training seeds: prompts are then
compared by their means over seeds, and intervals resample seeds as well as prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal, TypeAlias

import numpy as np

from align.evaluation.bleu import CORPUS_METRICS, corpus_statistics
from align.evaluation.verdict import prompts_needed, verdict

PairedTest: TypeAlias = Literal["bootstrap", "randomization"]

# sacreBLEU's own default, so that our p is what its command line prints
DEFAULT_SEED = 12345
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
        p: Probability of a difference this large if there were none, by the test asked for.
        ci95: Percentile interval of the difference over bootstrap resamples of the prompts.
        p_bootstrap: p by the paired bootstrap.
        p_randomization: p by paired approximate randomisation, two-sided; the verdict's.
        num_prompts: How many prompts both answered.
        num_prompts_needed: That a difference of this size needs for power .8; None without one.
        verdict: The outcome of a against b in words.
    """

    a: str
    b: str
    metric: str
    difference: float
    p: float
    ci95: tuple[float, float]
    p_bootstrap: float
    p_randomization: float
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
    rows = _bootstrap_rows(len(stats_a), num_resamples, seed)
    # float32 because sacreBLEU resamples in it: rounding could tip a p otherwise
    floats_a, floats_b = stats_a.astype(np.float32), stats_b.astype(np.float32)
    resampled = np.array([score(floats_a[r].sum(0)) - score(floats_b[r].sum(0)) for r in rows])
    interval = resampled
    if max(len(seeds_a), len(seeds_b)) > 1:
        drawn_a, drawn_b = _drawn_seeds(len(seeds_a), len(seeds_b), num_resamples, seed)
        interval = np.array(
            [
                score(np.tensordot(wa, seeds_a[:, r].sum(1), 1))
                - score(np.tensordot(wb, seeds_b[:, r].sum(1), 1))
                for wa, wb, r in zip(drawn_a, drawn_b, rows, strict=True)
            ]
        )
    spread = np.abs(resampled) - np.abs(resampled).mean()
    by_bootstrap = _p_value(int((spread > abs(difference)).sum()), num_resamples)
    swapped = _swapped_differences(stats_a, stats_b, score, num_resamples, seed)
    by_swaps = _p_value(int((swapped > abs(difference)).sum()), num_resamples)
    return _comparison(
        a[0],
        b[0],
        metric,
        difference,
        ps=(1.0, 1.0) if difference == 0 else (by_bootstrap, by_swaps),
        test=test,
        interval=interval,
        num_prompts=len(stats_a),
        # of a mean: here of a score that is no mean, by the spread of its resamples
        paired_std=float(resampled.std()) * math.sqrt(len(stats_a)),
    )


def compare_values(
    a: tuple[str, Sequence[float] | np.ndarray],
    b: tuple[str, Sequence[float] | np.ndarray],
    *,
    metric: str,
    test: PairedTest = "randomization",
    num_resamples: int = 1000,
    seed: int = DEFAULT_SEED,
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
    """
    seeds_a, seeds_b = _by_seed(a[1], a[0]), _by_seed(b[1], b[0])
    differences = seeds_a.mean(0) - seeds_b.mean(0)
    difference = float(differences.mean())
    rows = _bootstrap_rows(len(differences), num_resamples, seed)
    resampled = differences[rows].mean(axis=1)
    interval = resampled
    if max(len(seeds_a), len(seeds_b)) > 1:
        drawn_a, drawn_b = _drawn_seeds(len(seeds_a), len(seeds_b), num_resamples, seed)
        drawn = drawn_a @ seeds_a - drawn_b @ seeds_b
        interval = np.take_along_axis(drawn, rows, axis=1).mean(axis=1)
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
        interval=interval,
        num_prompts=len(differences),
        paired_std=float(differences.std(ddof=1)) if len(differences) > 1 else 0.0,
    )


def mean_ci95(values: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """Mean and its 95% interval by Student's t; no interval for a single value."""
    numbers = _checked(values, "values")
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
    rows = _bootstrap_rows(len(statistics), num_resamples, seed)
    return _percentiles(np.array([score(statistics[r].sum(0)) for r in rows]))


def proportion_ci95(share: float, count: int) -> tuple[float, float]:
    """Wilson's interval of a share of ``count`` cases; stays inside [0, 1]."""
    z2 = NormalDist().inv_cdf(0.975) ** 2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = math.sqrt(z2 * (share * (1 - share) / count + z2 / (4 * count**2))) / (1 + z2 / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def corpus_scorer(metric: str) -> Callable[[np.ndarray], float]:
    """Summed statistics ``[n]`` -> the score."""
    scorer: Any = CORPUS_METRICS[metric]()
    return lambda sums: float(scorer._compute_score_from_stats(sums).score)


def _comparison(
    a: str,
    b: str,
    metric: str,
    difference: float,
    *,
    ps: tuple[float, float],
    test: PairedTest,
    interval: np.ndarray,
    num_prompts: int,
    paired_std: float,
) -> Comparison:
    by_bootstrap, by_swaps = ps
    needed = prompts_needed(difference, paired_std)
    return Comparison(
        a=a,
        b=b,
        metric=metric,
        difference=difference,
        p=by_bootstrap if test == "bootstrap" else by_swaps,
        ci95=_percentiles(interval),
        p_bootstrap=by_bootstrap,
        p_randomization=by_swaps,
        num_prompts=num_prompts,
        num_prompts_needed=needed,
        # a two-sided test, where sacreBLEU's bootstrap is about one-sided
        verdict=verdict(metric, difference, by_swaps, num_prompts=num_prompts, needed=needed),
    )


def _bootstrap_rows(num_rows: int, num_resamples: int, seed: int) -> np.ndarray:
    """The rows of every resample; drawn exactly as sacreBLEU draws them."""
    rng = np.random.default_rng(seed)
    return rng.choice(num_rows, size=(num_resamples, num_rows), replace=True)


def _drawn_seeds(
    num_a: int, num_b: int, num_resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """How often each training seed is drawn in each resample, as shares ``[resamples, seeds]``."""
    rng = np.random.default_rng([seed, 1])
    return (
        rng.multinomial(num_a, [1 / num_a] * num_a, size=num_resamples) / num_a,
        rng.multinomial(num_b, [1 / num_b] * num_b, size=num_resamples) / num_b,
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


def _p_value(num_as_large: int, num_resamples: int) -> float:
    # + 1: the sample itself is one of the outcomes, so p is never 0
    return (num_as_large + 1) / (num_resamples + 1)


def _percentiles(resampled: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(low), float(high)


def _checked(values: Sequence[float] | np.ndarray, name: str) -> np.ndarray:
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or not len(numbers) or not np.isfinite(numbers).all():
        raise ValueError(f"{name}: must be one or more finite numbers, got shape {numbers.shape}")
    return numbers


def _by_seed(values: Sequence[float] | np.ndarray, name: str) -> np.ndarray:
    """``[seeds, prompts]``."""
    rows = np.asarray(values, dtype=np.float64)
    rows = rows if rows.ndim == 2 else rows[None]
    return np.stack([_checked(row, name) for row in rows])


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
