"""Find writing systems without spaces between words, and the BLEU tokenizers that fit each.

13a, sacreBLEU's default, splits at spaces and punctuation: it takes a Chinese sentence for one
word, so its BLEU is near 0 for any answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f"
KANA = "\u3041-\u30ff\u31f0-\u31ff\uff66-\uff9d"
SOUTH_EAST = {
    "Thai": "\u0e01-\u0e5b",
    "Lao": "\u0e81-\u0edf",
    "Tibetan": "\u0f00-\u0fff",
    "Burmese": "\u1000-\u109f",
    "Khmer": "\u1780-\u17ff",
}
UNSPACED = HAN + KANA + "".join(SOUTH_EAST.values())
HANGUL = "\u1100-\u11ff\u3131-\u318e\uac00-\ud7a3"

# the first one is proposed; bleu-none is for texts that are split already
ANY = ("bleu-char", "bleu-flores200", "bleu-flores101", "bleu-none")
FITTING = {
    "Chinese": ("bleu-zh", *ANY),
    "Japanese": ("bleu-ja-mecab", *ANY),
    "Korean": ("bleu-ko-mecab", *ANY),
    **dict.fromkeys(SOUTH_EAST, ANY),
}
MIN_SHARE = 0.2
"""Smallest share of a text's letters for a script to count."""
MAX_RUN = 6
"""Largest mean number of letters between spaces of a text that is split into words."""

_WORDS = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")


def words(text: str) -> list[str]:
    """Split at white space, and split scripts without spaces into letters."""
    return _WORDS.findall(text)


def language_of(texts: Sequence[str]) -> str | None:
    """Name the language, by script, whose words 13a does not find in the texts; else None."""
    text = "\n".join(texts)
    num_letters = sum(map(str.isalpha, text)) or 1

    def letters(script: str) -> int:
        return len(re.findall(f"[{script}]", text))

    if letters(HANGUL) >= MIN_SHARE * num_letters:
        return "Korean"
    scripts = {"Chinese": HAN + KANA, **SOUTH_EAST}
    name, count = max(((n, letters(s)) for n, s in scripts.items()), key=lambda found: found[1])
    script = scripts[name]
    if count < MIN_SHARE * num_letters:
        return None
    if count <= MAX_RUN * len(re.findall(rf"[{script}]\S*", text)):
        return None  # the words are separated by spaces already
    # a Japanese text always has kana
    return "Japanese" if name == "Chinese" and letters(KANA) > 0.1 * count else name


def tokenizer_hint(metrics: Sequence[str], references: Sequence[Sequence[str]]) -> str | None:
    """Write a hint if no BLEU tokenizer of ``metrics`` fits the references' script."""
    asked = [name for name in metrics if name.partition("-")[0] == "bleu"]
    language = language_of([text for row in references for text in row]) if asked else None
    if language is None or any(name in FITTING[language] for name in asked):
        return None
    tokenizer = asked[0].partition("-")[2] or "13a"
    best, *others = FITTING[language]
    says = f"{asked[0]}: tokenizer {tokenizer} does not find the words of {language} text"
    also = "" if "ter" not in metrics else ", nor does TER"
    rest = " or ".join(name for name in others if name not in ("bleu-none", "bleu-flores101"))
    return f"{says}{also}; put {best} into `metrics` ({rest} fits too)"
