from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import sacrebleu

from align.evaluation.bleu import corpus_bleu, corpus_chrf, corpus_score
from align.types import AlignError


def test_equals_sacrebleus_api(systems: dict, references: list[list[str]]) -> None:
    streams = [[row[0] for row in references], [row[1] if row[1:] else None for row in references]]
    hypotheses = systems["good"]
    assert corpus_bleu(hypotheses, references).score == pytest.approx(
        sacrebleu.corpus_bleu(hypotheses, streams).score, abs=1e-12
    )
    assert corpus_chrf(hypotheses, references).score == pytest.approx(
        sacrebleu.corpus_chrf(hypotheses, streams).score, abs=1e-12
    )
    assert corpus_score("chrf++", hypotheses, references).score == pytest.approx(
        sacrebleu.corpus_chrf(hypotheses, streams, word_order=2).score, abs=1e-12
    )
    assert "nrefs:var" in corpus_bleu(hypotheses, references).signature


def test_equals_sacrebleus_command_line(
    systems: dict, references: list[list[str]], tmp_path: Path
) -> None:
    single = [row[:1] for row in references]
    (tmp_path / "ref.txt").write_text("".join(f"{row[0]}\n" for row in single))
    (tmp_path / "hyp.txt").write_text("".join(f"{text}\n" for text in systems["good"]))
    command = [sys.executable, "-m", "sacrebleu", "ref.txt", "-i", "hyp.txt"]
    command += ["-m", "bleu", "chrf", "-w", "10", "--format", "json"]
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    expected = {row["name"]: row for row in json.loads(printed.stdout)}
    for ours, theirs in (
        (corpus_bleu(systems["good"], single), expected["BLEU"]),
        (corpus_chrf(systems["good"], single), expected["chrF2"]),
    ):
        assert ours.score == pytest.approx(theirs["score"], abs=1e-9)
        assert ours.signature == theirs["signature"]


def test_literal_bleu() -> None:
    # 1- to 4-gram precisions 5/6, 3/5, 2/4, 1/3; same length, so no brevity penalty:
    # (5/6 * 3/5 * 1/2 * 1/3)^(1/4) = (1/12)^(1/4) = .537285
    result = corpus_bleu(["the cat sat on a mat"], [["the cat sat on the mat"]])
    assert result.score == pytest.approx(53.7285, abs=1e-4)
    assert result.signature.startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.")


def test_it_is_no_mean_of_sentence_scores() -> None:
    # a corpus score pools counts: the second sentence alone has none of its 4-grams right
    hypotheses, references = ["a b c d e", "x y z"], [["a b c d e"], ["x q z"]]
    sentences = [
        sacrebleu.sentence_bleu(text, row).score
        for text, row in zip(hypotheses, references, strict=True)
    ]
    assert corpus_bleu(hypotheses, references).score != pytest.approx(sum(sentences) / 2, abs=1)


def test_more_references_never_hurt_a_match() -> None:
    texts = ["one two three four five"]
    assert corpus_bleu(texts, [["other words entirely here now", *texts]]).score == pytest.approx(
        100
    )


@pytest.mark.parametrize(
    ("hypotheses", "references", "message"),
    [
        ([], [], "no outputs to score"),
        (["a"], [["a"], ["b"]], "1 outputs, 2 references"),
        (["a", "b", "c"], [["a"], [], []], r"row 1 has no reference \(2 such rows of 3\)"),
    ],
)
def test_bad_input_is_one_line(
    hypotheses: list[str], references: list[list[str]], message: str
) -> None:
    with pytest.raises(AlignError, match=message):
        corpus_bleu(hypotheses, references)
