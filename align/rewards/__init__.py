"""Reward sources: (prompts, responses, references) in, one score for each response out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from align.progress import warn
from align.rewards.function import FunctionReward, load_function, require_arguments
from align.rewards.metric import MetricReward
from align.rewards.weighted import WeightedReward
from align.types import AlignError, PromptExample, RewardSource, RewardTerm

__all__ = [
    "FunctionReward",
    "MetricReward",
    "WeightedReward",
    "build_reward",
    "check_functions",
    "load_function",
    "needs_references",
    "require_arguments",
    "score_responses",
    "warn_of_constant",
]


def build_reward(
    terms: Sequence[RewardTerm], *, load_model: Callable[[str], RewardSource]
) -> RewardSource:
    """The reward that a recipe names: one source, or the weighted sum of several.

    Args:
        terms: At least one.
        load_model: Makes a source of a reward model's folder or hub id; given by the caller, so
            that a recipe without reward models loads none of that machinery.

    Raises:
        AlignError: No term, or a term that does not set exactly one of model, function, metric.
    """
    if not terms:
        raise AlignError("reward: is empty; set reward.model, reward.function or reward.metric")
    weighted = [(term.weight, _build_term(term, load_model)) for term in terms]
    if len(weighted) == 1 and weighted[0][0] == 1:
        return weighted[0][1]
    return WeightedReward(weighted)


def check_functions(
    key: str, terms: Sequence[RewardTerm], examples: Sequence[PromptExample] | None = None
) -> list[FunctionReward]:
    """The functions among the terms, imported; refused here where they cannot be called by name.

    Called before data are read, without ``examples``, and again before models are loaded, which
    takes minutes: only then is it known which names are columns.
    """
    columns = None if examples is None else list(extra_columns(examples))
    return [
        require_arguments(
            f"{key}.function", load_function(term.function, term.timeout), columns=columns
        )
        for term in terms
        if term.function is not None
    ]


def extra_columns(examples: Sequence[PromptExample]) -> dict[str, list[Any]]:
    """Each extra column's values, None in rows without it."""
    names = dict.fromkeys(name for example in examples for name in example.extra)
    return {name: [example.extra.get(name) for example in examples] for name in names}


def score_responses(
    source: RewardSource, examples: Sequence[PromptExample], responses: Sequence[str]
) -> Sequence[float]:
    """Each response's score; ``examples`` has its prompt, references and extra columns."""
    columns = extra_columns(examples)
    return source(
        [e.prompt for e in examples],
        responses,
        [e.references for e in examples],
        **({"columns": columns} if columns else {}),
    )


def warn_of_constant(source: RewardSource, scores: Sequence[float]) -> None:
    """Say it where every response got the same score, from the whole reward or a term of a sum.

    A term is judged by the scores of its last call.
    """
    columns = {source.name: scores}
    if isinstance(source, WeightedReward) and not _is_constant(scores):
        columns = dict(source.last_scores)
    for name, column in columns.items():
        if _is_constant(column):
            warn(
                f"reward {name}: all {len(column)} responses got the same score, {column[0]:g}; "
                "where that stays so there is nothing to learn from it: check it by hand"
            )


def _is_constant(scores: Sequence[float]) -> bool:
    return len(scores) > 1 and min(scores) == max(scores)


def needs_references(source: RewardSource) -> bool:
    """Whether it compares responses with references; of a function that is not known."""
    terms = [term for _, term in source.terms] if isinstance(source, WeightedReward) else [source]
    return any(isinstance(term, MetricReward) for term in terms)


def _build_term(term: RewardTerm, load_model: Callable[[str], RewardSource]) -> RewardSource:
    choices = {"model": term.model, "function": term.function, "metric": term.metric}
    chosen = [key for key, value in choices.items() if value is not None]
    if len(chosen) != 1:
        raise AlignError(
            f"reward: a term must set exactly one of {', '.join(choices)}; "
            f"this one sets {' and '.join(chosen) or 'none'}"
        )
    if term.model is not None:
        return load_model(term.model)
    if term.function is not None:
        source = load_function(term.function, term.timeout)
        return require_arguments("reward.function", source, columns=None)
    return MetricReward(str(term.metric))
