"""Measure agreement and reliability of annotators: pure maths on labels."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit

from align.base.intervals import Interval, share_ci95
from align.feedback.ranking import Comparison, bradley_terry

PRIOR = 0.1
"""Precision of the prior on the others' strengths, so that a few judgements suffice."""


def cohen_kappa(a: Sequence[Hashable], b: Sequence[Hashable]) -> float:
    """Agreement of two annotators on the same items beyond chance: 1 perfect, 0 chance.

        kappa = (p_observed - p_chance) / (1 - p_chance)

    NaN if both always give the same one label, or without items. Source: Cohen 1960.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} labels of one annotator and {len(b)} of the other")
    n = len(a)
    if n == 0:
        return float("nan")
    observed = sum(x == y for x, y in zip(a, b, strict=True)) / n
    first, second = Counter(a), Counter(b)
    chance = sum(first[label] * second[label] for label in first) / n**2
    return (observed - chance) / (1 - chance) if chance < 1 else float("nan")


def kappa_ci95(a: Sequence[Hashable], b: Sequence[Hashable]) -> Interval | None:
    """95% interval of Cohen's kappa: Wilson's of the observed agreement, with fixed chance.

    None if kappa is undefined. docs/evaluation.md has its coverage.
    """
    kappa = cohen_kappa(a, b)
    agreed = [float(x == y) for x, y in zip(a, b, strict=True)]
    if math.isnan(kappa):
        return None
    first, second = Counter(a), Counter(b)
    chance = sum(first[label] * second[label] for label in first) / len(a) ** 2
    low, high = share_ci95(agreed)
    return (low - chance) / (1 - chance), (high - chance) / (1 - chance)


def alpha_ci95(units: Sequence[Sequence[Hashable]]) -> Interval | None:
    """95% interval of Krippendorff's alpha, like ``kappa_ci95``, from agreement within units.

    A unit's agreement is the share of its pairs of labels that are equal; a unit's weight is its
    number of labels.
    """
    pairable = [unit for unit in units if len(unit) > 1]
    totals = Counter(label for unit in pairable for label in unit)
    n = sum(totals.values())
    expected = n * n - sum(c * c for c in totals.values())
    if not expected:
        return None
    agreed = [
        sum(c * (c - 1) for c in Counter(unit).values()) / (len(unit) * (len(unit) - 1))
        for unit in pairable
    ]
    # alpha = 1 - (1 - agreement) / by_chance, both as shares of pairs of labels
    by_chance = expected / (n * (n - 1))
    low, high = share_ci95(agreed, [float(len(unit)) for unit in pairable])
    return 1 - (1 - low) / by_chance, 1 - (1 - high) / by_chance


def krippendorff_alpha(units: Sequence[Sequence[Hashable]]) -> float:
    """Agreement of any number of annotators on nominal labels; labels may be missing.

        alpha = 1 - D_observed / D_expected

    Args:
        units: Labels of each item; items with fewer than two labels have no effect.

    Returns:
        1 perfect, 0 chance, below 0 systematic disagreement; NaN without two different labels.

    Source: Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability".
    """
    pairable = [list(unit) for unit in units if len(unit) > 1]
    totals: Counter[Hashable] = Counter(label for unit in pairable for label in unit)
    n = sum(totals.values())
    disagreeing = 0.0
    for unit in pairable:
        counts = Counter(unit)
        m = len(unit)
        # ordered pairs of different labels, each unit weighted by its m labels
        disagreeing += (m * m - sum(c * c for c in counts.values())) / (m - 1)
    expected = n * n - sum(c * c for c in totals.values())
    return 1 - (n - 1) * disagreeing / expected if expected else float("nan")


def reliability(
    by_annotator: Mapping[str, Sequence[Comparison]], num_items: int
) -> dict[str, tuple[float, float]]:
    """Compare each annotator with the others' strengths: ``(slope, standard error)``.

    The strengths t come from everybody else's comparisons; the annotator's own, without ties, give

        P(i beats j) = sigmoid(slope * (t_i - t_j))

    1 is as sharp as the others together, 0 is a coin, and below 0 the opposite. NaN if the others,
    or the annotator, have no comparison of these items. Compare Chen et al. 2013 (Crowd-BT), which
    fits all at once.
    """
    found = {}
    for name, own in by_annotator.items():
        others = [c for other, cs in by_annotator.items() if other != name for c in cs]
        decided = [(i, j, outcome) for i, j, outcome in own if outcome != 0.5]
        if not others or not decided:
            found[name] = (float("nan"), float("nan"))
            continue
        strengths = bradley_terry(others, num_items, prior=PRIOR).values
        gaps = np.array([(strengths[i] - strengths[j]) * (2 * o - 1) for i, j, o in decided])
        known = bool(np.any(np.abs(gaps) > 1e-6))  # else the others never saw any of these items
        found[name] = _slope(gaps) if known else (float("nan"), float("nan"))
    return found


def _slope(gaps: np.ndarray) -> tuple[float, float]:
    """Fit a logistic slope and its standard error; a weak prior around 0 keeps it finite."""
    weight = 0.01

    def gradient(slope: float) -> float:
        return float(gaps @ expit(-slope * gaps)) - weight * slope

    far = float(np.abs(gaps).sum()) / weight + 1  # from there on the prior pulls harder
    slope = float(brentq(gradient, -far, far))
    wrong = expit(-slope * gaps)
    information = float((gaps**2) @ (wrong * (1 - wrong))) + weight
    return slope, information**-0.5
