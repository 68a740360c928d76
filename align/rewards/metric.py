"""Use a sentence metric against the references as a reward source, 0-100, by sacreBLEU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.metrics.base import Metric

from align.types import AlignError, Columns, Text

# effective order: a sentence with no 4-gram in common still scores for shorter n-grams
METRICS: dict[str, Metric] = {
    "chrf": CHRF(),
    "chrf1": CHRF(beta=1),
    "chrf++": CHRF(word_order=2),
    "bleu": BLEU(effective_order=True),
}


@dataclass
class MetricReward:
    """Scores of a sentence metric; ``name`` is a key of ``METRICS``."""

    name: str

    def __post_init__(self) -> None:
        if self.name not in METRICS:
            raise AlignError(f"reward.metric={self.name!r}: allowed are {', '.join(METRICS)}")

    def __call__(
        self,
        prompts: Sequence[Text],
        responses: Sequence[str],
        references: Sequence[Sequence[str]],
        columns: Columns | None = None,
    ) -> list[float]:
        metric = METRICS[self.name]
        scores = []
        for row, (response, row_references) in enumerate(zip(responses, references, strict=True)):
            if not row_references:
                raise AlignError(
                    f"reward.metric={self.name}: prompt {row} ({_start(prompts[row])}) has no "
                    "reference; add a `references` column or name it in data.columns"
                )
            scores.append(float(metric.sentence_score(response, list(row_references)).score))
        return scores


def _start(prompt: Text) -> str:
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return repr(text if len(text) <= 40 else text[:39] + "…")
