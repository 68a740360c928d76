"""Use a Python function as a reward source.

The function is named in a recipe or on the command line, never in data: naming it runs it. Its
arguments are matched by name (`arguments`), it gets copies, and whatever it does ends in its scores
or in one line (`guard`).
"""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from pathlib import Path
from types import MappingProxyType
from typing import Any

from align.rewards.arguments import call_by_name, check_arguments
from align.rewards.guard import guarded, importing, reason
from align.types import AlignError, Columns, NonFiniteError, RewardFunction, Text

REWARD_ARGUMENTS = ("prompts", "responses", "references")
LARGEST = 3.4028234e38
"""Largest float32, the dtype of a rollout's scores."""


@dataclass
class FunctionReward:
    """A function that is called by name with copies, its scores checked."""

    name: str
    function: RewardFunction
    # seconds that a call may take; None waits for ever
    timeout: float | None = None
    # its name in messages
    kind: str = "reward function"

    def __call__(
        self,
        prompts: Sequence[Text],
        responses: Sequence[str],
        references: Sequence[Sequence[str]],
        columns: Columns | None = None,
    ) -> list[float]:
        given = {"prompts": prompts, "responses": responses, "references": references}
        # our arguments first: a function without a signature gets them by position
        given |= {name: values for name, values in (columns or {}).items() if name not in given}
        return checked_scores(self.name, self.call(given), len(responses))

    def call(self, given: Mapping[str, Sequence[Any]]) -> Any:
        """Call the function with copies, so that its changes to them do not reach the run."""
        copies = {name: copy.deepcopy(list(column)) for name, column in given.items()}
        return guarded(
            f"{self.kind} {self.name}",
            partial(call_by_name, self.function, copies),
            self.timeout,
            rows=len(next(iter(copies.values()))),
        )


def load_function(
    name: str, timeout: float | None = None, *, key: str = "reward.function"
) -> FunctionReward:
    """Import ``module:function``; modules in the working directory count too.

    Args:
        name: ``module:function``.
        timeout: Seconds that a call may take.
        key: Recipe key that names it.

    Raises:
        AlignError: No such form, module or function, or the module does not import.
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise AlignError(f"{key}={name!r}: must be module:function, e.g. my_rewards:brevity")
    if module_name.endswith(".py"):
        named = module_name.removesuffix(".py").replace("/", ".")
        raise AlignError(f"{key}={name!r}: a module is named without .py: {named}:{function_name}")
    working_directory = str(Path.cwd())
    if working_directory not in sys.path:
        sys.path.append(working_directory)
    # Python caches folder listings and would miss a module written since
    importlib.invalidate_caches()
    try:
        with importing(f"module {module_name}"):
            module = importlib.import_module(module_name)
    except KeyboardInterrupt:  # it may be the user's own
        raise
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise _import_error(key, name, module_name, error) from error
        raise AlignError(
            f"{key}={name!r}: no module {error.name!r} in {working_directory} "
            "or among the installed packages; put it there or mend the name"
        ) from error
    except BaseException as error:  # also a script that ends with sys.exit()
        raise _import_error(key, name, module_name, error) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        found = ", ".join(sorted(k for k, v in vars(module).items() if _is_own(v, module_name)))
        raise AlignError(
            f"{key}={name!r}: {module_name} has no function {function_name!r}; "
            f"it has {found or 'none'}"
        )
    return FunctionReward(name, function, timeout)


def require_arguments(
    key: str,
    source: FunctionReward,
    arguments: Sequence[str] = REWARD_ARGUMENTS,
    *,
    columns: Mapping[str, str | None] | None = MappingProxyType({}),
) -> FunctionReward:
    """Refuse a function that cannot be called with these names, before anything is computed.

    Args:
        columns: Extra columns of the data, which it may ask for too, each with the first row that
            lacks it; None if the data have not been read yet, so that any name may be a column.
    """
    check_arguments(key, source.name, source.function, arguments, columns)
    return source


def checked_scores(name: str, scores: object, count: int) -> list[float]:
    """Return one finite float for each response; raise an AlignError that names one that is not.

    Lists, tuples, tensors, arrays and series are accepted; so are NumPy numbers, booleans and
    tensors of one element in a list.
    """
    told = f"reward {name}: returned {_kind(scores)}"
    scores = _listed(scores)
    if scores is None:
        raise AlignError(f"{told}, must return a list of {count} floats")
    if len(scores) != count:
        raise AlignError(
            f"reward {name}: returned {len(scores)} scores for {count} responses; "
            "must return one for each, in their order"
        )
    numbers = [_number(score) for score in scores]
    too_large = [i for i, n in enumerate(numbers) if n is not None and not abs(n) <= LARGEST]
    for row, (number, score) in enumerate(zip(numbers, scores, strict=True)):
        told = f"reward {name}: the score of response {row} is {_short(score)}, must be a finite "
        if number is None:
            raise AlignError(f"{told}float")
        if row in too_large:
            limit = " (float32 ends at 3.4e38)" if math.isfinite(number) else ""
            cure = f"mend reward {name}, which gave it"
            raise NonFiniteError(
                f"{told}float{limit}", what="score", value=number, rows=too_large, cure=cure
            )
    return [number for number in numbers if number is not None]


def _listed(scores: Any) -> list[Any] | None:
    """Return scores as a list; None if they are no sequence, tensor or array."""
    if hasattr(scores, "tolist") and not isinstance(scores, type):
        scores = scores.detach() if hasattr(scores, "detach") else scores
        scores = scores.tolist()  # a number if the array has no dimensions
    if isinstance(scores, Sequence) and not isinstance(scores, str | bytes | bytearray):
        return list(scores)
    return None


def _number(score: Any) -> float | None:
    """Convert a real number, or a tensor or array of one element, to a float."""
    if hasattr(score, "tolist") and getattr(score, "size", None) is not None:
        count = score.numel() if hasattr(score, "numel") else score.size
        score = score.reshape(-1).tolist()[0] if count == 1 else None
    if not isinstance(score, Real):
        return None
    try:
        return float(score)
    except OverflowError:  # an integer of hundreds of digits
        return math.copysign(math.inf, 1 if str(score)[0] != "-" else -1)


def _kind(scores: Any) -> str:
    """Name the type of the returned object, for a message."""
    if inspect.iscoroutine(scores):
        scores.close()  # prevents Python's warning that it was never awaited
        return "a coroutine"
    return type(scores).__name__


def _short(score: Any) -> str:
    text = repr(score)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _import_error(key: str, name: str, module_name: str, error: BaseException) -> AlignError:
    return AlignError(
        f"{key}={name!r}: importing {module_name} raised {reason(error)}; "
        "mend the module, or run with --debug to see where"
    )


def _is_own(value: object, module_name: str) -> bool:
    return callable(value) and getattr(value, "__module__", None) == module_name
