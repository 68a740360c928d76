from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from align.base.intervals import proportion_ci95
from align.evaluation import agreement
from align.evaluation.compare import compare_values
from align.evaluation.frontier import turning_point


def test_accuracy_counts_a_tie_as_half() -> None:
    found = agreement.accuracy(np.array([1.0, -1.0, 0.0, 2.0]))
    assert found["accuracy"] == pytest.approx(2.5 / 4)
    low, high = found["accuracy_ci95"]
    assert 0 < low < 0.625 < high < 1


def test_wilson() -> None:
    # 8 of 10: centre (.8 + 1.9207/10) / 1.38415, known interval .490 .. .943
    assert proportion_ci95(0.8, 10) == pytest.approx((0.490, 0.943), abs=1e-3)
    assert proportion_ci95(1.0, 20)[1] == pytest.approx(1)


def test_by_margin() -> None:
    margins, gaps = np.array([3.0, 1.0, 2.0, 4.0]), np.array([1.0, -1.0, -1.0, 1.0])
    small, large = agreement.accuracy_by_margin(gaps, margins, parts=2)
    assert (small["margin_from"], small["margin_to"], small["accuracy"]) == (1, 2, 0)
    assert (large["margin_from"], large["margin_to"], large["accuracy"]) == (3, 4, 1)


def test_literal_calibration_error() -> None:
    # confidence sigmoid(1) = .7311 on all four, three right: |.75 - .7311|
    gaps = np.array([1.0, 1.0, 1.0, -1.0])
    (only,) = agreement.reliability(gaps)
    assert only == {"confidence": pytest.approx(0.7311, abs=1e-4), "right": 0.75, "pairs": 4}
    assert agreement.expected_calibration_error(gaps) == pytest.approx(0.0189, abs=1e-4)
    # the temperature that makes sigmoid(1 / T) = .75: T = 1 / log 3
    assert agreement.best_temperature(gaps) == pytest.approx(1 / math.log(3), abs=1e-4)


def test_a_calibrated_model_is_found_calibrated_and_an_overconfident_one_mended() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=20_000) * 1.5
    labels = rng.random(20_000) < 1 / (1 + np.exp(-logits))
    gaps = np.where(labels, logits, -logits)
    assert agreement.expected_calibration_error(gaps) < 0.01
    assert agreement.best_temperature(gaps) == pytest.approx(1, abs=0.05)
    found = agreement.calibration(3 * gaps)
    assert found["ece"] > 0.05
    assert found["temperature"] == pytest.approx(3, abs=0.15)
    assert found["ece_at_temperature"] < 0.01


def test_rank_correlations() -> None:
    x = [1, 2, 3, 4, 5]
    assert agreement.spearman(x, [2, 1, 4, 3, 5]) == pytest.approx(0.8)  # 1 - 6 * 4 / 120
    assert agreement.kendall(x, [2, 1, 4, 3, 5]) == pytest.approx(0.6)  # (8 - 2) / 10
    # ties: tau-b of (1,2,2,3) and (1,2,3,3): 4 concordant, sqrt(5 * 5)
    assert agreement.kendall([1, 2, 2, 3], [1, 2, 3, 3]) == pytest.approx(4 / 5)
    assert agreement.spearman([1, 1, 1], x[:3]) is None
    assert agreement.kendall([1, 1, 1], x[:3]) is None


def test_length_bias_of_a_ruler() -> None:
    lengths = np.array([5.0, -3.0, 8.0, -1.0])
    found = agreement.length_bias(lengths / 2, lengths)
    assert found["longer_wins"] == 0.5
    assert found["length_correlation"] == pytest.approx(1)
    assert (found["accuracy_longer_chosen"], found["accuracy_shorter_chosen"]) == (1, 0)


def test_best_of_n_is_the_mean_over_all_subsets() -> None:
    rng = np.random.default_rng(1)
    proxy, gold = rng.normal(size=(7, 5)), rng.normal(size=(7, 5))
    expected = []
    for n in range(1, 6):
        picks = [
            gold[row, max(subset, key=lambda i, r=row: proxy[r, i])]
            for row in range(7)
            for subset in itertools.combinations(range(5), n)
        ]
        expected.append(np.mean(picks))
    assert agreement.best_of_n(proxy, gold) == pytest.approx(expected)
    assert agreement.best_of_n_kl(1) == 0
    assert agreement.best_of_n_kl(4) == pytest.approx(math.log(4) - 0.75)


def test_turning_point() -> None:
    # d - d^2 / 4 tops at d = 2, KL 4, score 1
    kl = np.array([0.0, 1.0, 2.25, 4.0, 6.25, 9.0])
    gold = np.sqrt(kl) - kl / 4
    assert turning_point(kl, gold) == pytest.approx((4, 1))
    assert turning_point(kl[:3], gold[:3]) is None  # too few
    assert turning_point(kl, np.sqrt(kl)) is None  # never turns
    assert turning_point(kl[:4], (np.sqrt(kl) - kl / 8)[:4]) is None  # still rising


def test_seeds_widen_the_interval_and_change_no_mean() -> None:
    rng = np.random.default_rng(2)
    base = rng.normal(size=100)
    one = np.stack([base + shift for shift in (0.0, 1.0, -1.0)])
    pooled = compare_values(("a", one + 0.5), ("b", one), metric="reward")
    single = compare_values(("a", base + 0.5), ("b", base), metric="reward")
    assert pooled.difference == pytest.approx(single.difference) == pytest.approx(0.5)
    # the seeds differ by 1, which three of them average to nothing, and the interval knows
    assert pooled.ci95[0] < 0 < pooled.ci95[1]
    assert single.ci95[0] > 0


def kendall_of_all_pairs(a: np.ndarray, b: np.ndarray) -> float | None:
    above = np.triu_indices(len(a), k=1)
    of_a, of_b = (np.sign(v[:, None] - v[None, :])[above] for v in (a, b))
    untied = np.abs(of_a).sum() * np.abs(of_b).sum()
    return float((of_a * of_b).sum() / untied**0.5) if untied else None


@pytest.mark.parametrize("num_values", [2, 3, 1000])  # many ties, and none
@pytest.mark.parametrize("size", [0, 1, 2, 3, 7, 64, 65, 301])
def test_kendall_by_merging_is_kendall_by_counting(size: int, num_values: int) -> None:
    rng = np.random.default_rng(size)
    a = rng.integers(num_values, size=size) / 7
    b = rng.integers(num_values, size=size) / 3 + 0.3 * a
    found, expected = agreement.kendall(a, b), kendall_of_all_pairs(a, b)
    assert found == (None if expected is None else pytest.approx(expected, abs=1e-12))


def test_kendall_of_many_takes_no_square_of_memory() -> None:
    x = np.arange(200_000.0)
    assert agreement.kendall(x, -x) == pytest.approx(-1)


def test_best_of_n_by_a_constant_reward_is_any_of_them() -> None:
    gold = np.array([[1.0, 2.0, 6.0], [0.0, 3.0, 3.0]])
    assert agreement.best_of_n(np.zeros((2, 3)), gold) == pytest.approx([2.5, 2.5, 2.5])
    # two tied on top: the best of three is either, (2 + 6) / 2 = 4
    assert agreement.best_of_n(np.array([[0.0, 1.0, 1.0]]), gold[:1])[2] == pytest.approx(4)


def test_chance_alone_makes_a_calibration_error() -> None:
    rng = np.random.default_rng(3)
    logits = 1.5 * rng.normal(size=40)
    gaps = np.where(rng.random(40) < 1 / (1 + np.exp(-logits)), logits, -logits)
    found = agreement.calibration(gaps)
    assert 0.05 < found["ece"] < found["ece_by_chance"] < 0.3
    many = np.tile(np.abs(logits), 500)
    assert agreement.calibration_error_by_chance(many) < 0.02
    assert agreement.calibration(3 * many)["ece"] > agreement.calibration_error_by_chance(3 * many)


def test_better_than_length_is_a_paired_test() -> None:
    lengths = np.array([5.0, -3.0, 8.0, -1.0] * 10)
    # right wherever length is, and on half of the rest: 10 of 40 pairs differ, all one way
    gaps = np.where((lengths > 0) | (lengths == -3.0), 1.0, -1.0)
    found = agreement.above_longer(gaps, lengths)
    assert found["difference"] == pytest.approx(0.25)
    assert found["p"] < 0.01
    ruler = agreement.above_longer(lengths, lengths)
    assert (ruler["difference"], ruler["p"]) == (0, 1)
    few = agreement.above_longer(gaps[:4], lengths[:4])
    assert few["p"] == 1.0  # one pair differs


def test_accuracy_of_a_constant_reward_is_a_coin() -> None:
    found = agreement.accuracy(np.zeros(30))
    assert found["accuracy"] == 0.5
    low, high = found["accuracy_ci95"]
    assert 0.4 < low < 0.5 < high < 0.6
