from __future__ import annotations

import numpy as np
import pytest

from align.evaluation.wins import (
    length_controlled_difference,
    length_controlled_win_rate,
    shares_won,
    win_rate,
)


def test_literal_win_rate() -> None:
    shares = shares_won([1.0, 2.0, 0.0, 5.0], [0.0, 2.05, 1.0, 1.0], tie_margin=0.1)
    assert shares.tolist() == [1.0, 0.5, 0.0, 1.0]
    rate = win_rate("a", "b", shares, judge="reward", lengths_a=[1] * 4, lengths_b=[1] * 4)
    assert (rate.wins, rate.ties, rate.losses) == (2, 1, 1)
    assert rate.win_rate == pytest.approx(2.5 / 4)
    assert rate.win_rate_ci95[0] <= rate.win_rate <= rate.win_rate_ci95[1]
    # equal lengths everywhere: nothing to control for
    assert rate.length_controlled_win_rate is None
    with pytest.raises(AttributeError):
        rate.win_rate = 1.0  # type: ignore[misc]


def test_three_of_three_wins_are_no_certainty() -> None:
    rate = win_rate("a", "b", [1.0] * 3, judge="j", lengths_a=[1] * 3, lengths_b=[1] * 3)
    # Wilson's 3 / (3 + 1.96^2); two of eight ways to win and lose three are as far from one half
    assert rate.win_rate_ci95 == pytest.approx((0.4385, 1), abs=1e-4)
    assert rate.win_rate_p == 0.25
    assert rate.win_rate_verdict.startswith("too few prompts to tell: 3 of 3 differ, 6 have to")
    six = win_rate("a", "b", [1.0] * 6, judge="j", lengths_a=[1] * 6, lengths_b=[1] * 6)
    assert (six.win_rate_p, six.win_rate_verdict) == (1 / 32, "better, p = .031")


def test_ties_alone_are_no_difference() -> None:
    rate = win_rate("a", "b", [0.5] * 40, judge="j", lengths_a=range(40), lengths_b=[0] * 40)
    assert (rate.win_rate, rate.win_rate_p, rate.win_rate_verdict) == (0.5, 1.0, "no difference")
    low, high = rate.win_rate_ci95 or (0, 0)
    assert 0.4 < low < 0.5 < high < 0.6


def test_seeds_that_won_each_time_count_as_one() -> None:
    shares = np.ones((2, 8))
    rate = win_rate(
        "a", "b", shares, judge="j", lengths_a=[1] * 8, lengths_b=[1] * 8, num_seeds=(2, 1)
    )
    assert rate.win_rate_p == 2 / 2**8
    assert rate.win_rate_ci95 == pytest.approx((8 / (8 + 3.841459), 1))


def test_lengths_that_explain_every_win_leave_nothing_known() -> None:
    gaps = np.array([5.0, 8.0, 3.0, 9.0, 4.0, 7.0])
    found = length_controlled_win_rate(np.ones(6), gaps)
    assert found is not None
    assert found[1][0] < 0.01
    assert found[1][1] > 0.99


def test_profile_interval_is_likelihoods() -> None:
    # lengths say nothing where every gap has its opposite with the same result: then the profile is
    # that of a share. 6 of 8: 2 (l(.75) - l(q)) = t^2 of 6 degrees of freedom, 5.987
    shares = np.array([1, 1, 1, 1, 1, 1, 0, 0], dtype=float)
    gaps = np.array([10, -10, 10, -10, 10, -10, 10, -10], dtype=float)
    found = length_controlled_win_rate(shares, gaps)
    assert found is not None
    assert found[0] == pytest.approx(0.75, abs=2e-3)
    for end in found[1]:
        deviance = 2 * (6 * np.log(0.75 / end) + 2 * np.log(0.25 / (1 - end)))
        assert deviance == pytest.approx(5.987, abs=0.2)  # the ridge takes .12


def test_constant_rewards_have_no_difference_at_equal_length() -> None:
    assert length_controlled_difference([1.0] * 9, [1.0] * 9, range(9), [0] * 9) is None


def test_a_win_rate_of_one_half_is_no_difference() -> None:
    shares = np.tile([0.0, 1.0], 30)
    rate = win_rate("a", "b", shares, judge="j", lengths_a=range(60), lengths_b=[0] * 60)
    assert rate.win_rate == 0.5
    assert rate.win_rate_p == 1.0
    assert rate.win_rate_verdict == "no difference"


def test_a_reward_that_pays_for_length_alone_has_no_gain_at_equal_length() -> None:
    rng = np.random.default_rng(0)
    lengths_b = rng.integers(20, 80, size=300)
    lengths_a = lengths_b + rng.integers(0, 60, size=300)
    noise = rng.normal(size=(2, 300)) * 0.1
    longer = length_controlled_difference(
        0.01 * lengths_a + noise[0], 0.01 * lengths_b + noise[1], lengths_a, lengths_b
    )
    assert longer is not None
    assert longer.ci95[0] < 0 < longer.ci95[1]
    assert longer.per_100_characters == pytest.approx(1, abs=0.1)
    # and a real gain of .2 stays
    real = length_controlled_difference(
        0.01 * lengths_a + 0.2 + noise[0], 0.01 * lengths_b + noise[1], lengths_a, lengths_b
    )
    assert real is not None
    assert real.difference == pytest.approx(0.2, abs=0.05)
    assert real.ci95[0] > 0


def test_literal_regression() -> None:
    # gaps in score 1, 2, 3, 4.5 over gaps in length 0, 100, 200, 300: slope 1.15, intercept .9
    found = length_controlled_difference([1, 2, 3, 4.5], [0] * 4, [0, 100, 200, 300], [0] * 4)
    assert found is not None
    assert found.difference == pytest.approx(0.9)
    assert found.per_100_characters == pytest.approx(1.15)


def test_length_controlled_win_rate_finds_quality_behind_length() -> None:
    rng = np.random.default_rng(1)
    gaps = rng.normal(40, 60, size=2000)  # a is longer on most prompts
    p = 1 / (1 + np.exp(-(0.5 + 2.0 * np.tanh(gaps / gaps.std()))))
    shares = (rng.random(2000) < p).astype(float)
    found = length_controlled_win_rate(shares, gaps)
    assert found is not None
    truth = 1 / (1 + np.exp(-0.5))
    assert shares.mean() > truth + 0.05
    assert found[0] == pytest.approx(truth, abs=0.03)
    assert found[1][0] < truth < found[1][1]


def test_separable_wins_do_not_run_away() -> None:
    gaps = np.array([-5.0, -3.0, -1.0, 1.0, 3.0, 5.0])
    found = length_controlled_win_rate((gaps > 0).astype(float), gaps)
    assert found is not None
    assert found[0] == pytest.approx(0.5, abs=0.01)
