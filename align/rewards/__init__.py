"""Reward sources: (prompts, responses, references) in, one score for each response out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from align.rewards.function import FunctionReward, load_function, require_arguments
from align.rewards.metric import MetricReward
from align.rewards.weighted import WeightedReward
from align.types import AlignError, RewardSource, RewardTerm

__all__ = [
    "FunctionReward",
    "MetricReward",
    "WeightedReward",
    "build_reward",
    "load_function",
    "needs_references",
    "require_arguments",
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
        return require_arguments("reward.function", source)
    return MetricReward(str(term.metric))
