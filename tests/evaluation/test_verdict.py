from __future__ import annotations

import numpy as np
import pytest

from align.evaluation.compare import compare_corpus, compare_values
from align.evaluation.metrics import METRICS
from align.evaluation.verdict import (
    p_in_words,
    prompts_needed,
    rounded,
    short_verdict,
    verdict,
)


def test_prompts_needed_is_the_textbook_formula() -> None:
    # (1.959964 + 0.841621)^2 (1 / 0.2)^2 = 196.2
    assert prompts_needed(0.2, 1.0) == 197
    assert prompts_needed(-0.2, 1.0) == 197
    assert prompts_needed(0.0, 1.0) is None


def test_that_many_prompts_have_power_80() -> None:
    needed = prompts_needed(0.3, 1.0)
    assert needed is not None
    rng = np.random.default_rng(0)
    found = [
        compare_values(
            ("a", 0.3 + rng.normal(size=needed)),
            ("b", np.zeros(needed)),
            metric="reward",
            num_resamples=200,
            seed=seed,
        ).p
        < 0.05
        for seed in range(300)
    ]
    assert np.mean(found) == pytest.approx(0.8, abs=0.07)


@pytest.mark.parametrize(
    ("metric", "difference", "p", "needed", "words"),
    [
        ("reward", 0.1, 0.0031, 90, "better, p = .003"),
        ("reward", -0.1, 0.0031, 90, "worse, p = .003"),
        ("ter", -3.0, 0.0002, 90, "better, p < .001"),
        ("length", 3.0, 0.01, 90, "more, p = .010"),
        ("toxicity", 0.2, 0.01, 90, "more, p = .010"),  # a user's own
        ("toxicity", -0.2, 0.01, 90, "less, p = .010"),
        (
            "reward",
            0.1,
            0.3,
            1413,
            "no difference that 200 prompts can show; about 1,400 would be needed",
        ),
        (
            "bleu",
            1e-4,
            0.9,
            2_000_000,
            "no difference that 200 prompts can show, nor would 1,000,000",
        ),
        ("reward", 0.1, 0.06, 180, "no difference that 200 prompts can show, p = .060"),
        ("reward", 0.0, 1.0, None, "no difference"),
    ],
)
def test_words(metric: str, difference: float, p: float, needed: int | None, words: str) -> None:
    assert verdict(metric, difference, p, num_prompts=200, needed=needed) == words


def test_the_short_form_has_no_numbers_of_prompts() -> None:
    assert short_verdict("ter", -3.0, 0.01) == "better, p = .010"
    assert short_verdict("reward", 0.1, 0.3) == "none shown, p = .300"
    assert short_verdict("reward", 0.0, 1.0) == "no difference"


def test_every_metric_of_ours_has_a_better_end() -> None:
    lower = {key for key, metric in METRICS.items() if metric.better == "lower"}
    assert lower == {"ter", "repetition_4", "perplexity", "bits_per_byte"}
    assert all(metric.better for metric in METRICS.values() if metric.corpus)
    assert {key for key, metric in METRICS.items() if metric.better is None} == {
        *("kl", "kl_per_token", "length", "eos_rate", "distinct_1", "distinct_2"),
        *("sample_length", "sample_eos_rate"),
    }
    figures = [metric.figure for metric in METRICS.values()]
    assert len(set(figures)) == len(figures)


def test_a_comparison_carries_its_verdict(systems: dict, references: list) -> None:
    poor = compare_corpus(("good", systems["good"]), ("poor", systems["poor"]), references)
    assert poor.verdict.startswith("better, p ")
    fair = compare_corpus(("good", systems["good"]), ("fair", systems["fair"]), references)
    assert fair.num_prompts == 60
    assert fair.num_prompts_needed is not None
    assert "no difference that 60 prompts can show; about" in fair.verdict


def test_rounding() -> None:
    assert [rounded(n) for n in (7, 99, 143, 1413, 25_500)] == [7, 99, 140, 1400, 26_000]
    assert p_in_words(0.2) == "p = .200"
    assert p_in_words(1.0) == "p = 1.000"
