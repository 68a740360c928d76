from __future__ import annotations

import pytest
import sacrebleu

from align.rewards import MetricReward
from align.types import AlignError

RESPONSES = ["the cat sat on the mat", "a dog", ""]
REFERENCES = [("the cat sat on a mat", "a cat was on the mat"), ("the dog barked",), ("word",)]
PROMPTS = ["p"] * 3


@pytest.mark.parametrize(
    ("name", "sentence_score"),
    [
        ("chrf", sacrebleu.sentence_chrf),
        ("chrf1", lambda hyp, refs: sacrebleu.sentence_chrf(hyp, refs, beta=1)),
        ("chrf++", lambda hyp, refs: sacrebleu.sentence_chrf(hyp, refs, word_order=2)),
        ("bleu", lambda hyp, refs: sacrebleu.sentence_bleu(hyp, refs, use_effective_order=True)),
    ],
)
def test_equals_sacrebleu(name: str, sentence_score) -> None:
    got = MetricReward(name)(PROMPTS, RESPONSES, REFERENCES)
    expected = [
        sentence_score(hyp, list(refs)).score
        for hyp, refs in zip(RESPONSES, REFERENCES, strict=True)
    ]
    assert got == expected
    assert got[0] > got[1] > got[2] == 0


@pytest.mark.parametrize("name", ["chrf", "chrf1", "chrf++", "bleu"])
def test_a_copy_of_the_reference_scores_100(name: str) -> None:
    text = "in the beginning God created the heavens"
    assert MetricReward(name)(["p"], [text], [(text,)])[0] == pytest.approx(100)


def test_missing_reference_names_the_prompt() -> None:
    with pytest.raises(AlignError, match=r"prompt 1 \('q'\) has no reference") as caught:
        MetricReward("chrf")(["p", "q"], ["a", "b"], [("a",), ()])
    assert "\n" not in str(caught.value)


def test_missing_reference_names_the_last_turn() -> None:
    turns = ({"role": "user", "content": "line one\nline two " + "x" * 100},)
    with pytest.raises(AlignError, match=r"'line one\\nline two x+…'"):
        MetricReward("chrf")([turns], ["a"], [()])


def test_unknown_metric_names_the_allowed() -> None:
    with pytest.raises(AlignError, match="'rouge': allowed are chrf, chrf"):
        MetricReward("rouge")
