"""Type I errors and coverage, in the fast form of ``python -m benchmarks.statistics``.

Bounds are .05 and .95 with three standard errors of the trials; seeds are fixed by the sizes.
"""

from __future__ import annotations

import numpy as np
import pytest

from align.base.intervals import mean_ci95
from align.evaluation.compare import compare_statistics, compare_values
from benchmarks.statistics import (
    Sampler,
    binary,
    bleu_counts,
    cached_share_ci95,
    covers,
    mostly_equal,
    normal,
    over_sizes,
    skewed,
    trinomial,
)

TRIALS = 200
THREE_ERRORS = 3 * (0.05 * 0.95 / TRIALS) ** 0.5


def differs(draw: Sampler, rng: np.random.Generator, n: int) -> bool:
    found = compare_values(
        ("a", draw(rng, n)), ("b", draw(rng, n)), metric="reward", num_resamples=200
    )
    assert (found.p < 0.05) == found.verdict.startswith(("better", "worse"))
    return found.p < 0.05


@pytest.mark.parametrize(
    "draw",
    [normal, skewed, binary(0.5), binary(0.98), trinomial(0.25, 0.25), mostly_equal],
    ids=["normal", "skewed", "even", "rare", "ties", "equal"],
)
def test_no_size_and_no_tie_makes_a_difference(draw: Sampler) -> None:
    found = over_sizes(lambda rng, n: differs(draw, rng, n), TRIALS, (3, 8, 20))
    assert all(share is None or share <= 0.05 + THREE_ERRORS for share in found)
    assert found[0] == 0  # of three prompts nothing can be said


@pytest.mark.parametrize("share_differing", [1.0, 0.1])
def test_no_bleu_of_equal_systems_differs(share_differing: float) -> None:
    def measure(rng: np.random.Generator, n: int) -> bool:
        a = bleu_counts(rng, n)
        b = np.where(rng.random((n, 1)) < share_differing, bleu_counts(rng, n), a)
        b[:, 1] = a[:, 1]
        return compare_statistics(("a", a), ("b", b), metric="bleu", num_resamples=100).p < 0.05

    (few, many) = (x for x in over_sizes(measure, 100, (5, 20)) if x is not None)
    assert few == 0
    assert many <= 0.05 + 3 * (0.05 * 0.95 / 100) ** 0.5


@pytest.mark.parametrize(
    ("wins", "losses"),
    [(0.5, 0.5), (0.8, 0.2), (0.95, 0.05), (0.4, 0.4), (0.05, 0.05), (0.1, 0.01)],
)
def test_intervals_of_shares_cover(wins: float, losses: float) -> None:
    draw, truth = trinomial(wins, losses), wins + (1 - wins - losses) / 2
    found = over_sizes(
        lambda rng, n: covers(cached_share_ci95(draw(rng, n)), truth), TRIALS, (3, 8, 20, 100)
    )
    # the least of Wilson's coverage over all shares is .85 (.8 at n = 3)
    assert min(x for x in found if x is not None) > 0.85


def test_a_bootstrap_would_not_cover_three_wins() -> None:
    """The gate rejects: percentiles of resampled shares hold .8 in half of the trials only."""

    def percentile(rng: np.random.Generator, n: int) -> bool:
        shares = binary(0.8)(rng, n)
        resampled = shares[rng.integers(n, size=(200, n))].mean(1)
        low, high = np.percentile(resampled, [2.5, 97.5])
        return bool(low <= 0.8 <= high)

    assert (over_sizes(percentile, TRIALS, (3,))[0] or 0) < 0.6


@pytest.mark.parametrize(
    ("draw", "least"), [(normal, 0.95 - THREE_ERRORS), (skewed, 0.75), (mostly_equal, 0.85)]
)
def test_intervals_of_means_cover(draw: Sampler, least: float) -> None:
    found = over_sizes(
        lambda rng, n: covers(mean_ci95(draw(rng, n))[1], 0.0), TRIALS, (3, 8, 20, 100)
    )
    assert min(x for x in found if x is not None) >= least
