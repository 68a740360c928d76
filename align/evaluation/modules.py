"""Our metrics as ``evaluate`` modules: they need no hub, and ``evaluate.combine`` takes them.

    evaluate.combine([AlignBleu(), AlignChrf()]).compute(predictions=..., references=...)

``predictions`` are texts; ``references`` one text for each, or one list of texts for each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import evaluate
from datasets import Features, Value
from datasets import Sequence as ListOf

from align.evaluation.bleu import corpus_score

_REFERENCES_ALLOWED = [
    Features({"predictions": Value("string"), "references": ListOf(Value("string"))}),
    Features({"predictions": Value("string"), "references": Value("string")}),
]
_PREDICTIONS_ONLY = Features({"predictions": Value("string")})
_INPUTS = "predictions: texts. references: a text, or a list of texts, for each prediction."


def _info(description: str, features: Any) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(
        description=description, citation="", inputs_description=_INPUTS, features=features
    )


def _listed(references: Sequence[str | Sequence[str]]) -> list[list[str]]:
    return [[r] if isinstance(r, str) else list(r) for r in references]


class AlignBleu(evaluate.Metric):
    """``bleu`` 0-100 and ``bleu_signature``."""

    def _info(self) -> evaluate.MetricInfo:
        return _info("Corpus BLEU by sacreBLEU", _REFERENCES_ALLOWED)

    def _compute(self, predictions: list[str], references: list) -> dict[str, Any]:
        result = corpus_score("bleu", predictions, _listed(references))
        return {"bleu": result.score, "bleu_signature": result.signature}


class AlignChrf(evaluate.Metric):
    """``chrf`` 0-100 and ``chrf_signature``."""

    def _info(self) -> evaluate.MetricInfo:
        return _info("Corpus chrF2 by sacreBLEU", _REFERENCES_ALLOWED)

    def _compute(self, predictions: list[str], references: list) -> dict[str, Any]:
        result = corpus_score("chrf", predictions, _listed(references))
        return {"chrf": result.score, "chrf_signature": result.signature}


class ExactMatch(evaluate.Metric):
    """``exact_match``: share of predictions that equal one of their references, ends stripped."""

    def _info(self) -> evaluate.MetricInfo:
        return _info("Share of exact matches", _REFERENCES_ALLOWED)

    def _compute(self, predictions: list[str], references: list) -> dict[str, Any]:
        hits = [
            prediction.strip() in {reference.strip() for reference in row}
            for prediction, row in zip(predictions, _listed(references), strict=True)
        ]
        return {"exact_match": sum(hits) / len(hits)}


class Length(evaluate.Metric):
    """``length_mean``: in words, or in whatever ``count`` counts, e.g. a tokenizer's tokens."""

    def __init__(self, count: Callable[[str], int] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.count = count or (lambda text: len(text.split()))

    def _info(self) -> evaluate.MetricInfo:
        return _info("Mean length of the predictions", _PREDICTIONS_ONLY)

    def _compute(self, predictions: list[str]) -> dict[str, Any]:
        return {"length_mean": sum(map(self.count, predictions)) / len(predictions)}
