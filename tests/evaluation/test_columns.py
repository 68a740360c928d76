"""Every metric asked for is a column, and a tokenizer that does not fit is said."""

from __future__ import annotations

import pytest

from align.evaluation.columns import columns
from align.evaluation.metrics import CORPUS_METRICS, require_metric
from align.evaluation.scripts import language_of, tokenizer_hint, words
from align.evaluation.table import closing_table, significance
from align.evaluation.text import distinct_n, repetition
from align.types import AlignError

CHINESE = "我们今天去公园散步，看到了很多花。"
JAPANESE = "私たちは今日公園を散歩して、たくさんの花を見ました。"
KOREAN = "우리는 오늘 공원을 산책하며 많은 꽃을 보았습니다."
THAI = "วันนี้เราไปเดินเล่นที่สวนสาธารณะและเห็นดอกไม้มากมาย"
BURMESE = "ယနေ့ကျွန်ုပ်တို့ပန်းခြံသို့သွားခဲ့ကြသည်"


def results(row: dict) -> dict:
    return {"models": [{"name": "m", **row}], "copy_baseline": None}


@pytest.mark.parametrize("metric", CORPUS_METRICS)
def test_every_corpus_metric_is_a_column(metric: str) -> None:
    heading, row = closing_table(results({metric: 12.5, f"{metric}_signature": "s"}))
    assert len(heading) == 2
    assert row == ["m", "12.5"]
    assert list(columns([{metric: 0.0, f"{metric}_signature": "s"}], page=True)) == [metric]


def test_asked_metrics_stand_first_and_own_ones_by_name() -> None:
    row = {
        "ter": 3.0,
        "ter_signature": "s",
        "bleu-zh": 70.8,
        "bleu-zh_signature": "s",
        "exact_match": 0.5,
        "exact_match_ci95": (0.1, 0.9),
        "politeness_mean": 1.0,
        "shout": 0,
        "distinct_1": 0.5,
        "kl": None,
        "repetition_4": 0.0,
    }
    heading, _ = closing_table(results(row))
    assert heading == ["model", "BLEU zh", "TER", "politeness", "shout", "repeated"]
    assert list(columns([row], page=True).values()) == [
        *("BLEU zh", "TER", "politeness", "shout", "exact", "repeated")
    ]


def test_every_comparison_is_said_to_stand_alone() -> None:
    test = {"a": "a", "b": "b", "metric": "bleu", "difference": 1.0, "ci95": None, "verdict": "v"}
    several = significance({"comparisons": [test] * 20, "win_rates": []})
    assert "of 20 without any true difference, about 1 would fall below .05" in several
    assert "unknown" in several
    assert "each p" not in significance({"comparisons": [test], "win_rates": []})


@pytest.mark.parametrize(
    ("text", "language", "metric"),
    [
        (CHINESE, "Chinese", "bleu-zh"),
        (f"Answer: {CHINESE}{CHINESE} (GPU)", "Chinese", "bleu-zh"),
        (JAPANESE, "Japanese", "bleu-ja-mecab"),
        (KOREAN, "Korean", "bleu-ko-mecab"),
        (THAI, "Thai", "bleu-char"),
        (BURMESE, "Burmese", "bleu-char"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_said(text: str, language: str, metric: str) -> None:
    assert language_of([text]) == language
    for asked in (["bleu"], ["chrf", "bleu-intl"]):
        hint = tokenizer_hint(asked, [[text], [text, text]]) or ""
        assert language in hint
        assert f"put {metric} into `metrics`" in hint
    assert "nor does TER" in (tokenizer_hint(["bleu", "ter"], [[text]]) or "")
    for fitting in (["bleu", metric], ["bleu-char"], ["bleu-flores200"], ["chrf"], []):
        assert tokenizer_hint(fitting, [[text]]) is None


@pytest.mark.parametrize(
    "text",
    [
        "The cat sat on the mat.",
        "Überall Straßen, où êtes-vous?",
        "Мы гуляли в парке и видели цветы",
        "हम आज पार्क गए", "ذهبنا اليوم إلى الحديقة",
        "The word 花 means flower, as every learner of the language soon finds out.",
        "我们 今天 去 公园 散步 ， 看到 了 很多 花 。",  # parted into words already
        "12 + 30 = 42", "", "🙂🙂",
    ],
)  # fmt: skip
def test_other_text_gets_no_hint(text: str) -> None:
    assert tokenizer_hint(["bleu", "ter"], [[text]]) is None


def test_zh_does_not_fit_japanese() -> None:
    assert "ja-mecab" in (tokenizer_hint(["bleu-zh"], [[JAPANESE]]) or "")


def test_letters_are_words_where_nothing_parts_them() -> None:
    assert words("a b, 我们去 GPU") == ["a", "b,", "我", "们", "去", "GPU"]
    assert words(" The  cat\nsat ") == ["The", "cat", "sat"]
    # 4-grams of 8 letters said twice: 4 + 1 of 5 different, none of it seen by whitespace
    assert repetition("我们去公我们去公") == pytest.approx(1 / 5)
    assert repetition("我们去公我们去公", words=str.split) == 0
    assert distinct_n(["花花花花"], 1) == 1 / 4


@pytest.mark.parametrize("metric", ["bleu-ja-mecab", "bleu-ko-mecab", "bleu-flores200"])
def test_a_missing_package_is_one_line(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(**options: object) -> None:
        raise RuntimeError("\nneeds extra dependencies\n\n pip install it")

    monkeypatch.setattr("sacrebleu.metrics.BLEU", missing)
    with pytest.raises(
        AlignError, match=rf"metrics: {metric}: needs `pip install .*extra dep"
    ) as e:
        CORPUS_METRICS[metric]()
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("metric", ["bleu-ja-mecab", "bleu-ko-mecab", "bleu-flores101"])
def test_a_missing_package_is_found_before_anything_is_made(
    metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(**options: object) -> None:
        raise RuntimeError("needs extra dependencies")

    monkeypatch.setattr("sacrebleu.metrics.BLEU", missing)
    monkeypatch.setattr("align.evaluation.metrics.find_spec", lambda package: object())
    require_metric(metric)  # with its package nothing is made, which might download
    monkeypatch.setattr("align.evaluation.metrics.find_spec", lambda package: None)
    with pytest.raises(AlignError, match=f"metrics: {metric}: needs `pip install"):
        require_metric(metric)
    require_metric("bleu")
