"""A Python function as a reward source.

The function is named in a recipe or on the command line, never in data: naming it runs it.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

from align.types import AlignError, RewardFunction, Text


@dataclass
class FunctionReward:
    """``f(prompts, responses, references) -> scores`` with its answers checked."""

    name: str
    function: RewardFunction

    def __call__(
        self,
        prompts: Sequence[Text],
        responses: Sequence[str],
        references: Sequence[Sequence[str]],
    ) -> list[float]:
        try:
            scores = self.function(prompts, responses, references)
        except Exception as error:
            raise AlignError(
                f"reward function {self.name}: raised {_one_line(error)}; "
                "mend the function, or run with --debug to see where"
            ) from error
        return checked_scores(self.name, scores, len(responses))


def load_function(name: str) -> FunctionReward:
    """Import ``module:function``; the working directory counts as a place for modules.

    Raises:
        AlignError: No such form, module or function, or the module does not import.
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise AlignError(
            f"reward.function={name!r}: must be module:function, e.g. my_rewards:brevity"
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
    return FunctionReward(name, function)


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
        if not isinstance(score, Real) or not math.isfinite(score):
            raise AlignError(
                f"reward {name}: the score of response {row} is {score!r}, must be a finite float"
            )
    return [float(score) for score in scores]


def _import_error(name: str, module_name: str, error: Exception) -> AlignError:
    return AlignError(
        f"reward.function={name!r}: importing {module_name} raised {_one_line(error)}; "
        "mend the module, or run with --debug to see where"
    )


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _is_own(value: object, module_name: str) -> bool:
    return callable(value) and getattr(value, "__module__", None) == module_name
