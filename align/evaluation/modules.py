"""Our metrics as ``evaluate`` modules: they need no hub, and ``evaluate.combine`` takes them.

    evaluate.combine([AlignBleu(), AlignChrf()]).compute(predictions=..., references=...)

``predictions`` are texts; ``references`` one text for each, or one list of texts for each. What
else a module needs (``finished``, ``logprobs``, ``prompts``) is given by name, to all at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import evaluate
import numpy as np
from datasets import Features, Value
from datasets import Sequence as ListOf

from align.evaluation.bleu import corpus_score
from align.evaluation.text import distinct_n, exact_matches, repetition
from align.evaluation.wins import shares_won
from align.types import AlignError, RewardSource

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


# every _compute takes and leaves what the other modules of a combination need


class AlignBleu(evaluate.Metric):
    """``bleu`` 0-100 and ``bleu_signature``; ``tokenize``: 13a, intl, char, zh or none."""

    def __init__(self, tokenize: str = "13a", **options: Any) -> None:
        super().__init__(**options)
        self.key = "bleu" if tokenize == "13a" else f"bleu-{tokenize}"

    def _info(self) -> evaluate.MetricInfo:
        return _info("Corpus BLEU by sacreBLEU", _REFERENCES_ALLOWED)

    def _compute(self, predictions: list[str], references: list, **_: Any) -> dict[str, Any]:
        return _corpus(self.key, predictions, references)


class AlignChrf(evaluate.Metric):
    """``chrf`` 0-100 and ``chrf_signature``; with ``word_order=2`` ``chrf++``."""

    def __init__(self, word_order: int = 0, **options: Any) -> None:
        super().__init__(**options)
        if word_order not in (0, 2):
            raise AlignError(f"word_order={word_order}: 0 is chrF, 2 is chrF++")
        self.key = "chrf++" if word_order else "chrf"

    def _info(self) -> evaluate.MetricInfo:
        return _info("Corpus chrF2 or chrF2++ by sacreBLEU", _REFERENCES_ALLOWED)

    def _compute(self, predictions: list[str], references: list, **_: Any) -> dict[str, Any]:
        return _corpus(self.key, predictions, references)


class AlignTer(evaluate.Metric):
    """``ter``, lower is better, and ``ter_signature``."""

    def _info(self) -> evaluate.MetricInfo:
        return _info("Translation edit rate by sacreBLEU", _REFERENCES_ALLOWED)

    def _compute(self, predictions: list[str], references: list, **_: Any) -> dict[str, Any]:
        return _corpus("ter", predictions, references)


class ExactMatch(evaluate.Metric):
    """``exact_match``: share of predictions that equal one of their references, ends stripped."""

    def _info(self) -> evaluate.MetricInfo:
        return _info("Share of exact matches", _REFERENCES_ALLOWED)

    def _compute(self, predictions: list[str], references: list, **_: Any) -> dict[str, Any]:
        return {"exact_match": float(np.mean(exact_matches(predictions, _listed(references))))}


class Length(evaluate.Metric):
    """``length_mean``: in words, or in whatever ``count`` counts, e.g. a tokenizer's tokens."""

    def __init__(self, count: Callable[[str], int] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.count = count or (lambda text: len(text.split()))

    def _info(self) -> evaluate.MetricInfo:
        return _info("Mean length of the predictions", _PREDICTIONS_ONLY)

    def _compute(self, predictions: list[str], **_: Any) -> dict[str, Any]:
        return {"length_mean": sum(map(self.count, predictions)) / len(predictions)}


class Diversity(evaluate.Metric):
    """``distinct_1``, ``distinct_2`` over all predictions, ``repetition_4`` inside each, mean."""

    def _info(self) -> evaluate.MetricInfo:
        return _info("Distinct n-grams and repetition", _PREDICTIONS_ONLY)

    def _compute(self, predictions: list[str], **_: Any) -> dict[str, Any]:
        distinct = {f"distinct_{n}": distinct_n(predictions, n) for n in (1, 2)}
        return distinct | {"repetition_4": float(np.mean([repetition(p) for p in predictions]))}


class EosRate(evaluate.Metric):
    """``eos_rate``: share of responses that ended by themselves. Needs ``finished``."""

    def _info(self) -> evaluate.MetricInfo:
        return _info("Share of finished responses", Features({"finished": Value("bool")}))

    def _compute(self, finished: list[bool], **_: Any) -> dict[str, Any]:
        return {"eos_rate": float(np.mean(finished))}


class Kl(evaluate.Metric):
    """``kl`` nats per response and ``kl_per_token``, of sampled responses.

    Needs ``logprobs`` and ``ref_logprobs``: a list of numbers for each response, one per token.
    """

    def _info(self) -> evaluate.MetricInfo:
        one_per_token = ListOf(Value("float64"))
        features = Features({"logprobs": one_per_token, "ref_logprobs": one_per_token})
        return _info("Mean log-ratio to a reference", features)

    def _compute(
        self, logprobs: list[list[float]], ref_logprobs: list[list[float]], **_: Any
    ) -> dict[str, Any]:
        ratios = [sum(p) - sum(q) for p, q in zip(logprobs, ref_logprobs, strict=True)]
        return {
            "kl": sum(ratios) / len(ratios),
            "kl_per_token": sum(ratios) / sum(map(len, logprobs)),
        }


class Perplexity(evaluate.Metric):
    """``perplexity``: exp(minus mean log p) over all tokens of a text. Needs ``logprobs``."""

    def _info(self) -> evaluate.MetricInfo:
        return _info("Perplexity", Features({"logprobs": ListOf(Value("float64"))}))

    def _compute(self, logprobs: list[list[float]], **_: Any) -> dict[str, Any]:
        return {"perplexity": math.exp(-sum(map(sum, logprobs)) / sum(map(len, logprobs)))}


class Reward(evaluate.Metric):
    """``reward_mean`` by any reward source. Needs ``prompts``, strings."""

    def __init__(self, source: RewardSource, **options: Any) -> None:
        super().__init__(**options)
        self.source = source

    def _info(self) -> evaluate.MetricInfo:
        return _info("Mean reward", _with_references(prompts=Value("string")))

    def _compute(
        self, predictions: list[str], references: list, prompts: list[str], **_: Any
    ) -> dict[str, Any]:
        return {
            "reward_mean": float(np.mean(self.source(prompts, predictions, _listed(references))))
        }


class WinRateOver(evaluate.Metric):
    """``win_rate`` of the predictions over ``baselines`` by a reward source, ties half."""

    def __init__(self, source: RewardSource, *, tie_margin: float = 0.0, **options: Any) -> None:
        super().__init__(**options)
        self.source, self.tie_margin = source, tie_margin

    def _info(self) -> evaluate.MetricInfo:
        columns = {"prompts": Value("string"), "baselines": Value("string")}
        return _info("Win rate over a baseline", _with_references(**columns))

    def _compute(
        self,
        predictions: list[str],
        references: list,
        prompts: list[str],
        baselines: list[str],
        **_: Any,
    ) -> dict[str, Any]:
        listed = _listed(references)
        ours, theirs = (self.source(prompts, texts, listed) for texts in (predictions, baselines))
        return {"win_rate": float(shares_won(ours, theirs, tie_margin=self.tie_margin).mean())}


def _corpus(key: str, predictions: list[str], references: list) -> dict[str, Any]:
    result = corpus_score(key, predictions, _listed(references))
    return {key: result.score, f"{key}_signature": result.signature}


def _with_references(**columns: Value) -> list[Features]:
    return [Features({**features, **columns}) for features in _REFERENCES_ALLOWED]
