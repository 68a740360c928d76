"""A weighted sum of reward sources; an ensemble is a sum whose weights are 1 / n."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from align.types import Columns, RewardSource, Text


@dataclass
class WeightedReward:
    """Sum of weight * score over the terms; ``name`` is like ``0.5*chrf +
    2*my_rewards:brevity``.
    """

    terms: Sequence[tuple[float, RewardSource]]
    name: str = field(init=False)
    # unweighted scores of each term in the last call
    last_scores: dict[str, Sequence[float]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.name = " + ".join(f"{weight:g}*{source.name}" for weight, source in self.terms)

    @property
    def mean(self) -> float:
        """Mean score of the reward models' training responses; other sources count as 0."""
        return sum(weight * getattr(source, "mean", 0.0) for weight, source in self.terms)

    def __call__(
        self,
        prompts: Sequence[Text],
        responses: Sequence[str],
        references: Sequence[Sequence[str]],
        columns: Columns | None = None,
    ) -> list[float]:
        weights = [weight for weight, _ in self.terms]
        extra = {"columns": columns} if columns else {}
        scores = [source(prompts, responses, references, **extra) for _, source in self.terms]
        names = (source.name for _, source in self.terms)
        self.last_scores = dict(zip(names, scores, strict=True))
        return [
            sum(weight * score for weight, score in zip(weights, row, strict=True))
            for row in zip(*scores, strict=True)
        ]
