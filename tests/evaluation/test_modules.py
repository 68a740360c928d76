from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from align.evaluation.bleu import corpus_bleu, corpus_chrf

COMBINED = """
import socket
def refuse(*args, **kwargs):
    raise AssertionError("went to the network")
socket.socket.connect = refuse
import evaluate
from align.evaluation.modules import AlignBleu, AlignChrf, ExactMatch, Length
combined = evaluate.combine([AlignBleu(), AlignChrf(), ExactMatch(), Length()])
print(sorted(combined.compute(predictions=["a b", "c d e f"], references=[["a b"], ["c", "x"]])))
"""


def test_combine_works_offline(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    printed = subprocess.run(
        [sys.executable, "-c", COMBINED], env=environment, capture_output=True, text=True
    )
    assert printed.returncode == 0, printed.stderr
    assert printed.stdout.strip() == str(
        ["bleu", "bleu_signature", "chrf", "chrf_signature", "exact_match", "length_mean"]
    )


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory):
    # imported here: `evaluate` takes seconds
    from align.evaluation import modules

    return modules


@pytest.fixture
def cache(tmp_path: Path) -> dict[str, str]:
    return {"cache_dir": str(tmp_path)}


def test_modules_equal_the_functions(modules, cache, systems: dict, references: list) -> None:
    predictions = systems["good"]
    got = modules.AlignBleu(**cache).compute(predictions=predictions, references=references)
    expected = corpus_bleu(predictions, references)
    assert got == {"bleu": expected.score, "bleu_signature": expected.signature}
    got = modules.AlignChrf(**cache).compute(predictions=predictions, references=references)
    expected = corpus_chrf(predictions, references)
    assert got == {"chrf": expected.score, "chrf_signature": expected.signature}


def test_single_references_need_no_lists(modules, cache) -> None:
    text = "one two three four five"
    got = modules.AlignBleu(**cache).compute(predictions=[text], references=[text])
    assert got["bleu"] == pytest.approx(100)


def test_batches_add_up(modules, cache, systems: dict, references: list) -> None:
    metric = modules.AlignBleu(**cache)
    for start in range(0, len(references), 25):
        rows = slice(start, start + 25)
        metric.add_batch(predictions=systems["good"][rows], references=references[rows])
    assert metric.compute()["bleu"] == corpus_bleu(systems["good"], references).score


def test_exact_match(modules, cache) -> None:
    got = modules.ExactMatch(**cache).compute(
        predictions=["a", " b ", "c", "D"], references=[["a", "x"], ["y", "b"], ["x"], ["d"]]
    )
    assert got == {"exact_match": 0.5}


def test_length(modules, cache) -> None:
    words = modules.Length(**cache).compute(predictions=["a bb", "c d e f"])
    assert words == {"length_mean": 3.0}
    characters = modules.Length(len, **cache).compute(predictions=["a bb", "c"])
    assert characters == {"length_mean": 2.5}


def test_every_module_in_one_combination(cache, modules, systems: dict, references: list) -> None:
    """What one module needs, the others leave alone."""
    import evaluate

    from align.evaluation.bleu import corpus_score
    from align.evaluation.text import distinct_n
    from align.rewards.metric import MetricReward

    predictions, n = systems["good"], len(references)
    reward = MetricReward("chrf")
    combined = evaluate.combine(
        [
            modules.AlignBleu("char", **cache),
            modules.AlignChrf(2, **cache),
            modules.AlignTer(**cache),
            modules.ExactMatch(**cache),
            modules.Length(**cache),
            modules.Diversity(**cache),
            modules.EosRate(**cache),
            modules.Kl(**cache),
            modules.Perplexity(**cache),
            modules.Reward(reward, **cache),
            modules.WinRateOver(reward, **cache),
        ]
    )
    got = combined.compute(
        predictions=predictions,
        references=references,
        prompts=["p"] * n,
        baselines=systems["poor"],
        finished=[True] * (n - 6) + [False] * 6,
        # 2 tokens a response: log-ratio .5 in all of it, .25 per token; mean log p -1
        logprobs=[[-0.5, -1.5]] * n,
        ref_logprobs=[[-1.0, -1.5]] * n,
    )
    for key in ("bleu-char", "chrf++", "ter"):
        expected = corpus_score(key, predictions, references)
        assert (got[key], got[f"{key}_signature"]) == (expected.score, expected.signature)
    assert got["distinct_2"] == distinct_n(predictions, 2)
    assert got["eos_rate"] == pytest.approx(1 - 6 / n)
    assert (got["kl"], got["kl_per_token"]) == pytest.approx((0.5, 0.25))
    assert got["perplexity"] == pytest.approx(2.718282)
    scores = reward(["p"] * n, predictions, references)
    assert got["reward_mean"] == pytest.approx(sum(scores) / n)
    assert 0.8 < got["win_rate"] <= 1
