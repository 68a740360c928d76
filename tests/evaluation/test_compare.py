from __future__ import annotations

import itertools

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import PairedTest

from align.base.intervals import mean_ci95, student_t_p, student_t_quantile
from align.evaluation.bleu import corpus_bleu, corpus_statistics, reference_streams
from align.evaluation.compare import (
    compare_corpus,
    compare_statistics,
    compare_values,
)

METRICS = {"bleu": BLEU, "chrf": CHRF}


@pytest.mark.parametrize("metric", ["bleu", "chrf"])
@pytest.mark.parametrize("other", ["fair", "poor"])
def test_scores_and_p_equal_sacrebleus_where_no_swap_ties(
    metric: str, other: str, systems: dict, references: list
) -> None:
    streams = reference_streams(systems["good"], references)
    named = [("good", systems["good"]), (other, systems[other])]
    _, results = PairedTest(named, {metric: METRICS[metric]()}, streams, "ar", 300)()
    name = "BLEU" if metric == "bleu" else "chrF2"
    good, theirs = results[name]
    ours = compare_corpus(*named, references, metric=metric, num_resamples=300)
    assert ours.p == theirs.p_value
    assert ours.difference == pytest.approx(good.score - theirs.score, abs=1e-9)
    assert ours.ci95[0] < ours.difference < ours.ci95[1]


@pytest.mark.parametrize("metric", ["bleu", "chrf", "ter"])
@pytest.mark.parametrize("worse", ["a", "b"])
def test_one_answer_of_a_hundred_is_no_evidence(metric: str, worse: str) -> None:
    # every swap leaves the difference as large: p = 1, where sacreBLEU's count gives 1 / 1001
    good = [f"w{i} w{i + 1} w{i + 2} w{i + 3} w{i + 4} end ." for i in range(100)]
    bad = [*good[:50], "something else entirely stands here instead .", *good[51:]]
    texts = {"a": bad, "b": good} if worse == "a" else {"a": good, "b": bad}
    found = compare_corpus(
        ("a", texts["a"]), ("b", texts["b"]), [[text] for text in good], metric=metric
    )
    assert found.difference != 0
    assert found.p == 1.0
    assert (found.num_prompts, found.num_differing) == (100, 1)
    assert found.verdict.startswith("too few prompts to tell: 1 of 100 differ, 6 have to; about ")
    assert found.ci95[0] <= 0 <= found.ci95[1]


@pytest.mark.parametrize(("differing", "p"), [(0, 1), (1, 1), (2, 1 / 2), (5, 1 / 16), (6, 1 / 32)])
def test_few_differences_are_counted_exactly(differing: int, p: float) -> None:
    a, b = np.zeros(40), np.zeros(40)
    a[:differing] = 0.3
    found = compare_values(("a", a), ("b", b), metric="reward")
    assert (found.p, found.num_differing, found.test) == (p, differing, "randomization")
    assert found.verdict.startswith(
        "no difference" if not differing else "better" if differing == 6 else "too few prompts"
    )


def test_one_prompt_tells_nothing() -> None:
    found = compare_values(("a", [2.0]), ("b", [1.0]), metric="reward")
    assert (found.p, found.ci95, found.num_prompts_needed) == (1.0, None, None)
    assert found.verdict == "too few prompts to tell: 1 of 1 differ, 6 have to"
    seeds = compare_values(("a", [[2.0], [2.1]]), ("b", [[1.0], [1.1]]), metric="reward")
    assert (seeds.p, seeds.ci95) == (1.0, None)
    assert seeds.verdict.startswith("too few prompts to tell")


def test_equal_differences_have_no_interval_and_shares_have_one() -> None:
    # 3 rewards of 10 against 0: their spread is unknown, not 0
    assert compare_values(("a", [10.0] * 3), ("b", [0.0] * 3), metric="reward").ci95 is None
    # 3 of 3 right against 3 of 3 wrong: Wilson's [.4385, 1] of the share won, twice and minus 1
    low, high = compare_values(("a", [1.0] * 3), ("b", [0.0] * 3), metric="reward").ci95 or (0, 0)
    assert (low, high) == (pytest.approx(-0.123, abs=1e-3), pytest.approx(1.0))


def test_few_resamples_are_said_to_be_too_few() -> None:
    rng = np.random.default_rng(0)
    found = compare_values(
        ("a", 9 + rng.normal(size=50)), ("b", np.zeros(50)), metric="r", num_resamples=15
    )
    assert found.p == 1 / 16
    assert found.verdict == "too few resamples to tell: set num_resamples to 1000"


def test_rounding_is_no_difference_and_hides_none() -> None:
    # .1 + .2 - .3 is 6e-17, not 0
    found = compare_values(("a", [0.1 + 0.2, 1.0]), ("b", [0.3, 1.0]), metric="reward")
    assert found.difference == pytest.approx(0, abs=1e-16)
    tiny = compare_values(("a", 1e-7 * np.arange(1, 13)), ("b", np.zeros(12)), metric="reward")
    assert tiny.verdict.startswith("better")


def test_worse_system_is_found_and_equal_ones_are_not(systems: dict, references: list) -> None:
    good = ("good", systems["good"])
    worse = compare_corpus(good, ("poor", systems["poor"]), references)
    assert worse.p < 0.01
    assert worse.ci95[0] > 0
    assert (worse.a, worse.b, worse.metric) == ("good", "poor", "bleu")
    expected = corpus_bleu(systems["good"], references).score
    expected -= corpus_bleu(systems["poor"], references).score
    assert worse.difference == pytest.approx(expected)
    assert compare_corpus(good, ("fair", systems["fair"]), references).p > 0.05


def test_a_system_does_not_differ_from_itself(systems: dict, references: list) -> None:
    same = compare_corpus(
        ("a", systems["good"]), ("b", systems["good"]), references, num_resamples=100
    )
    assert (same.difference, same.p, same.ci95) == (0.0, 1.0, (0.0, 0.0))
    values = compare_values(("a", [1.0, 2.0]), ("b", [1.0, 2.0]), metric="reward")
    assert (values.difference, values.p) == (0.0, 1.0)


@pytest.mark.parametrize("metric", ["bleu", "chrf"])
def test_copies_of_one_seed_change_no_p(metric: str, systems: dict, references: list) -> None:
    good, fair = (
        corpus_statistics(METRICS[metric](), systems[name], references) for name in ("good", "fair")
    )
    options = {"metric": metric, "num_resamples": 300}
    one = compare_statistics(("good", good), ("fair", fair), **options)
    for copies in (3, 10):
        seeds = np.stack([good] * copies)
        several = compare_statistics(("good", seeds), ("fair", fair), **options)
        assert several.difference == pytest.approx(one.difference)
        # seeds that do not vary leave the prompts' error, with the seeds' degrees of freedom
        assert several.test == "seeds"
        assert several.p >= one.p - 0.1


def wrongly_found(num_a: int, num_b: int, *, seed_std: float, trials: int = 200) -> float:
    """The share of verdicts that name a difference, where every training seed is as good."""
    rng = np.random.default_rng(8)

    def trained(num_seeds: int, prompts: np.ndarray) -> np.ndarray:
        moved = seed_std * rng.normal(size=(num_seeds, 1))
        return prompts + moved + 0.5 * rng.normal(size=(num_seeds, len(prompts)))

    found = 0
    for trial in range(trials):
        prompts = rng.normal(size=64)
        a, b = trained(num_a, prompts), trained(num_b, prompts)
        test = compare_values(("a", a), ("b", b), metric="reward", num_resamples=2, seed=trial)
        found += test.verdict.startswith(("better", "worse"))
        assert test.verdict.startswith(("better", "worse")) == (
            not test.ci95[0] <= 0 <= test.ci95[1]
        )
    return found / trials


@pytest.mark.parametrize(("num_a", "num_b"), [(5, 1), (5, 5), (3, 1), (2, 5)])
@pytest.mark.parametrize("seed_std", [1.0, 0.1])
def test_seeds_alone_make_no_verdict(num_a: int, num_b: int, seed_std: float) -> None:
    # .05 and three standard errors of 200 trials
    assert wrongly_found(num_a, num_b, seed_std=seed_std) <= 0.05 + 3 * (0.05 * 0.95 / 200) ** 0.5


def test_five_seeds_find_what_is_true_of_all_and_are_exact() -> None:
    # five against one is exact where the prompts' error is small
    assert wrongly_found(5, 1, seed_std=1.0, trials=500) == pytest.approx(0.05, abs=0.03)
    rng = np.random.default_rng(9)
    a, b = rng.normal(size=(5, 1)) + np.zeros(64) + 8, rng.normal(size=(5, 64))
    found = compare_values(("a", a), ("b", b), metric="reward")
    assert found.verdict.startswith("better")
    assert (found.num_seeds, found.num_prompts_needed) == ((5, 5), None)


def test_literal_t_over_seeds() -> None:
    # means 3, 5, 7 against 1, 2, 3; variances 4/3 + 1/3; Welch's df (5/3)^2 / (16/9/2 + 1/9/2)
    a, b = np.repeat([[3.0], [5.0], [7.0]], 4, 1), np.repeat([[1.0], [2.0], [3.0]], 4, 1)
    found = compare_values(("a", a), ("b", b), metric="reward", num_resamples=50)
    t, df = 3 / (5 / 3) ** 0.5, 50 / 17
    assert found.p == pytest.approx(student_t_p(t, df))
    assert found.p == pytest.approx(0.1046, abs=5e-4)
    assert found.verdict == (
        f"no difference that 3 against 3 seeds can show, p = {found.p:.3f}; "
        "more seeds, not prompts, would tell"
    ).replace("0.", ".")
    # one against three: as variable as the other side, 4 (1 + 1/3), two degrees of freedom
    single = compare_values(("a", a), ("b", b[:1]), metric="reward", num_resamples=50)
    assert single.p == pytest.approx(student_t_p(4 / (16 / 3) ** 0.5, 2))


@pytest.mark.parametrize(
    # two-sided tables; df 1: 1 - 2 atan(t) / pi
    ("df", "t", "p"),
    [
        (1, 1.0, 0.5),
        (2, 4.30265, 0.05),
        (4, 2.77645, 0.05),
        (10, 3.16927, 0.01),
        (60, 2.0003, 0.05),
    ],
)
def test_students_t_is_the_tables(df: int, t: float, p: float) -> None:
    assert student_t_p(t, df) == pytest.approx(p, rel=1e-4)
    assert student_t_p(-t, df) == student_t_p(t, df)
    assert student_t_quantile(1 - p / 2, df) == pytest.approx(t, rel=1e-4)
    assert student_t_p(0.0, df) == pytest.approx(1)


def test_systems_of_unequal_length_are_refused(systems: dict, references: list) -> None:
    with pytest.raises(ValueError, match="61 outputs, 60 references"):
        compare_corpus(("a", systems["good"]), ("b", [*systems["good"], "x"]), references)
    with pytest.raises(ValueError, match="shapes"):
        compare_values(("a", [1.0, 2.0]), ("b", [1.0, 2.0, 3.0]), metric="reward")


def test_same_seed_same_result(systems: dict, references: list) -> None:
    named = (("good", systems["good"]), ("fair", systems["fair"]))
    runs = [compare_corpus(*named, references, num_resamples=100, seed=seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_randomization_approaches_the_exact_p() -> None:
    # all 2^8 ways of swapping 8 pairs, counted
    a = [1.2, 0.4, 2.2, 0.9, 1.4, 0.2, 1.9, 0.8]
    b = [0.7, 0.6, 1.1, 0.8, 0.5, 0.4, 1.0, 0.9]
    d = np.subtract(a, b)
    means = [abs(np.mean(d * signs)) for signs in itertools.product((1, -1), repeat=8)]
    exact = np.mean([m >= abs(d.mean()) - 1e-12 for m in means])
    got = compare_values(("a", a), ("b", b), metric="reward", num_resamples=20000)
    assert 0.03 < exact < 0.3
    # three standard errors
    assert got.p == pytest.approx(exact, abs=3 * (exact * (1 - exact) / 20000) ** 0.5)


def test_under_the_null_p_is_uniform() -> None:
    rng = np.random.default_rng(3)
    p = np.array(
        [
            compare_values(
                ("a", rng.normal(size=60)),
                ("b", rng.normal(size=60)),
                metric="reward",
                num_resamples=200,
                seed=trial,
            ).p
            for trial in range(600)
        ]
    )
    # shares below .05, .2, .5 within three standard errors (.027, .049, .061)
    for level in (0.05, 0.2, 0.5):
        allowed = 3 * (level * (1 - level) / 600) ** 0.5
        assert (p <= level).mean() == pytest.approx(level, abs=allowed)


def test_a_real_difference_is_found() -> None:
    rng = np.random.default_rng(4)
    difficulty = 5 * rng.normal(size=200)
    a, b = difficulty + 0.3 + rng.normal(size=200), difficulty + rng.normal(size=200)
    found = compare_values(("a", a), ("b", b), metric="reward")
    assert found.p < 0.05
    assert found.ci95[0] > 0
    # unpaired, the prompts' difficulty would drown it
    shuffled = compare_values(("a", a), ("b", rng.permutation(b)), metric="reward")
    assert shuffled.p > 0.05


def test_intervals_cover_the_truth() -> None:
    rng = np.random.default_rng(5)
    hits = []
    for _ in range(500):
        _, interval = mean_ci95(rng.normal(loc=2.0, size=8))
        assert interval is not None
        hits.append(interval[0] <= 2.0 <= interval[1])
    assert np.mean(hits) == pytest.approx(0.95, abs=0.03)


def test_literal_interval() -> None:
    # mean 3, sd sqrt(2.5), standard error sqrt(.5), t(4) = 2.776: 3 +- 1.963
    mean, interval = mean_ci95([1, 2, 3, 4, 5])
    assert mean == 3
    assert interval == pytest.approx((3 - 1.963, 3 + 1.963), abs=0.006)
    # t(1) = 12.706, standard error 1
    assert mean_ci95([0, 2])[1] == pytest.approx((1 - 12.706, 1 + 12.706), abs=1e-3)


def test_interval_of_one_value_is_unknown() -> None:
    assert mean_ci95([4.0]) == (4.0, None)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_values_must_be_finite_numbers(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite numbers"):
        mean_ci95(values)


def test_few_prompts_cost_as_much_as_few_seeds() -> None:
    # ten seeds each that agree on three prompts: the prompts' three differences are the sample
    differences = np.array([1.0, 2.0, 3.0])
    a, b = np.tile(differences, (10, 1)), np.zeros((10, 3))
    a += 1e-6 * np.arange(10)[:, None]
    found = compare_values(("a", a), ("b", b), metric="reward")
    assert found.test == "seeds"
    # t = 2 / (1 / sqrt 3) of 2 degrees of freedom, not of 18 (p = .003)
    assert found.p == pytest.approx(student_t_p(2 * 3**0.5, 2), rel=1e-3)


def test_lengths_of_one_are_no_shares() -> None:
    assert mean_ci95([1.0, 1.0, 1.0], "length") == (1.0, None)
    assert compare_values(("a", [1.0] * 3), ("b", [1.0] * 3), metric="length").ci95 is None
