"""Match the arguments of a user's function by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from align.base.suggest import suggest
from align.types import AlignError

# names in other libraries -> ours, for the hint
MEANT = {
    **dict.fromkeys(("completion", "completions", "predictions", "outputs", "texts"), "responses"),
    **dict.fromkeys(("ground_truth", "solution", "targets", "labels", "answer"), "references"),
    **dict.fromkeys(("queries", "inputs", "questions"), "prompts"),
}
_POSITIONAL_ONLY = inspect.Parameter.POSITIONAL_ONLY
_VAR_POSITIONAL = inspect.Parameter.VAR_POSITIONAL
_VAR_KEYWORD = inspect.Parameter.VAR_KEYWORD
_REST = (_VAR_POSITIONAL, _VAR_KEYWORD)


def call_by_name(function: Callable[..., Any], values: Mapping[str, Any]) -> Any:
    """Call ``function`` with those of ``values`` that it has parameters for.

    ``**kwargs`` takes the others. A function without a signature (some that are written in C), and
    one with ``*args`` alone, gets all of them by position, in their order.
    """
    parameters = _parameters(function)
    if parameters is None or [p.kind for p in parameters] == [_VAR_POSITIONAL]:
        return function(*values.values())
    positional: list[Any] = []
    named: dict[str, Any] = {}
    for parameter in parameters:
        if parameter.kind is _POSITIONAL_ONLY:
            positional.append(values.get(parameter.name, parameter.default))
        elif parameter.kind is _VAR_KEYWORD:
            taken = {p.name for p in parameters if p.kind is not _VAR_KEYWORD}
            named |= {name: value for name, value in values.items() if name not in taken}
        elif parameter.name in values and parameter.kind is not _VAR_POSITIONAL:
            named[parameter.name] = values[parameter.name]
    return function(*positional, **named)


def check_arguments(
    key: str,
    name: str,
    function: Callable[..., Any],
    arguments: Sequence[str],
    columns: Mapping[str, str | None] | None = MappingProxyType({}),
) -> None:
    """Refuse a function that cannot be called by name with ``arguments`` and ``columns``.

    Args:
        key: The recipe's key, such as ``reward.function``.
        name: ``module:function``.
        arguments: Names that are always passed.
        columns: Extra columns of the data, each with the id of the first row that lacks it, if one
            does. None if they are not known yet; a name that is unlike all of ``arguments`` then
            passes.

    Raises:
        AlignError: A class, an async function or a generator; a parameter without a value; a column
            that not every row has; no parameter at all.
    """
    told = f"{key}={name!r}"
    if isinstance(function, type):
        raise AlignError(f"{told}: is a class; name a function, or an object that can be called")
    if kind := _deferred(function):
        raise AlignError(f"{told}: is {kind}; it must return its numbers: write a plain function")
    parameters = _parameters(function)
    if parameters is None:
        return
    allowed = (*arguments, *(columns or ()))
    shown, wanted = inspect.signature(function), ", ".join(arguments)
    also = f" and the data's columns {', '.join(columns)}" if columns else ""
    cure = f"may ask for {wanted}{also}, by name: write `def {name.partition(':')[2]}({wanted}):`"
    kinds = [p.kind for p in parameters]
    rest_alone = _VAR_POSITIONAL in kinds and _VAR_KEYWORD not in kinds and len(kinds) > 1
    for parameter in parameters:
        if parameter.kind is _VAR_POSITIONAL and rest_alone:
            raise AlignError(f"{told}: takes {shown}, nothing is given to *{parameter.name}: "
                             f"it {cure}")  # fmt: skip
        row = None if parameter.name in arguments else (columns or {}).get(parameter.name)
        is_needed = parameter.default is inspect.Parameter.empty and parameter.kind not in _REST
        if row is not None and is_needed:
            raise AlignError(
                f"{told}: takes {shown}, and row {row} has no column {parameter.name}: add it to "
                f"every row (null is given as None), or write `{parameter.name}=None`"
            )
        if parameter.name in allowed or parameter.kind in _REST:
            continue
        hint = _meant(parameter, arguments)
        if columns is None and (hint is None or hint == "references"):
            continue  # `answer` or `solution` may be a column
        if parameter.default is inspect.Parameter.empty or hint:
            near = f" (did you mean {hint}?)" if hint else ""
            raise AlignError(
                f"{told}: takes {shown}, nothing is given for {parameter.name}{near}: it {cure}"
            )
    if columns is None:
        return
    if not any(p.name in allowed or p.kind in _REST for p in parameters):
        raise AlignError(f"{told}: takes {shown}, none of what it is given: it {cure}")


def filled_defaults(function: Callable[..., Any], columns: Container[str]) -> list[str]:
    """List parameters whose default is replaced by a column of the data."""
    return [
        p.name
        for p in _parameters(function) or ()
        if p.default is not inspect.Parameter.empty and p.name in columns
    ]


def _meant(parameter: inspect.Parameter, allowed: Sequence[str]) -> str | None:
    """Return the argument that a parameter is another name of.

    A parameter with a default is likely the function's own: only a well-known name counts there.
    """
    known = MEANT.get(parameter.name)
    if known in allowed:
        return known
    if parameter.default is inspect.Parameter.empty:
        return suggest(parameter.name, allowed)
    return next((name for name in allowed if name == f"{parameter.name}s"), None)


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter] | None:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return None


def _deferred(function: Callable[..., Any]) -> str | None:
    """Name the kind of a function that returns before it has computed anything."""
    kinds = {
        "an async function": inspect.iscoroutinefunction,
        "an async generator": inspect.isasyncgenfunction,
        "a generator (it has a yield)": inspect.isgeneratorfunction,
    }
    called = function if inspect.isroutine(function) else type(function).__call__
    for kind, is_one in kinds.items():
        if is_one(function) or is_one(called):
            return kind
    return None
