from __future__ import annotations

import numpy as np
import pytest

from align.base.intervals import (
    mean_ci95,
    percentiles,
    proportion_ci95,
    share_ci95,
)
from align.evaluation.bleu import corpus_ci95


@pytest.mark.parametrize(("wins", "losses"), [(3, 0), (0, 3), (8, 2), (1, 0), (399, 1)])
def test_without_ties_it_is_wilsons(wins: int, losses: int) -> None:
    found = share_ci95([1.0] * wins + [0.0] * losses)
    n = wins + losses
    assert found == pytest.approx(proportion_ci95(wins / n, n), abs=1e-8)


def test_three_of_three_is_no_certainty() -> None:
    # Wilson: lower end n / (n + z^2) = 3 / 6.8415
    assert share_ci95([1, 1, 1]) == pytest.approx((3 / 6.841459, 1))


def test_ties_alone_leave_what_a_few_wins_could_move() -> None:
    # all of n tied: n m' = z^2 (1 - m') for m' = 2 m - 1, so m' = z^2 / (n + z^2)
    gap = 3.841459 / 103.841459 / 2
    assert share_ci95([0.5] * 100) == pytest.approx((0.5 - gap, 0.5 + gap), abs=1e-6)


def test_with_ties_it_is_tangos() -> None:
    # 7 wins, 2 losses, 11 ties: Tango's closed form for p_win - p_loss gives -.04863 .. .50705
    found = share_ci95([1.0] * 7 + [0.0] * 2 + [0.5] * 11)
    assert found == pytest.approx((0.475683, 0.753527), abs=1e-5)


def test_of_many_numbers_in_between_it_is_students() -> None:
    shares = np.clip(np.random.default_rng(0).normal(0.45, 0.1, size=400), 0, 1)
    assert share_ci95(shares) == pytest.approx(mean_ci95(shares)[1], abs=3e-4)


def test_it_is_symmetric_and_weights_are_copies() -> None:
    shares = np.array([0.0, 0.25, 0.5, 1.0, 1.0])
    low, high = share_ci95(shares)
    assert share_ci95(1 - shares) == pytest.approx((1 - high, 1 - low))
    assert share_ci95(shares, [1.0] * 5) == (low, high)
    assert 0 < low < shares.mean() < high < 1


def test_equal_values_of_unknown_range_have_no_interval() -> None:
    assert mean_ci95([10.0, 10.0, 10.0]) == (10.0, None)
    assert mean_ci95([0.0, 0.0, 0.0])[1] == pytest.approx((0, 3.841459 / 6.841459))
    # 0 and 1 are shares: an end may not lie outside
    low, high = mean_ci95([1.0, 1.0, 0.0])[1] or (0, 0)
    assert 0 < low < high < 1


def test_few_rows_have_no_bootstrap() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 9, size=(8, 10))
    assert corpus_ci95(counts[:7], "bleu") is None
    assert corpus_ci95(counts, "bleu") is not None
    assert percentiles(np.full(100, 42.0), 50) is None


def test_percentiles_are_wider_for_few_rows() -> None:
    resampled = np.arange(100_001.0)
    low, high = percentiles(resampled, 8) or (0, 0)
    # Phi(-2.36462 sqrt(8 / 7)) = Phi(-2.52789) = .005738
    assert (low, high) == pytest.approx((573.8, 100_000 - 573.8), abs=1)
    low, _ = percentiles(resampled, 400) or (0, 0)
    assert low == pytest.approx(2445, abs=10)
