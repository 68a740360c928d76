"""Strengths against closed forms, literal numbers and simulated annotators."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.feedback.ranking import (
    Comparison,
    NoMaximum,
    bradley_terry,
    elo,
    elo_intervals,
    plackett_luce,
)


def games(i: int, j: int, *, wins: int, losses: int = 0, ties: int = 0) -> list[Comparison]:
    return [(i, j, 1.0)] * wins + [(i, j, 0.0)] * losses + [(i, j, 0.5)] * ties


def test_two_items_have_the_log_odds_between_them() -> None:
    """3 wins of 4: t_0 - t_1 = log 3, and its variance is 1 / (4 * 3/4 * 1/4) = 4/3."""
    found = bradley_terry(games(0, 1, wins=3, losses=1), 2)
    assert found.values == pytest.approx([math.log(3) / 2, -math.log(3) / 2])
    # each strength is half of the difference
    assert found.errors == pytest.approx([math.sqrt(4 / 3) / 2] * 2)
    assert found.tie is None


def test_ties_of_two_items_have_davidsons_closed_form() -> None:
    """4 wins, 1 loss, 6 ties: odds 4 to 1, and tie / sqrt(win * loss) = exp(e) = 6 / 2 = 3."""
    found = bradley_terry(games(0, 1, wins=4, losses=1, ties=6), 2)
    assert found.values[0] - found.values[1] == pytest.approx(math.log(4))
    assert found.tie == pytest.approx(math.log(3))


def test_three_items_satisfy_the_likelihood_equations() -> None:
    """Zermelo 1929: at the maximum, expected wins equal the wins that happened."""
    comparisons = games(0, 1, wins=7, losses=3) + games(1, 2, wins=6, losses=4)
    comparisons += games(0, 2, wins=8, losses=1)
    t = bradley_terry(comparisons, 3).values
    expected = [0.0] * 3
    for i, j, _ in comparisons:
        p = 1 / (1 + math.exp(t[j] - t[i]))
        expected[i] += p
        expected[j] += 1 - p
    assert expected == pytest.approx([15, 9, 5])
    assert sum(t) == pytest.approx(0)


def test_rankings_of_two_are_bradley_terry() -> None:
    comparisons = games(0, 1, wins=3, losses=1) + games(1, 2, wins=2, losses=2)
    rankings = [(i, j) if outcome else (j, i) for i, j, outcome in comparisons]
    a, b = bradley_terry(comparisons, 3), plackett_luce(rankings, 3)
    assert a.values == pytest.approx(b.values)
    assert a.errors == pytest.approx(b.errors)


def test_plackett_luce_of_one_first_choice_is_its_share() -> None:
    """Each of three is first in 5, 3 and 2 rankings, and the rest is evenly ordered: with equal
    numbers of both orders behind each, the gradient of the strengths is that of the shares."""
    t = plackett_luce([(0, 1, 2), (1, 2, 0), (2, 0, 1)], 3)
    assert t.values == pytest.approx([0, 0, 0], abs=1e-9)
    rankings = [(0, 1, 2)] * 3 + [(1, 0, 2)] * 2 + [(2, 1, 0)] * 2
    t = plackett_luce(rankings, 3).values
    # the likelihood equations: times chosen = sum of probabilities of being chosen
    chosen, expected = np.zeros(3), np.zeros(3)
    for ranking in rankings:
        for k in range(2):
            rest = list(ranking[k:])
            shares = np.exp(t[rest]) / np.exp(t[rest]).sum()
            chosen[ranking[k]] += 1
            expected[rest] += shares
    assert expected == pytest.approx(chosen)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.sampled_from([0.0, 0.5, 1.0]))))
def test_swapping_sides_and_order_change_nothing(raw: list[Comparison]) -> None:
    comparisons = [c for c in raw if c[0] != c[1]]
    if not comparisons:
        return
    swapped = [(j, i, 1 - outcome) for i, j, outcome in reversed(comparisons)]
    a, b = bradley_terry(comparisons, 4, prior=0.5), bradley_terry(swapped, 4, prior=0.5)
    assert a.values == pytest.approx(b.values, abs=1e-6)
    assert a.values.sum() == pytest.approx(0, abs=1e-6)
    assert np.isfinite(a.errors).all()


@pytest.mark.parametrize(
    ("comparisons", "said"),
    [
        (games(0, 1, wins=3) + games(1, 2, wins=1, losses=1), "items 1, 2"),
        (games(0, 1, wins=1, losses=1), "items 2"),
        (games(0, 1, wins=0, ties=3) + games(1, 2, wins=0, ties=1), "all are ties"),
        ([], "no comparison"),
    ],
)
def test_a_likelihood_without_a_maximum_is_refused(comparisons, said: str) -> None:
    with pytest.raises(NoMaximum) as caught:
        bradley_terry(comparisons, 3)
    assert said in str(caught.value)
    if comparisons:  # a prior gives it one
        assert np.isfinite(bradley_terry(comparisons, 3, prior=0.1).values).all()


def test_elo_step_by_step() -> None:
    """Equal: +-8. Then 1008 beats 992: expected 1 / (1 + 10^(-16/400)) = .52301, so +7.6318."""
    assert elo([(0, 1, 1.0)], 2) == pytest.approx([1008, 992])
    assert elo([(0, 1, 1.0)] * 2, 2) == pytest.approx([1015.6318, 984.3682], abs=1e-4)
    assert elo([(0, 1, 0.5)], 2) == pytest.approx([1000, 1000])


TRUE = np.array([0.9, 0.4, 0.0, -0.4, -0.9])


def simulate(rng: np.random.Generator, *, num: int, tie: float, noise: float) -> list[Comparison]:
    """``num`` comparisons by annotators of whom ``noise`` answer by a coin."""
    found = []
    for _ in range(num):
        i, j = rng.choice(len(TRUE), size=2, replace=False)
        weights = np.exp([TRUE[i], TRUE[j], tie + (TRUE[i] + TRUE[j]) / 2])
        shares = weights / weights.sum()
        if rng.random() < noise:
            shares = np.array([0.5, 0.5, 0.0])
        found.append((int(i), int(j), float(rng.choice([1.0, 0.0, 0.5], p=shares))))
    return found


def test_a_known_order_is_recovered_from_noisy_annotators() -> None:
    comparisons = simulate(np.random.default_rng(1), num=1500, tie=-1.0, noise=0.2)
    assert list(np.argsort(-bradley_terry(comparisons, 5).values)) == [0, 1, 2, 3, 4]
    mean, low, high = elo_intervals(comparisons, 5, num_resamples=60)
    assert list(np.argsort(-mean)) == [0, 1, 2, 3, 4]
    assert (low < mean).all()
    assert (mean < high).all()


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """200 data sets x 5 items: 95% intervals; the standard error of the share is about 1%."""
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(200):
        low, high = bradley_terry(simulate(rng, num=150, tie=-0.5, noise=0.0), 5).interval()
        covered += ((low <= TRUE) & (high >= TRUE)).tolist()
    assert 0.925 <= np.mean(covered) <= 0.975, np.mean(covered)


def test_plackett_luce_recovers_strengths_and_covers() -> None:
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(100):
        # the order of exp(t) / exponential variates is a Plackett–Luce ranking
        times = rng.exponential(size=(40, 5)) / np.exp(TRUE)
        found = plackett_luce(np.argsort(times, axis=1).tolist(), 5)
        low, high = found.interval()
        covered += ((low <= TRUE) & (high >= TRUE)).tolist()
    assert found.values == pytest.approx(TRUE, abs=0.6)
    assert 0.92 <= np.mean(covered) <= 0.98, np.mean(covered)
