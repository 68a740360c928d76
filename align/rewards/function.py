"""A Python function as a reward source.

The function is named in a recipe or on the command line, never in data: naming it runs it. It runs
in a thread of its own, so that one that hangs ends the run with a line instead of holding it.
"""

from __future__ import annotations

import importlib
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any

from align.types import AlignError, NonFiniteError, RewardFunction, Text

REWARD_ARGUMENTS = ("prompts", "responses", "references")


@dataclass
class FunctionReward:
    """``f(prompts, responses, references) -> scores`` with its answers checked."""

    name: str
    function: RewardFunction
    # seconds that a call may take; None waits for ever
    timeout: float | None = None

    def __call__(
        self,
        prompts: Sequence[Text],
        responses: Sequence[str],
        references: Sequence[Sequence[str]],
    ) -> list[float]:
        try:
            scores = within(self.timeout, lambda: self.function(prompts, responses, references))
        except _TimeIsUp as error:
            raise AlignError(
                f"reward function {self.name}: no answer within {self.timeout:g} s for "
                f"{len(responses)} responses; mend it, or raise reward.timeout (seconds)"
            ) from error
        except (Exception, SystemExit) as error:
            raise AlignError(
                f"reward function {self.name}: raised {_one_line(error)}; "
                "mend the function, or run with --debug to see where"
            ) from error
        return checked_scores(self.name, scores, len(responses))


def within(seconds: float | None, call: Callable[[], Any]) -> Any:
    """What ``call`` returns or raises; ``_TimeIsUp`` if it takes longer.

    A thread that hangs cannot be stopped: it is left behind, and ends with the process.
    """
    done: Queue[tuple[Any, BaseException | None]] = Queue()

    def run() -> None:
        try:
            done.put((call(), None))
        except BaseException as error:
            done.put((None, error))

    Thread(target=run, daemon=True).start()
    try:
        result, error = done.get(timeout=seconds)
    except Empty:
        raise _TimeIsUp from None
    if error is not None:
        raise error
    return result


class _TimeIsUp(Exception):
    """Not TimeoutError, which the function may raise itself."""


def load_function(name: str, timeout: float | None = None) -> FunctionReward:
    """Import ``module:function``; the working directory counts as a place for modules.

    Raises:
        AlignError: No such form, module or function, or the module does not import.
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise AlignError(
            f"reward.function={name!r}: must be module:function, e.g. my_rewards:brevity"
        )
    if module_name.endswith(".py"):
        named = module_name.removesuffix(".py").replace("/", ".")
        raise AlignError(
            f"reward.function={name!r}: a module is named without .py: {named}:{function_name}"
        )
    working_directory = str(Path.cwd())
    if working_directory not in sys.path:
        sys.path.append(working_directory)
    # a module written after Python listed the folder would not be found
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise _import_error(name, module_name, error) from error
        raise AlignError(
            f"reward.function={name!r}: no module {error.name!r} in {working_directory} "
            "or among the installed packages; put it there or mend the name"
        ) from error
    except Exception as error:
        raise _import_error(name, module_name, error) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        found = ", ".join(sorted(k for k, v in vars(module).items() if _is_own(v, module_name)))
        raise AlignError(
            f"reward.function={name!r}: {module_name} has no function {function_name!r}; "
            f"it has {found or 'none'}"
        )
    return FunctionReward(name, function, timeout)


def require_arguments(
    key: str, source: FunctionReward, arguments: Sequence[str] = REWARD_ARGUMENTS
) -> FunctionReward:
    """Refuse a function that cannot be called with these, before anything is computed for it.

    Args:
        key: Of the recipe, such as ``reward.function``.
        arguments: Given by position, in this order.
    """
    try:
        signature = inspect.signature(source.function)
    except (TypeError, ValueError):
        return source  # some that are written in C have none to look at
    try:
        signature.bind(*arguments)
    except TypeError as error:
        name, wanted = source.name.partition(":")[2], ", ".join(arguments)
        raise AlignError(
            f"{key}={source.name!r}: takes {signature}, and is called as {name}({wanted}), each a "
            f"list with one entry for each response: write `def {name}({wanted}):`"
        ) from error
    return source


def checked_scores(name: str, scores: object, count: int) -> list[float]:
    """One finite float for each response, or an AlignError that says which is not."""
    if hasattr(scores, "tolist"):
        # a numpy array or a tensor
        scores = scores.tolist()
    if not isinstance(scores, Sequence) or isinstance(scores, str):
        raise AlignError(
            f"reward {name}: returned {type(scores).__name__}, must return a list of {count} floats"
        )
    if len(scores) != count:
        raise AlignError(
            f"reward {name}: returned {len(scores)} scores for {count} responses; "
            "must return one for each, in their order"
        )
    for row, score in enumerate(scores):
        told = f"reward {name}: the score of response {row} is {score!r}, must be a finite float"
        if not isinstance(score, Real):
            raise AlignError(told)
        if not math.isfinite(score):
            bad = [i for i, s in enumerate(scores) if isinstance(s, Real) and not math.isfinite(s)]
            cure = f"mend reward {name}, which gave it"
            raise NonFiniteError(told, what="score", value=float(score), rows=bad, cure=cure)
    return [float(score) for score in scores]


def _import_error(name: str, module_name: str, error: Exception) -> AlignError:
    return AlignError(
        f"reward.function={name!r}: importing {module_name} raised {_one_line(error)}; "
        "mend the module, or run with --debug to see where"
    )


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _is_own(value: object, module_name: str) -> bool:
    return callable(value) and getattr(value, "__module__", None) == module_name
