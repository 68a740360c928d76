"""Judge a reward: accuracy, calibration, rank agreement; plain arrays in and out.

A gap is score(chosen) - score(rejected). Bradley-Terry says P(chosen is better) = sigmoid(gap), so
a reward model claims a probability for each pair, which is compared with how often it is right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from align.base.intervals import share_ci95
from align.data.tokens.lengths import longer_wins
from align.evaluation.compare import compare_values

NUM_BINS = 10


def accuracy(gaps: np.ndarray) -> dict[str, Any]:
    """Compute ``pairs``, ``accuracy`` (share of gaps above 0, a tie counts half), and its
    interval.
    """
    right = wins_of(gaps)
    return {
        "pairs": len(gaps),
        "accuracy": float(right.mean()),
        "accuracy_ci95": share_ci95(right),
    }


def wins_of(gaps: np.ndarray) -> np.ndarray:
    """Map gaps to 1 if the first of a pair is ahead, 0 if the second is, 1/2 for a tie."""
    return (gaps > 0) + 0.5 * (gaps == 0)


def above_longer(gaps: np.ndarray, length_gaps: np.ndarray) -> dict[str, Any]:
    """Test the reward's accuracy, paired, against preferring the longer answer on these pairs."""
    found = compare_values(
        ("reward", wins_of(gaps)), ("longer", wins_of(length_gaps)), metric="accuracy"
    )
    return {"difference": found.difference, "p": found.p, "ci95": found.ci95}


def accuracy_by_margin(gaps: np.ndarray, margins: np.ndarray, parts: int = 4) -> list[dict]:
    """Accuracy in parts of equal size, from the smallest to the largest margins of the labels."""
    order = np.argsort(margins, kind="stable")
    found = []
    for rows in np.array_split(order, min(parts, len(order))):
        low, high = float(margins[rows].min()), float(margins[rows].max())
        found.append({"margin_from": low, "margin_to": high, **accuracy(gaps[rows])})
    return found


def calibration(gaps: np.ndarray) -> dict[str, Any]:
    """Reliability diagram, expected calibration error, and the temperature that corrects it.

    ``confidence`` is sigmoid(|gap|): how sure the model is of its preferred answer. ``ece`` is the
    mean over pairs of |share right - mean confidence| of the pair's bin, ten bins of equal width
    over [.5, 1]. ``temperature`` minimises the negative log-likelihood of sigmoid(gap / T): above 1
    the model is too sure of itself. ``ece_by_chance`` is the 95th percentile of the error of a
    calibrated model on as many pairs: with few pairs ``ece`` is never near 0.

    Source: Guo et al. 2017 (arXiv:1706.04599), sections 2 and 4.2. Differs: the temperature is
        fitted on the same pairs, one number on all of them.
    """
    temperature = best_temperature(gaps)
    return {
        "ece": expected_calibration_error(gaps),
        "ece_by_chance": calibration_error_by_chance(gaps),
        "temperature": temperature,
        "ece_at_temperature": expected_calibration_error(gaps / temperature),
        "reliability": reliability(gaps),
    }


def reliability(gaps: np.ndarray) -> list[dict[str, float]]:
    """List mean confidence, share right, and pairs of each non-empty bin of confidence."""
    confidence, right, bins = _confidence(gaps), wins_of(gaps), _bins(gaps)
    return [
        {
            "confidence": float(confidence[bins == b].mean()),
            "right": float(right[bins == b].mean()),
            "pairs": int((bins == b).sum()),
        }
        for b in range(NUM_BINS)
        if (bins == b).any()
    ]


def expected_calibration_error(gaps: np.ndarray) -> float:
    bins = reliability(gaps)
    return sum(b["pairs"] * abs(b["right"] - b["confidence"]) for b in bins) / len(gaps)


def calibration_error_by_chance(gaps: np.ndarray, *, num_draws: int = 200, seed: int = 0) -> float:
    """95th percentile of the error if each pair is right with exactly the claimed probability."""
    confidence = _confidence(gaps)
    in_bin = np.eye(NUM_BINS)[_bins(gaps)]
    right = np.random.default_rng(seed).random((num_draws, len(gaps))) < confidence
    errors = np.abs((right - confidence) @ in_bin).sum(1) / len(gaps)
    return float(np.percentile(errors, 95))


def best_temperature(gaps: np.ndarray) -> float:
    """argmin over T in [1/100, 100] of mean -log sigmoid(gap / T), by search on log T.

    The mean is convex in 1 / T, so it has one valley. If every pair is right (or wrong) there is
    none, and the end of the range is returned.
    """

    from scipy.optimize import minimize_scalar

    def loss(log_t: float) -> float:
        return float(np.logaddexp(0, -gaps / math.exp(log_t)).mean())

    ends = (math.log(1e-2), math.log(1e2))
    found = minimize_scalar(loss, bounds=ends, method="bounded")
    # the search never tries an end itself
    return math.exp(min((float(found.x), *ends), key=loss))


def length_bias(gaps: np.ndarray, length_gaps: np.ndarray) -> dict[str, float | None]:
    """Measure `longer_wins` in characters, and correlations with length.

    ``length_correlation`` is Spearman's between gap in score and gap in length: near 0 is good,
    near 1 means that the reward measures length. ``accuracy_longer_chosen`` and
    ``..._shorter_chosen`` are the reward's accuracy on pairs whose chosen answer is the longer or
    the shorter one.
    """
    longer, shorter = gaps[length_gaps > 0], gaps[length_gaps < 0]
    return {
        "longer_wins": longer_wins(length_gaps),
        "length_correlation": spearman(gaps, length_gaps),
        "accuracy_longer_chosen": float(accuracy(longer)["accuracy"]) if len(longer) else None,
        "accuracy_shorter_chosen": float(accuracy(shorter)["accuracy"]) if len(shorter) else None,
    }


def pearson(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float | None:
    """Pearson's correlation; None if one side does not vary."""
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def spearman(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float | None:
    """Pearson's correlation of the ranks, ties sharing their mean rank."""
    from scipy.stats import rankdata

    return pearson(rankdata(x), rankdata(y))


def kendall(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float | None:
    """Kendall's tau-b: (concordant - discordant) / sqrt(pairs untied in x * pairs untied in y)."""
    from scipy.stats import kendalltau

    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(kendalltau(a, b).statistic)


def best_of_n(proxy: np.ndarray, gold: np.ndarray) -> list[float]:
    """Expected gold score of the best of n by proxy, n = 1 .. k, over ``[prompts, k]`` samples.

    With the k samples of a prompt in the order of their proxy scores, sample i (from 1) is the best
    of n drawn without replacement with probability C(i - 1, n - 1) / C(k, n).

    Source: Nakano et al. 2021, appendix I (arXiv:2112.09332): unbiased, and uses all samples,
        unlike the best of the first n.
    """
    k = proxy.shape[1]
    order = np.argsort(proxy, axis=1, kind="stable")
    # samples with equal proxy scores are equally likely to be picked
    shared = np.array([_mean_of_equal(p, g) for p, g in zip(proxy, gold, strict=True)])
    ranked = np.take_along_axis(shared, order, axis=1).mean(axis=0)
    return [
        float(sum(math.comb(i, n - 1) / math.comb(k, n) * ranked[i] for i in range(n - 1, k)))
        for n in range(1, k + 1)
    ]


def _mean_of_equal(proxy: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """Average each gold score over the samples with the same proxy score."""
    _, group, counts = np.unique(proxy, return_inverse=True, return_counts=True)
    return (np.bincount(group, gold) / counts)[group]


def best_of_n_kl(n: int) -> float:
    """log n - (n - 1) / n nats: bound on best-of-n's KL (Beirami et al. 2024, 2401.01879)."""
    return math.log(n) - (n - 1) / n


def _bins(gaps: np.ndarray) -> np.ndarray:
    return np.minimum(((_confidence(gaps) - 0.5) * 2 * NUM_BINS).astype(int), NUM_BINS - 1)


def _confidence(gaps: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.abs(gaps)))
