"""Reward sources: one score for each response, from prompts, responses and references."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from align.base.progress import say, warn
from align.config.sections import RewardTerm
from align.rewards.arguments import filled_defaults
from align.rewards.function import (
    REWARD_ARGUMENTS,
    FunctionReward,
    load_function,
    require_arguments,
)
from align.rewards.metric import MetricReward
from align.rewards.weighted import WeightedReward
from align.types import AlignError, PromptExample, RewardSource

__all__ = [
    "FunctionReward",
    "MetricReward",
    "WeightedReward",
    "build_reward",
    "check_functions",
    "columns_of",
    "load_function",
    "needs_references",
    "require_arguments",
    "score_responses",
    "warn_of_constant",
]


def build_reward(
    terms: Sequence[RewardTerm], *, load_model: Callable[[str], RewardSource]
) -> RewardSource:
    """Build the reward of a recipe: one source, or the weighted sum of several.

    Args:
        terms: At least one.
        load_model: Loads a reward model from a folder or hub id; passed in, so that a recipe
            without reward models does not import it.

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
    key: str,
    terms: Sequence[RewardTerm],
    columns: Mapping[str, str | None] | None = None,
    *,
    quiet: bool = False,
) -> list[FunctionReward]:
    """Import the terms' functions, and refuse those that cannot be called by name.

    It runs before data are read, without ``columns``, and again with the columns of all rows before
    models are loaded, which takes minutes. The second call reports columns that replace a default.

    Args:
        columns: See `columns_of`.
        quiet: Print nothing, as on all ranks but the main one.
    """
    found = []
    for term in terms:
        if term.function is None:
            continue
        source = load_function(term.function, term.timeout)
        found.append(require_arguments(f"{key}.function", source, columns=columns))
        filled = filled_defaults(source.function, {*(columns or ())} - {*REWARD_ARGUMENTS})
        if filled and not quiet:
            say(
                f"{key}.function={source.name!r}: the data's columns replace the defaults of its "
                f"parameters {', '.join(filled)}; rename a parameter that is not meant for a column"
            )
    return found


def columns_of(examples: Iterable[PromptExample]) -> dict[str, str | None]:
    """Map each extra column to the first row without it, None if every row has it.

    All rows of a run's data count: one batch may lack a column that others have.
    """
    lacking: dict[str, str | None] = {}
    first: str | None = None
    for example in examples:
        for name in example.extra:
            lacking.setdefault(name, first)
        for name, row in lacking.items():
            if row is None and name not in example.extra:
                lacking[name] = example.id
        first = example.id if first is None else first
    return lacking


def score_responses(
    source: RewardSource,
    examples: Sequence[PromptExample],
    responses: Sequence[str],
    columns: Iterable[str] | None = None,
) -> Sequence[float]:
    """Score responses; ``examples`` has their prompts, references and extra columns.

    Args:
        columns: Names of the extra columns to pass, None in a row without; by default those of
            ``examples``, which is right if these are all rows of the data.
    """
    names = columns_of(examples) if columns is None else columns
    values: dict[str, list[Any]] = {name: [e.extra.get(name) for e in examples] for name in names}
    return source(
        [e.prompt for e in examples],
        responses,
        [e.references for e in examples],
        **({"columns": values} if values else {}),
    )


def warn_of_constant(source: RewardSource, scores: Sequence[float]) -> None:
    """Warn if all responses got the same score, from the whole reward or a term of a sum.

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
    """Tell whether a source compares with references; a function counts as one that does not."""
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
