"""Estimate strengths of items from comparisons and rankings: pure maths on index arrays.

Bradley–Terry with ties (Davidson 1970) and Plackett–Luce are one model here: each observation is a
choice of one of several alternatives, with probability softmax of their log-strengths. A tie is an
alternative of its own, half-way between the two items:

    P(i beats j) ~ exp(t_i),  P(j beats i) ~ exp(t_j),  P(tie) ~ exp(e + (t_i + t_j) / 2)

A ranking is a row of choices: the best of all, the best of the rest, and so on (Plackett 1975).
The log-likelihood is concave and Newton's method finds its maximum. Strengths are nats with mean 0;
standard errors are those of the inverse Fisher information, for independent judgements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from align.base.intervals import percentiles

Floats = npt.NDArray[np.float64]
Comparison = tuple[int, int, float]
"""Items i and j, and the outcome for i: 1 won, 0 lost, 0.5 tie."""

ELO_PER_NAT = 400 / np.log(10)
Z95 = 1.959964
"""Half width of a 95% interval, in standard errors."""


class NoMaximum(ValueError):
    """The likelihood has no maximum: some items never lost to, or never met, some others."""


@dataclass(frozen=True)
class Strengths:
    """Maximum-likelihood strengths.

    Attributes:
        values: nats ``[n]``, mean 0.
        errors: Standard errors of ``values``, nats ``[n]``.
        covariance: nats^2 ``[n, n]``, of rank n - 1.
        tie: ``e`` above, nats; None without ties.
    """

    values: Floats
    errors: Floats
    covariance: Floats
    tie: float | None = None

    def interval(self) -> tuple[Floats, Floats]:
        """Return 95% intervals ``(low, high)``."""
        return self.values - Z95 * self.errors, self.values + Z95 * self.errors


def bradley_terry(
    comparisons: Sequence[Comparison], num_items: int, *, prior: float = 0.0
) -> Strengths:
    """Fit strengths to comparisons by maximum likelihood, ties included.

    Args:
        comparisons: ``(i, j, outcome)``.
        num_items: Items are numbered ``0 .. num_items - 1``.
        prior: Precision (1 / variance) of a normal prior around 0 on every strength; 0 is plain
            maximum likelihood. Above 0 a maximum always exists.

    Raises:
        NoMaximum: ``prior`` is 0 and the likelihood has no maximum (Ford 1957: the items split in
            two groups, one of which never lost to the other).

    Source: Bradley and Terry 1952; Davidson 1970 for ties.
    """
    if not comparisons:
        raise NoMaximum("no comparison")
    has_ties = any(outcome == 0.5 for _, _, outcome in comparisons)
    width = num_items + has_ties
    counts: dict[tuple[int, int, int], float] = {}
    for i, j, outcome in comparisons:
        chosen = {1.0: 0, 0.0: 1, 0.5: 2}[outcome]
        counts[i, j, chosen] = counts.get((i, j, chosen), 0) + 1
    if prior == 0:
        beaten = {(i, j) if chosen == 0 else (j, i) for i, j, chosen in counts if chosen != 2}
        tied = {(i, j) for i, j, chosen in counts if chosen == 2}
        if tied and not beaten:
            raise NoMaximum("all are ties")
        _check_connected(beaten | tied | {(j, i) for i, j in tied}, num_items)
    designs = np.zeros((len(counts), 2 + has_ties, width))
    for row, (i, j, _) in enumerate(counts):
        designs[row, 0, i] = designs[row, 1, j] = 1
        if has_ties:
            designs[row, 2, [i, j]] = 0.5
            designs[row, 2, -1] = 1
    values, covariance = _fit(
        designs,
        np.ones(designs.shape[:2], dtype=bool),
        np.array([chosen for _, _, chosen in counts]),
        np.array(list(counts.values())),
        num_items=num_items,
        prior=prior,
    )
    return Strengths(
        values[:num_items],
        np.sqrt(np.diag(covariance)[:num_items]),
        covariance[:num_items, :num_items],
        float(values[-1]) if has_ties else None,
    )


def plackett_luce(
    rankings: Sequence[Sequence[int]], num_items: int, *, prior: float = 0.0
) -> Strengths:
    """Fit strengths to whole or partial rankings, best first, by maximum likelihood.

    Raises:
        NoMaximum: ``prior`` is 0 and some items were never ranked below some others.

    Source: Plackett 1975; Luce 1959. Rankings of two are Bradley–Terry without ties.
    """
    counts: dict[tuple[int, ...], float] = {}
    for ranking in rankings:
        for k in range(len(ranking) - 1):
            stage = (ranking[k], *sorted(ranking[k + 1 :]))
            counts[stage] = counts.get(stage, 0) + 1
    if not counts:
        raise NoMaximum("no ranking of two or more")
    if prior == 0:
        _check_connected({(s[0], worse) for s in counts for worse in s[1:]}, num_items)
    longest = max(map(len, counts))
    designs = np.zeros((len(counts), longest, num_items))
    there = np.zeros((len(counts), longest), dtype=bool)
    for row, stage in enumerate(counts):
        designs[row, range(len(stage)), stage] = 1
        there[row, : len(stage)] = True
    values, covariance = _fit(
        designs,
        there,
        np.zeros(len(counts), dtype=np.int64),
        np.array(list(counts.values())),
        num_items=num_items,
        prior=prior,
    )
    return Strengths(values, np.sqrt(np.diag(covariance)), covariance)


def elo(
    comparisons: Sequence[Comparison],
    num_items: int,
    *,
    k_factor: float = 16.0,
    start: float = 1000.0,
) -> Floats:
    """Compute Elo ratings after the comparisons in order, points ``[n]``; 400 points are 10 to 1.

        R_i += k_factor * (outcome - 1 / (1 + 10 ^ ((R_j - R_i) / 400)))

    Source: Elo 1978. The last comparisons weigh most; ``elo_intervals`` averages over orders.
    """
    ratings = np.full(num_items, start)
    for i, j, outcome in comparisons:
        expected = 1 / (1 + 10 ** ((ratings[j] - ratings[i]) / 400))
        ratings[i] += k_factor * (outcome - expected)
        ratings[j] -= k_factor * (outcome - expected)
    return ratings


def elo_intervals(
    comparisons: Sequence[Comparison],
    num_items: int,
    *,
    num_resamples: int = 200,
    seed: int = 0,
    k_factor: float = 16.0,
) -> tuple[Floats, Floats, Floats]:
    """Average Elo over bootstrap resamples in random order: ``(mean, low, high)``, 95% percentiles.

    The ends are NaN below ``MIN_BOOTSTRAP_ROWS`` comparisons, and for an item with the same rating
    in every resample: few comparisons have few resamples, which would look like certainty.
    """
    rng = np.random.default_rng(seed)
    found = np.array(
        [
            elo([comparisons[i] for i in picked], num_items, k_factor=k_factor)
            for picked in rng.integers(len(comparisons), size=(num_resamples, len(comparisons)))
        ]
    )
    ends = [percentiles(column, len(comparisons)) or (np.nan, np.nan) for column in found.T]
    low, high = np.array(ends).T
    return found.mean(axis=0), low, high


def _fit(
    designs: Floats,
    there: npt.NDArray[np.bool_],
    chosen: npt.NDArray[np.int64],
    counts: Floats,
    *,
    num_items: int,
    prior: float,
) -> tuple[Floats, Floats]:
    """Fit a multinomial logit, P(k) = softmax_k(designs[m, k] @ params): (params, covariance).

    Args:
        designs: ``[M, K, P]`` features of the alternatives of each observation.
        there: ``[M, K]`` True where the alternative exists.
        chosen: ``[M]`` index of the chosen alternative.
        counts: ``[M]`` repetitions of the observation.
        num_items: The first parameters, whose mean is fixed to 0.
        prior: Precision of the normal prior on these.
    """
    size = designs.shape[2]
    is_item = np.arange(size) < num_items
    # the likelihood is flat along the strengths' common direction; this term fixes their mean at 0
    level = np.outer(is_item, is_item) / num_items
    penalty = np.diag(prior * is_item) + level
    params = np.zeros(size)

    def log_likelihood(at: Floats) -> tuple[float, Floats]:
        logits = np.where(there, designs @ at, -np.inf)
        top = logits.max(axis=1, keepdims=True)
        logs = logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
        total = counts @ logs[np.arange(len(chosen)), chosen]
        return float(total - 0.5 * at @ penalty @ at), np.exp(logs)

    value, shares = log_likelihood(params)
    for _ in range(100):
        mean = np.einsum("mk,mkp->mp", shares, designs)
        picked = designs[np.arange(len(chosen)), chosen]
        gradient = counts @ (picked - mean) - penalty @ params
        spread = np.einsum("m,mk,mkp,mkq->pq", counts, shares, designs, designs, optimize=True)
        information = spread - np.einsum("m,mp,mq->pq", counts, mean, mean) + penalty
        step = np.linalg.solve(information, gradient)
        if np.abs(gradient).max() < 1e-8 * max(1.0, counts.sum()):
            break
        scale = 1.0
        while True:
            after, shares_after = log_likelihood(params + scale * step)
            if after >= value or scale < 1e-6:
                break
            scale /= 2
        params, value, shares = params + scale * step, after, shares_after
    covariance = np.linalg.inv(information)
    # strengths are relative to their mean, so remove its (fixed) variance
    centre = np.eye(size) - level
    return params, centre @ covariance @ centre.T


def _check_connected(beats: set[tuple[int, int]], num_items: int) -> None:
    """Require that every item reaches every other by "beat or tied with", so that a maximum
    exists.
    """
    for start, edges in ((0, beats), (0, {(j, i) for i, j in beats})):
        reached, todo = {start}, [start]
        while todo:
            at = todo.pop()
            new = {j for i, j in edges if i == at} - reached
            reached |= new
            todo += new
        if len(reached) < num_items:
            rest = sorted(set(range(num_items)) - reached)
            raise NoMaximum(f"items {', '.join(map(str, rest[:10]))}")
