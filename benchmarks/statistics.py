"""How often are the tests of ``align eval`` wrong, and how often do its intervals cover the truth?

    python -m benchmarks.statistics                 # about four minutes of one core
    python -m benchmarks.statistics --trials 200    # quicker, rougher
    python -m benchmarks.statistics --only wins     # or tests, means, corpus, agreement, seeds

Draws data whose truth is known, 3 to 400 prompts at a time, with ties, at shares near 0 and 1, and
counts. A test at p < .05 may find a difference in at most 5% of trials without one; an interval of
95% should hold the truth in 95%, or more where the data are discrete. Prints Markdown for
docs/evaluation.md. The standard error of .05 or .95 over 1,000 trials is .007; BLEU has a
fifth of the trials, wins at equal length a quarter.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np

from align.base.intervals import (
    Interval,
    mean_ci95,
    share_ci95,
)
from align.evaluation.agreement import calibration_error_by_chance, expected_calibration_error
from align.evaluation.bleu import corpus_ci95, corpus_scorer
from align.evaluation.compare import Comparison, compare_statistics, compare_values
from align.evaluation.wins import (
    length_controlled_difference,
    length_controlled_win_rate,
)
from align.feedback.agreement import alpha_ci95, cohen_kappa, kappa_ci95, krippendorff_alpha
from align.feedback.ranking import NoMaximum, bradley_terry

SIZES = (3, 5, 8, 20, 100, 400)
RESAMPLES = 500
Measure = Callable[[np.random.Generator, int], bool | None]
Sampler = Callable[[np.random.Generator, int], np.ndarray]


def main() -> None:
    args = _arguments()
    for name, part in PARTS.items():
        if args.only in (None, name):
            rows = part(args.trials)
            print(f"\n| {name} | {' | '.join(str(n) for n in SIZES)} |")
            print(f"|---|{'---|' * len(SIZES)}")
            for label, shares in rows:
                cells = ["" if s is None else f"{s:.3f}".removeprefix("0") for s in shares]
                print(f"| {label} | {' | '.join(cells)} |", flush=True)


def over_sizes(
    measure: Measure,
    trials: int,
    sizes: Sequence[int] = SIZES,
) -> list[float | None]:
    """Share of trials in which ``measure(rng, n)`` is true, per size; None where it never is told.

    ``measure`` gives None where there is no interval: such a trial claims nothing.
    """
    shares: list[float | None] = []
    for n in SIZES:
        if n not in sizes:
            shares.append(None)
            continue
        rng = np.random.default_rng(n)
        told = [x for x in (measure(rng, n) for _ in range(trials)) if x is not None]
        shares.append(float(np.mean(told)) if told else None)
    return shares


# ---------------------------------------------------------------- data without a difference


def normal(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.normal(size=n)


def skewed(rng: np.random.Generator, n: int) -> np.ndarray:
    """Lognormal with a mean of 0: most below it, a few far above, as KL and lengths are."""
    return rng.lognormal(size=n) - np.exp(0.5)


def binary(share: float) -> Sampler:
    return lambda rng, n: (rng.random(n) < share).astype(float)


def trinomial(wins: float, losses: float) -> Sampler:
    """Shares won: 1, 0, or a tie of 1/2."""

    def draw(rng: np.random.Generator, n: int) -> np.ndarray:
        u = rng.random(n)
        return np.where(u < wins, 1.0, np.where(u < wins + losses, 0.0, 0.5))

    return draw


def mostly_equal(rng: np.random.Generator, n: int) -> np.ndarray:
    """Differences of two systems that answer alike on nine prompts of ten."""
    return np.where(rng.random(n) < 0.9, 0.0, rng.normal(size=n))


def bleu_counts(rng: np.random.Generator, n: int, quality: float = 0.6) -> np.ndarray:
    """Statistics as sacreBLEU's: lengths of hypothesis and reference, matches, n-grams."""
    ref = rng.integers(5, 30, size=n)
    hyp = np.maximum(4, ref + rng.integers(-2, 3, size=n))
    skill = np.clip(quality + 0.15 * rng.normal(size=n), 0.05, 0.98)
    counts = [hyp, ref]
    totals = [np.maximum(hyp - k, 0) for k in range(4)]
    matches = [rng.binomial(total, skill ** (k + 1)) for k, total in enumerate(totals)]
    return np.stack([*counts, *matches, *totals], axis=1)


# ---------------------------------------------------------------- the parts


def tests(trials: int) -> list[tuple[str, list[float | None]]]:
    """p < .05 without a difference."""

    def found(comparison: Comparison) -> bool:
        assert comparison.verdict.startswith(("better", "worse")) == (comparison.p < 0.05)
        return comparison.p < 0.05

    def of_values(draw: Sampler) -> Measure:
        def measure(rng: np.random.Generator, n: int) -> bool:
            a, b = draw(rng, n), draw(rng, n)
            return found(
                compare_values(
                    ("a", a),
                    ("b", b),
                    metric="reward",
                    num_resamples=RESAMPLES,
                    seed=int(rng.integers(2**31)),
                )
            )

        return measure

    def of_corpora(share_differing: float) -> Measure:
        def measure(rng: np.random.Generator, n: int) -> bool:
            a = bleu_counts(rng, n)
            b = np.where(rng.random((n, 1)) < share_differing, bleu_counts(rng, n), a)
            # the same prompts have the same references
            b[:, 1] = a[:, 1]
            return found(
                compare_statistics(
                    ("a", a),
                    ("b", b),
                    metric="bleu",
                    num_resamples=200,
                    seed=int(rng.integers(2**31)),
                )
            )

        return measure

    few = max(trials // 5, 50)
    return [
        ("rewards, normal", over_sizes(of_values(normal), trials)),
        ("rewards, skewed", over_sizes(of_values(skewed), trials)),
        ("rewards 0 or 1, share .5", over_sizes(of_values(binary(0.5)), trials)),
        ("rewards 0 or 1, share .98", over_sizes(of_values(binary(0.98)), trials)),
        ("nine answers of ten equal", over_sizes(of_values(mostly_equal), trials)),
        ("wins, half of them ties", over_sizes(of_values(trinomial(0.25, 0.25)), trials)),
        ("BLEU", over_sizes(of_corpora(1.0), few)),
        ("BLEU, one answer of ten differs", over_sizes(of_corpora(0.1), few)),
    ]


def covers(interval: Interval | None, truth: float) -> bool | None:
    return None if interval is None else interval[0] - 1e-9 <= truth <= interval[1] + 1e-9


@functools.cache
def _share_ci95(wins: int, ties: int, losses: int) -> Interval:
    return share_ci95([1.0] * wins + [0.5] * ties + [0.0] * losses)


def cached_share_ci95(shares: np.ndarray) -> Interval:
    """``share_ci95`` of wins, ties and losses, solved once for each of their counts."""
    return _share_ci95(*(int((shares == value).sum()) for value in (1.0, 0.5, 0.0)))


def means(trials: int) -> list[tuple[str, list[float | None]]]:
    """Coverage of means of one system, and of paired differences."""

    def of_mean(draw: Sampler, truth: float) -> Measure:
        return lambda rng, n: covers(mean_ci95(draw(rng, n))[1], truth)

    def repeated(rng: np.random.Generator, n: int) -> np.ndarray:
        """A share of n-grams that is 0 in four outputs of five."""
        return np.where(rng.random(n) < 0.8, 0.0, rng.beta(2, 5, size=n))

    few = max(trials // 5, 50)
    return [
        ("mean, normal", over_sizes(of_mean(normal, 0.0), trials)),
        ("mean, skewed (KL, lengths)", over_sizes(of_mean(skewed, 0.0), trials)),
        ("difference, nine of ten equal", over_sizes(of_mean(mostly_equal, 0.0), trials)),
        (
            "repetition, 0 in most outputs",
            over_sizes(lambda rng, n: covers(share_ci95(repeated(rng, n)), 0.2 * 2 / 7), few),
        ),
    ]


def wins(trials: int) -> list[tuple[str, list[float | None]]]:
    """Coverage of shares: ended, right, won, won at equal length."""

    def of_wins(w: float, loses: float) -> Measure:
        draw, truth = trinomial(w, loses), w + (1 - w - loses) / 2
        return lambda rng, n: covers(cached_share_ci95(draw(rng, n)), truth)

    def of_length(quality: float, slope: float) -> Measure:
        truth = 1 / (1 + np.exp(-quality))

        def measure(rng: np.random.Generator, n: int) -> bool | None:
            gaps = rng.normal(30, 60, size=n)
            p = 1 / (1 + np.exp(-(quality + slope * np.tanh(gaps / gaps.std()))))
            found = length_controlled_win_rate((rng.random(n) < p).astype(float), gaps)
            return None if found is None else covers(found[1], truth)

        return measure

    def of_difference(rng: np.random.Generator, n: int) -> bool | None:
        lengths = rng.normal(30, 60, size=n)
        scores = 0.3 + 0.01 * lengths + rng.normal(size=n)
        found = length_controlled_difference(scores, np.zeros(n), lengths, np.zeros(n))
        return None if found is None else covers(found.ci95, 0.3)

    few = max(trials // 4, 20)
    rows = [
        (f"share {share} (Wilson)", over_sizes(of_wins(share, 1 - share), trials))
        for share in (0.5, 0.8, 0.95, 0.99)
    ]
    rows += [
        ("won .4, tied .2", over_sizes(of_wins(0.4, 0.4), trials)),
        ("won .05, tied .9", over_sizes(of_wins(0.05, 0.05), trials)),
        ("won .1, tied .89", over_sizes(of_wins(0.1, 0.01), trials)),
    ]
    return rows + [
        ("at equal length, quality 0", over_sizes(of_length(0.0, 0.0), few)),
        ("at equal length, wins go by length", over_sizes(of_length(0.0, 2.0), few)),
        ("at equal length, .95", over_sizes(of_length(3.0, 1.0), few)),
        ("rewards at equal length", over_sizes(of_difference, trials)),
    ]


def corpus(trials: int) -> list[tuple[str, list[float | None]]]:
    """Coverage of BLEU's intervals, and what calibration looks like by chance."""
    score = corpus_scorer("bleu")
    truths = {
        q: score(bleu_counts(np.random.default_rng(0), 200_000, q).sum(0)) for q in (0.6, 0.95)
    }

    def of_bleu(quality: float) -> Measure:
        def measure(rng: np.random.Generator, n: int) -> bool | None:
            counts = bleu_counts(rng, n, quality)
            seed = int(rng.integers(2**31))
            return covers(
                corpus_ci95(counts, "bleu", num_resamples=RESAMPLES, seed=seed), truths[quality]
            )

        return measure

    def of_difference(rng: np.random.Generator, n: int) -> bool | None:
        a, b = bleu_counts(rng, n, 0.6), bleu_counts(rng, n, 0.6)
        b[:, 1] = a[:, 1]
        found = compare_statistics(
            ("a", a), ("b", b), metric="bleu", num_resamples=200, seed=int(rng.integers(2**31))
        )
        return covers(found.ci95, 0.0)

    few = max(trials // 5, 50)
    return [
        (f"BLEU of {truths[0.6]:.0f}", over_sizes(of_bleu(0.6), few)),
        (f"BLEU of {truths[0.95]:.0f}", over_sizes(of_bleu(0.95), few)),
        ("difference of BLEU", over_sizes(of_difference, few)),
    ]


def seeds(trials: int) -> list[tuple[str, list[float | None]]]:
    """p < .05 where every training seed is as good; seeds move a model by 1 or .1 of a prompt."""

    def of_seeds(num: tuple[int, int], moved: float) -> Measure:
        def trained(rng: np.random.Generator, count: int, prompts: np.ndarray) -> np.ndarray:
            shift = moved * rng.normal(size=(count, 1))
            return prompts + shift + 0.5 * rng.normal(size=(count, len(prompts)))

        def measure(rng: np.random.Generator, n: int) -> bool:
            prompts = rng.normal(size=n)
            a, b = trained(rng, num[0], prompts), trained(rng, num[1], prompts)
            return compare_values(("a", a), ("b", b), metric="reward", num_resamples=2).p < 0.05

        return measure

    return [
        (
            f"{a} seeds against {b}, seeds move by {moved}",
            over_sizes(of_seeds((a, b), moved), trials),
        )
        for a, b in ((2, 1), (2, 2), (3, 3), (5, 5))
        for moved in (1.0, 0.1)
    ]


def agreement(trials: int) -> list[tuple[str, list[float | None]]]:
    """Coverage of kappa, alpha and strengths, and of the error of a calibrated reward."""

    def labels(
        rng: np.random.Generator, n: int, right: float, share: float, annotators: int
    ) -> list[tuple[bool, ...]]:
        truth = rng.random(n) < share
        said = [np.where(rng.random(n) < right, truth, ~truth) for _ in range(annotators)]
        return list(zip(*(x.tolist() for x in said), strict=True))

    def of_kappa(right: float, share: float) -> Measure:
        many = labels(np.random.default_rng(0), 200_000, right, share, 2)
        truth = cohen_kappa(*zip(*many, strict=True))

        def measure(rng: np.random.Generator, n: int) -> bool | None:
            return covers(kappa_ci95(*zip(*labels(rng, n, right, share, 2), strict=True)), truth)

        return measure

    def of_alpha(right: float, share: float) -> Measure:
        truth = krippendorff_alpha(labels(np.random.default_rng(0), 50_000, right, share, 3))
        return lambda rng, n: covers(alpha_ci95(labels(rng, n, right, share, 3)), truth)

    def of_strengths(truth: tuple[float, ...]) -> Measure:
        centred = np.array(truth) - np.mean(truth)

        def measure(rng: np.random.Generator, n: int) -> bool | None:
            comparisons = []
            for i, j in combinations(range(len(truth)), 2):
                p = 1 / (1 + np.exp(truth[j] - truth[i]))
                comparisons += [(i, j, float(won)) for won in rng.random(n) < p]
            try:
                low, high = bradley_terry(comparisons, len(truth)).interval()
            except NoMaximum:
                return None
            return bool(low[0] <= centred[0] <= high[0])

        return measure

    def calibrated(rng: np.random.Generator, n: int) -> bool:
        logits = 1.5 * rng.normal(size=n)
        gaps = np.where(rng.random(n) < 1 / (1 + np.exp(-logits)), logits, -logits)
        return expected_calibration_error(gaps) <= calibration_error_by_chance(gaps)

    few = max(trials // 2, 20)
    return [
        ("kappa, each right on .9", over_sizes(of_kappa(0.9, 0.5), few)),
        ("kappa, .9, one label for .9", over_sizes(of_kappa(0.9, 0.9), few)),
        ("kappa, each right on .99", over_sizes(of_kappa(0.99, 0.5), few)),
        ("alpha of three, .9", over_sizes(of_alpha(0.9, 0.5), few)),
        ("strengths of three alike, n of each two", over_sizes(of_strengths((0, 0, 0)), few)),
        ("strengths 0, 1, 2", over_sizes(of_strengths((0, 1, 2)), few)),
        ("strengths 0, 0, 4", over_sizes(of_strengths((0, 0, 4)), few)),
        ("`ece` below `ece_by_chance`, calibrated", over_sizes(calibrated, few)),
    ]


PARTS = {
    "tests": tests,
    "means": means,
    "wins": wins,
    "corpus": corpus,
    "agreement": agreement,
    "seeds": seeds,
}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.statistics", description=__doc__)
    parser.add_argument("--trials", type=int, default=1000, help="of each figure (1000)")
    parser.add_argument("--only", choices=PARTS, help="one part")
    return parser.parse_args()


if __name__ == "__main__":
    main()
