"""Stages called from Python: what ``align.sft`` and its siblings do."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from align.base import libraries, threads
from align.config.load import load_recipe, stage_of
from align.run.result import RunResult, result_of
from align.stages import STAGES, Stage, recipe_classes, run_stage
from align.stages.given import Given
from align.types import AlignError


def call(command: str, recipe: Any, keys: Mapping[str, Any], tokenizer: Any) -> RunResult:
    """Run a stage in this process and read its folder.

    Raises:
        AlignError: Something the caller can mend; the line names the key or the row.
    """
    load = None if "torch" in sys.modules else threads.read_load()
    with _kept_environment(), Given(tokenizer) as given:
        libraries.set_up(quiet=False)
        built = _load(STAGES[command], recipe, keys, given)
        threads.choose_wait_policy(load, os.environ)
        folder = Path(built.output_dir)
        given.claim(folder, built)
        written = given.save(folder)
        try:
            with _kept_process(), _told(command, given):
                run_stage(STAGES[command], built)
        except BaseException:
            given.discard(folder, written)
            raise
        given.remove_unused(folder)
    gc.collect()  # the next run of a notebook needs the memory of this one's models
    return result_of(folder)


def load(recipe: Any, keys: Mapping[str, Any], command: str | None, tokenizer: Any) -> Any:
    """The recipe of a call as a frozen dataclass; nothing is run or written."""
    if command is None:
        if not isinstance(recipe, str | os.PathLike):
            raise AlignError(f"stage: say which; allowed are {', '.join(STAGES)}")
        command = stage_of(os.fspath(recipe), recipe_classes())
    if command not in STAGES:
        raise AlignError(f"stage: is {command!r}; allowed are {', '.join(STAGES)}")
    with Given(tokenizer) as given:
        built = _load(STAGES[command], recipe, keys, given)
        given.keep(built, Path(built.output_dir))
        return built


def _load(stage: Stage, recipe: Any, keys: Mapping[str, Any], given: Given) -> Any:
    base = _base(stage, recipe, given)
    values = dict(given.flat(stage.recipe, keys))
    given.require_used()
    built: Any = load_recipe(stage.recipe, base, values=values, others=recipe_classes())
    folder = Path(built.output_dir)
    placed = given.place(base, folder), given.place(values, folder)
    if placed == (base, values):
        return built
    return load_recipe(stage.recipe, placed[0], values=placed[1], others=recipe_classes())


def _base(stage: Stage, recipe: Any, given: Given) -> str | dict[str, Any]:
    """A path or a name as text; a mapping or a recipe of ours as a tree of plain values."""
    if isinstance(recipe, str | os.PathLike):
        return os.fspath(recipe)
    if is_dataclass(recipe) and not isinstance(recipe, type):
        if not isinstance(recipe, stage.recipe):
            wanted = stage.recipe.__name__
            raise AlignError(f"recipe: is a {type(recipe).__name__}; `{stage.name}` takes {wanted}")
        given.take(recipe)
        recipe = asdict(recipe)
    if recipe is not None and not isinstance(recipe, Mapping):
        kind = type(recipe).__name__
        raise AlignError(f"recipe: is a {kind}; wanted a path, a shipped name or a mapping of keys")
    tree: dict[str, Any] = {}
    for key, value in given.flat(stage.recipe, recipe or {}):
        *sections, leaf = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[leaf] = value
    return tree


# ---------------------------------------------------------------- the caller's process


@contextmanager
def _told(command: str, given: Given) -> Iterator[None]:
    """Let the manifest say that the run was called from Python, and with what objects."""
    from align.run.folder import CALLER

    facts: dict[str, Any] = {"command": f"align.{FUNCTIONS.get(command, command)}() in Python"}
    if given.facts:
        facts["given"] = given.facts
    token = CALLER.set(facts)
    try:
        yield
    finally:
        CALLER.reset(token)


FUNCTIONS = {"rm": "reward_model", "eval": "evaluate"}
"""Command -> the function of ``align`` that runs it, where their names differ."""


@contextmanager
def _kept_process() -> Iterator[None]:
    """Put back what a run sets in a process that goes on after it."""
    handlers = {number: signal.getsignal(number) for number in _signals()}
    here = str(Path.cwd())  # where functions are looked for
    on_path = here in sys.path
    # rows are tokenised in forked processes, of which the library would warn
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        with warnings.catch_warnings(), _own_accelerate_state(), _quiet_transformers():
            libraries.ignore_warnings()
            yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if not on_path and here in sys.path:
            sys.path.remove(here)
        if "align.rewards.guard" in sys.modules:
            sys.modules["align.rewards.guard"].put_back_exits()


VARIABLES = (
    *libraries.FAST, *libraries.LEAN, "OMP_WAIT_POLICY", "TOKENIZERS_PARALLELISM",
    "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL",
)  # fmt: skip
"""Variables that a run may set for libraries, which read them when they are loaded."""


@contextmanager
def _kept_environment() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in VARIABLES}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _signals() -> list[signal.Signals]:
    """Signals for which a run has handlers; none in a thread, where none can be set."""
    if threading.current_thread() is not threading.main_thread():
        return []
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGVTALRM")
    found = [getattr(signal, name) for name in names if hasattr(signal, name)]
    return [number for number in found if signal.getsignal(number) is not None]


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence its bars and its reports of a new head: a run says itself what it loads."""
    from huggingface_hub import utils as hub
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub_bars = not hub.are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        with warnings.catch_warnings():  # where a variable forbids the hub's
            warnings.simplefilter("ignore")
            if bars:
                logging.enable_progress_bar()
            if hub_bars:
                hub.enable_progress_bars()
            else:
                hub.disable_progress_bars()


@contextmanager
def _own_accelerate_state() -> Iterator[None]:
    """Run with a state of Accelerate's of our own: the caller's may have another precision, and
    ours must not keep the caller from choosing one afterwards."""
    from accelerate.state import AcceleratorState, GradientState

    kept = [(state, dict(state._shared_state)) for state in (AcceleratorState, GradientState)]
    for state, _ in kept:
        state._shared_state.clear()
    try:
        yield
    finally:
        for state, shared in kept:
            state._shared_state.clear()
            state._shared_state.update(shared)
