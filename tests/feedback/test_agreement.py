"""Agreement against published examples, reliability against simulated annotators."""

from __future__ import annotations

import math

import numpy as np
import pytest

from align.feedback.agreement import (
    alpha_ci95,
    cohen_kappa,
    kappa_ci95,
    krippendorff_alpha,
    reliability,
)
from align.feedback.ranking import Comparison, elo_intervals


def test_cohens_kappa_of_a_two_by_two_table() -> None:
    """20 both yes, 5 and 10 apart, 15 both no: p_o .7, p_e .5 * .6 + .5 * .4 = .5, kappa .4."""
    table = [("y", "y")] * 20 + [("y", "n")] * 5 + [("n", "y")] * 10 + [("n", "n")] * 15
    assert cohen_kappa(*zip(*table, strict=True)) == pytest.approx(0.4)


def test_cohens_kappa_ends() -> None:
    assert cohen_kappa("abab", "abab") == pytest.approx(1)
    assert cohen_kappa("aabb", "abab") == pytest.approx(0)
    assert cohen_kappa("ab", "ba") == pytest.approx(-1)
    assert math.isnan(cohen_kappa("aa", "aa"))
    assert math.isnan(cohen_kappa("", ""))


def test_krippendorffs_alpha_of_a_published_table() -> None:
    """Three coders, fifteen units, missing values: nominal alpha .691 (Krippendorff 2004)."""
    a, b, c = "*****34121133*3", "1*213343*******", "**21344*21133*4"
    units = [[x for x in unit if x != "*"] for unit in zip(a, b, c, strict=True)]
    assert krippendorff_alpha(units) == pytest.approx(0.691, abs=5e-4)


def test_krippendorffs_alpha_ends() -> None:
    assert krippendorff_alpha(["aa", "bb", "a"]) == pytest.approx(1)
    assert math.isnan(krippendorff_alpha(["aa", "aa"]))
    assert krippendorff_alpha(["ab", "ba"]) < 0
    rng = np.random.default_rng(0)
    noise = [list(rng.choice(["a", "b", "tie"], size=3)) for _ in range(3000)]
    assert abs(krippendorff_alpha(noise)) < 0.03


def test_reliability_tells_a_sharp_annotator_a_coin_and_a_contrary_one() -> None:
    rng = np.random.default_rng(0)
    truth = np.array([1.0, 0.5, 0.0, -0.5, -1.0])
    slopes = {"good": 1.0, "also good": 1.0, "sharp": 3.0, "coin": 0.0, "contrary": -1.0}

    def judge(slope: float) -> list[Comparison]:
        found = []
        for _ in range(400):
            i, j = rng.choice(5, size=2, replace=False)
            p = 1 / (1 + np.exp(-slope * (truth[i] - truth[j])))
            found.append((int(i), int(j), float(rng.random() < p)))
        return found

    found = reliability({name: judge(slope) for name, slope in slopes.items()}, 5)
    order = sorted(found, key=lambda name: found[name][0])
    assert order[:2] == ["contrary", "coin"]
    assert order[-1] == "sharp"
    slope, error = found["coin"]
    assert abs(slope) < 3 * error
    assert found["contrary"][0] < -3 * found["contrary"][1]


def test_reliability_without_others_or_without_decisions_is_unknown() -> None:
    assert math.isnan(reliability({"alone": [(0, 1, 1.0)]}, 2)["alone"][0])
    found = reliability({"a": [(0, 1, 1.0)], "ties": [(0, 1, 0.5)]}, 2)
    assert math.isnan(found["ties"][0])
    apart = reliability({"a": [(0, 1, 1.0)] * 3, "b": [(2, 3, 1.0)] * 3}, 4)  # no item in common
    assert all(math.isnan(slope) for slope, _ in apart.values())


def test_two_that_always_agree_are_not_certain_to() -> None:
    # chance .5, Wilson's lower end of 4 of 4 is 4 / 7.8415
    assert kappa_ci95("abab", "abab") == pytest.approx((2 * 4 / 7.841459 - 1, 1), abs=1e-6)
    assert kappa_ci95("aa", "aa") is None
    units = [("a", "a"), ("b", "b"), ("a", "a"), ("b", "b")]
    low, high = alpha_ci95(units) or (0, 0)
    # expected disagreement of 4 a and 4 b: 32 of 56 ordered pairs
    assert (low, high) == pytest.approx((1 - (1 - 4 / 7.841459) * 56 / 32, 1), abs=1e-6)
    assert alpha_ci95([("a", "a"), ("a", "a")]) is None
    assert alpha_ci95([("a",), ("b",)]) is None


def test_alpha_lies_in_its_interval_whatever_the_units_sizes() -> None:
    units = [("a", "a", "b"), ("b", "b"), ("a", "c", "a", "a"), ("c", "c"), ("b",), ("a", "b")]
    low, high = alpha_ci95(units) or (0, 0)
    assert low < krippendorff_alpha(units) < high


def test_one_comparison_has_no_elo_interval() -> None:
    mean, low, high = elo_intervals([(0, 1, 1.0)], 2)
    assert mean[0] > mean[1]
    assert math.isnan(low[0])
    assert math.isnan(high[1])
