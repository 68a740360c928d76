"""Turn judgements into a leaderboard, agreement, and preference pairs with margins."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from align.feedback.agreement import (
    alpha_ci95,
    cohen_kappa,
    kappa_ci95,
    krippendorff_alpha,
    reliability,
)
from align.feedback.outcomes import Field, Judgement, field_of, labels
from align.feedback.pairs import Choose, choose_pairs
from align.feedback.ranking import (
    ELO_PER_NAT,
    NoMaximum,
    Strengths,
    bradley_terry,
    elo_intervals,
    plackett_luce,
)
from align.types import AlignError


def leaderboard(
    judgements: Sequence[Judgement], *, prior: float = 0.0, seed: int = 0
) -> list[dict[str, Any]]:
    """Rank models, or items without a prompt, best first; empty if the judgements name none.

    Raises:
        AlignError: The likelihood has no maximum; the message names who never lost or never met.
    """
    named = [(j, j.models or (() if j.prompt else j.items)) for j in judgements]
    field = field_of((j, names) for j, names in named if names)
    if not field.all():
        return []
    strengths = _strengths(field, prior)
    low, high = strengths.interval()
    rating, rating_low, rating_high = elo_intervals(field.all(), len(field.names), seed=seed)
    results = _results(field)
    rows = [
        {
            "name": name,
            "strength": float(strengths.values[i]),
            "strength_low": float(low[i]),
            "strength_high": float(high[i]),
            "scaled": 1000 + ELO_PER_NAT * float(strengths.values[i]),
            "elo": float(rating[i]),
            "elo_low": _finite(float(rating_low[i])),
            "elo_high": _finite(float(rating_high[i])),
            **results[i],
        }
        for i, name in enumerate(field.names)
    ]
    return sorted(rows, key=lambda row: -row["strength"])


def _strengths(field: Field, prior: float) -> Strengths:
    """Fit Plackett–Luce if all judgements are rankings of more than two, else Bradley–Terry."""
    num = len(field.names)
    whole = len(field.rankings) > 0 and any(len(r) > 2 for r in field.rankings)
    comparisons = field.all()
    try:
        if whole and len(comparisons) == sum(len(r) * (len(r) - 1) // 2 for r in field.rankings):
            return plackett_luce(field.rankings, num, prior=prior)
        return bradley_terry(comparisons, num, prior=prior)
    except NoMaximum as error:
        who = str(error).removeprefix("items ")
        names = [field.names[int(i)] if i.isdigit() else i for i in who.split(", ")]
        raise AlignError(
            f"no ranking by maximum likelihood: {', '.join(names)} and the others are not joined "
            "by wins in both directions; collect more comparisons, or set --prior 0.1"
        ) from None


def _results(field: Field) -> list[dict[str, int]]:
    counts = [Counter[str]() for _ in field.names]
    for i, j, outcome in field.all():
        words = {1.0: ("wins", "losses"), 0.0: ("losses", "wins"), 0.5: ("ties", "ties")}[outcome]
        counts[i][words[0]] += 1
        counts[j][words[1]] += 1
    return [{word: c[word] for word in ("wins", "losses", "ties")} for c in counts]


def agreement(judgements: Sequence[Judgement]) -> dict[str, Any]:
    """Compute Krippendorff's alpha over all annotators, Cohen's kappa of every two, reliability."""
    units = labels(judgements)
    annotators = sorted({j.annotator for j in judgements})
    kappas = []
    for a, b in combinations(annotators, 2):
        common = [(u[a], u[b]) for u in units.values() if a in u and b in u]
        if common:
            kappa = cohen_kappa([x for x, _ in common], [y for _, y in common])
            ends = kappa_ci95([x for x, _ in common], [y for _, y in common])
            kappas.append(
                {"a": a, "b": b, "common": len(common), "kappa": _finite(kappa), "ci95": ends}
            )
    # one field for all prompts: an item is a text with its prompt
    field = field_of((j, [f"{j.prompt}\x00{item}" for item in j.items]) for j in judgements)
    slopes = reliability(field.comparisons, len(field.names)) if len(annotators) > 1 else {}
    return {
        "annotators": len(annotators),
        "judgements": len(judgements),
        "krippendorff_alpha": _finite(
            krippendorff_alpha([list(u.values()) for u in units.values()])
        ),
        "krippendorff_alpha_ci95": alpha_ci95([list(u.values()) for u in units.values()]),
        "cohen_kappa": kappas,
        "reliability": {
            name: {"slope": _finite(slope), "error": _finite(error)}
            for name, (slope, error) in slopes.items()
        },
    }


def preference_pairs(
    judgements: Sequence[Judgement],
    *,
    choose: Choose = "all",
    min_margin: float = 0.0,
    prior: float = 0.1,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Make training pairs with margins in nats of strength; count the pairs skipped, by reason.

    The strengths of a prompt's responses are fitted under a prior, since a few comparisons seldom
    have a maximum; so a margin from one comparison is smaller than one from many that agree.
    """
    by_prompt: dict[str, list[Judgement]] = defaultdict(list)
    for judgement in judgements:
        if judgement.prompt is not None:
            by_prompt[str(judgement.prompt)].append(judgement)
    pairs: list[dict[str, Any]] = []
    left_out: Counter[str] = Counter()
    for same in by_prompt.values():
        field = field_of((j, j.items) for j in same)
        scores = bradley_terry(field.all(), len(field.names), prior=prior).values.tolist()
        chosen, reasons = choose_pairs(
            field.names, scores, choose=choose, min_margin=max(min_margin, 1e-9)
        )
        left_out.update(reasons)
        votes = Counter(frozenset((i, j)) for i, j, _ in field.all())
        pairs += [
            {
                "id": same[0].where,
                "prompt": same[0].prompt,
                "chosen": field.names[i],
                "rejected": field.names[j],
                "margin": scores[i] - scores[j],
                "judgements": votes[frozenset((i, j))],
            }
            for i, j in chosen
        ]
    return pairs, dict(left_out)


def _finite(value: float) -> float | None:
    """Replace NaN by None for JSON."""
    return value if math.isfinite(value) else None
