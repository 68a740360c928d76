"""Choose the next pair to show: the one whose answer says most about the ranking.

For responses i and j with strengths t and their covariance (Bradley–Terry under a prior),

    information = p (1 - p) Var(t_i - t_j),   p = sigmoid(t_i - t_j),

how much one answer is expected to narrow t_i - t_j (the first-order expected information of a
Bernoulli answer; compare Chen et al. 2013). The models that wrote the responses are ranked in the
same way, and both informations are added. A share of the pairs is taken from those that others have
answered, so that agreement can be measured.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations

from align.feedback.ranking import Comparison, Strengths, bradley_terry
from align.feedback.store import Answer, Response

PRIOR = 1.0
"""Precision of the prior on strengths, nats^-2: N(0, 1) before any answer."""


class Chooser:
    """Ranking that is updated as answers come in."""

    def __init__(
        self, responses: Sequence[Response], answers: Sequence[Answer], *, overlap: float = 0.2
    ) -> None:
        self.overlap = overlap
        self._by_id = {r.id: r for r in responses}
        by_prompt: dict[str, list[int]] = defaultdict(list)
        for r in responses:
            by_prompt[r.prompt].append(r.id)
        self.groups = [ids for ids in by_prompt.values() if len(ids) > 1]
        self._group_of = {id: group for group in self.groups for id in group}
        self._models = sorted({r.model for r in responses if r.model})
        self.pairs = [pair for group in self.groups for pair in combinations(sorted(group), 2)]
        self._answers: dict[tuple[int, int], dict[str, Answer]] = defaultdict(dict)
        for answer in answers:
            if answer.left in self._by_id and answer.right in self._by_id:
                self._answers[answer.pair][answer.annotator] = answer
        self._information: dict[tuple[int, int], float] = {}
        for group in self.groups:
            self._rank(group)

    def add(self, answer: Answer) -> None:
        self._answers[answer.pair][answer.annotator] = answer
        self._rank(self._group_of[answer.left])

    def remove(self, answer: Answer) -> None:
        self._answers[answer.pair].pop(answer.annotator, None)
        self._rank(self._group_of[answer.left])

    def done(self, annotator: str) -> int:
        return sum(annotator in said for said in self._answers.values())

    def next(self, annotator: str) -> tuple[int, int] | None:
        """Return a pair ``(left, right)`` that the annotator has not answered; None if there is
        none.
        """
        mine = [p for p in self.pairs if annotator not in self._answers.get(p, {})]
        if not mine:
            return None
        number = self.done(annotator)
        # one of every 1 / overlap pairs is one that somebody else has answered, if any
        due = math.floor((number + 1) * self.overlap) > math.floor(number * self.overlap)
        shared = [p for p in mine if self._answers.get(p)] if due else []
        models = self._fit_models()

        def worth(pair: tuple[int, int]) -> tuple[float, str]:
            return self._information[pair] + self._of_models(pair, models), _hash(annotator, pair)

        low, high = max(shared or mine, key=worth)
        swapped = int(_hash(annotator, (low, high))[:8], 16) % 2  # random sides
        return (high, low) if swapped else (low, high)

    def _rank(self, group: Sequence[int]) -> None:
        numbers = {id: n for n, id in enumerate(group)}
        found = _fit(self._comparisons(group, numbers), len(group))
        for low, high in combinations(sorted(group), 2):
            self._information[low, high] = _information(found, numbers[low], numbers[high])

    def _comparisons(self, group: Sequence[int], numbers: dict[int, int]) -> list[Comparison]:
        return [
            (numbers[low], numbers[high], answer.outcome())
            for low, high in combinations(sorted(group), 2)
            for answer in self._answers.get((low, high), {}).values()
            if answer.said != "skip"
        ]

    def _fit_models(self) -> Strengths | None:
        if len(self._models) < 2:
            return None
        number = {name: n for n, name in enumerate(self._models)}
        comparisons = []
        for (low, high), said in self._answers.items():
            a, b = self._by_id[low].model, self._by_id[high].model
            if a and b and a != b:
                outcomes = [x.outcome() for x in said.values() if x.said != "skip"]
                comparisons += [(number[a], number[b], outcome) for outcome in outcomes]
        return _fit(comparisons, len(self._models))

    def _of_models(self, pair: tuple[int, int], found: Strengths | None) -> float:
        a, b = (self._by_id[id].model for id in pair)
        if found is None or not a or not b or a == b:
            return 0.0
        return _information(found, self._models.index(a), self._models.index(b))


def _fit(comparisons: Sequence[Comparison], num_items: int) -> Strengths:
    """Fit strengths under the prior; without answers return the prior itself."""
    if comparisons:
        return bradley_terry(comparisons, num_items, prior=PRIOR)
    import numpy as np

    covariance = (np.eye(num_items) - 1 / num_items) / PRIOR
    return Strengths(np.zeros(num_items), np.sqrt(np.diag(covariance)), covariance)


def _information(found: Strengths, i: int, j: int) -> float:
    p = 1 / (1 + math.exp(found.values[j] - found.values[i]))
    c = found.covariance
    return float(p * (1 - p) * (c[i, i] + c[j, j] - 2 * c[i, j]))


def _hash(annotator: str, pair: tuple[int, int]) -> str:
    return hashlib.sha256(f"{annotator} {pair[0]} {pair[1]}".encode()).hexdigest()
