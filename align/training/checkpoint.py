"""Whole checkpoints in safetensors and JSON: all of one there, or none of it.

A checkpoint is written beside its place, forced to disk and renamed into it, so a run that dies in
the middle of a save leaves the checkpoint before it untouched. ``SHA256SUMS`` has the sum of every
file, and the state names the run, so that a changed bit or a checkpoint of another run is found.
Nothing is pickled. No random state is saved: every step seeds its generators from (seed, step), so
a resumed run draws what the whole run drew.
"""

from __future__ import annotations

import json
import shutil
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from align.base.checksums import SUMS, check_sums, load_tensors, save_tensors, summing
from align.base.files import Unreadable, fsync, load_json, writing
from align.base.folders import replace_folder
from align.base.progress import warn
from align.training.distributed import laid_out_as, own_parameters, whole_tensors
from align.types import AlignError

Trained = Mapping[str, tuple[torch.nn.Module, torch.optim.Optimizer]]

InHand = tuple[Mapping[str, torch.Tensor], Mapping[str, Any]]
"""Tensors and JSON values of a step that was not finished."""

IN_HAND = "in_hand.safetensors"

STATE = "state.json"

UNREADABLE = (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError)
"""Errors of reading a damaged file."""


def save_checkpoint(
    folder: Path,
    step: int,
    trained: Trained,
    state: Mapping[str, Any],
    *,
    keep: int,
    also_keep: Collection[int] = (),
    part: int = 0,
    in_hand: InHand | None = None,
    write: bool = True,
) -> Path:
    """Write ``folder/step-N`` with weights, moments and ``state``, and drop the oldest.

    Args:
        trained: Name of a role (``actor``) -> its model and optimizer.
        state: Whatever else the run needs to go on; JSON values only.
        keep: Newest checkpoints to keep, at least 1.
        also_keep: Steps to keep whatever their age.
        part: How far inside the step after ``step``, where weights have moved on already; the
            place is ``step-N-part-M`` then.
        in_hand: What that unfinished step has made so far.
        write: False in a process that only takes part: of a sharded model each has a part.
    """
    name = f"step-{step}" + (f"-part-{part}" if part else "")
    place, partial, old = folder / name, folder / f"partial-{name}", folder / f"old-{name}"
    files = _files(trained)
    if not write:
        deque(files, maxlen=0)
        return place
    for left in folder.glob("partial-*"):  # by a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    try:
        with writing(place, "the checkpoints before it are untouched", needs=size_of(trained)):
            partial.mkdir(parents=True)
            with summing(partial) as add_sum:
                for file, tensors in files:
                    _save_tensors(tensors, partial / file)
                    add_sum(file)
                text = json.dumps({"step": step, **state}, indent=2)
                (partial / STATE).write_text(text, encoding="utf-8")
                fsync(partial / STATE)
                add_sum(STATE)
            if in_hand is not None:
                _save_in_hand(in_hand, partial, {"step": step, **state})
            fsync(partial)
            replace_folder(partial, place, old)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for other in checkpoints(folder)[:-keep]:
        if _position(other) not in {(kept, 0) for kept in also_keep}:
            shutil.rmtree(other)
    return place


def add_in_hand(place: Path, in_hand: InHand) -> None:
    """Put an unfinished step beside the whole checkpoint that it starts from."""
    with writing(place, "it is whole without what was to be added"):
        _save_in_hand(in_hand, place, _read_state(place))


def load_checkpoint(place: Path, trained: Trained) -> dict[str, Any]:
    """Put weights and moments back, exactly; returns the saved state with its ``step``."""
    try:
        for role, (model, optimizer) in trained.items():
            weights = load_file(place / f"{role}.safetensors")
            moments = load_file(place / f"{role}.optimizer.safetensors")
            _restore(model, optimizer, weights, moments, place)
        return _read_state(place)
    except UNREADABLE as error:
        if isinstance(error, AlignError):
            raise
        raise _unreadable(place, error) from error


def damage(
    place: Path, roles: Iterable[str], *, run: str | None = None, compare: bool = True
) -> str:
    """Why a checkpoint cannot be gone on from, or nothing.

    Args:
        run: The run that it has to be of; an older checkpoint names none.
        compare: Whether files are compared with their sums and the run with ``run``: one process
            of several does that, the others look at headers, sizes and the state.
    """
    names = [f"{role}{end}.safetensors" for role in roles for end in ("", ".optimizer")]
    try:
        for name in names:
            with named(name), safe_open(place / name, framework="pt"):
                pass
        state = _read_state(place)
        if compare:
            if state.get("run") not in (None, run):
                return f"checkpoint {place}: is of another run ({state['run']}, not {run})"
            if not check_sums(place, [STATE, *names]) and "run" in state:
                raise Unreadable(f"{SUMS} is missing")
        # one of a whole step is whole without, see `load_in_hand`
        if _position(place)[1:] > (0,) and _read_in_hand(place) is None:
            raise Unreadable(f"{IN_HAND} is missing, from which its step goes on")
    except UNREADABLE as error:
        return f"checkpoint {place}: cannot be read: {error}"
    return ""


@contextmanager
def named(name: str) -> Iterator[None]:
    """Put a file's name before what safetensors says of it."""
    try:
        yield
    except SafetensorError as error:
        raise Unreadable(f"{name}: {error}") from error


def read_state(place: Path) -> dict[str, Any]:
    """The saved state with its ``step``, without weights."""
    try:
        return _read_state(place)
    except UNREADABLE as error:
        raise _unreadable(place, error) from error


def size_of(trained: Trained) -> int:
    """Bytes of a checkpoint, about: weights and two moments of what is trained."""
    sizes = [
        p.numel() * p.element_size()
        for model, _ in trained.values()
        for p in _trained_parameters(model).values()
    ]
    return 3 * sum(sizes)


def set_aside(place: Path) -> Path:
    """Rename a damaged checkpoint, so that it neither counts nor is lost; returns its new place."""
    names = (f"damaged-{place.name}" + (f"-{n}" if n else "") for n in count())
    aside = next(p for p in map(place.with_name, names) if not p.exists())
    place.rename(aside)
    return aside


def load_in_hand(place: Path) -> InHand | None:
    """Tensors and values that `save_checkpoint` or `add_in_hand` kept of an unfinished step.

    What was added to a whole step and cannot be read is left out, with a line: the step is done
    again from its beginning.
    """
    try:
        return _read_in_hand(place)
    except UNREADABLE as error:
        if _position(place)[1:] > (0,):
            raise _unreadable(place / IN_HAND, error) from error
        warn(f"resume: {place / IN_HAND}: cannot be read: {error}; its step is begun again")
        return None


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first.

    One that was set aside to be replaced counts as long as nothing has taken its place.
    """
    return [place for place in places(folder) if (place / STATE).is_file()]


def places(folder: Path) -> list[Path]:
    """`checkpoints`, and what was one before its state went missing."""
    aside = [p for p in folder.glob("old-step-*") if not (folder / p.name[4:]).exists()]
    found = [p for p in [*folder.glob("step-*"), *aside] if p.is_dir()]
    return sorted(filter(_position, found), key=_position)


def _position(place: Path) -> tuple[int, int] | tuple[()]:
    """``step-N`` or ``step-N-part-M`` -> (N, M), M = 0 where there is none."""
    name = place.name.removeprefix("old-").removeprefix("step-")
    step, _, part = name.partition("-part-")
    return (int(step), int(part or 0)) if (step + part).isdecimal() else ()


def _read_in_hand(place: Path) -> InHand | None:
    path = place / IN_HAND
    if not path.is_file():
        return None
    with named(IN_HAND):
        tensors, state = load_tensors(path)
    of = _read_state(place)
    if any(state.pop(key, of.get(key)) != of.get(key) for key in ("run", "step")):
        raise Unreadable(f"{IN_HAND}: is of another run or step")
    return tensors, state


def _read_state(place: Path) -> dict[str, Any]:
    try:
        state = load_json(place / STATE)
    except Unreadable as error:
        raise Unreadable(f"{STATE}: {error}") from error
    if (state.get("step"),) != _position(place)[:1]:
        raise Unreadable(f"{STATE} is of step {state.get('step')}")
    return state


def _unreadable(place: Path, error: Exception) -> AlignError:
    return AlignError(f"checkpoint {place}: cannot be read: {error}; remove it to use an older one")


def _files(trained: Trained) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """File names and what goes in, one at a time: not all of a large model is held at once."""
    for role, (model, optimizer) in trained.items():
        yield f"{role}.safetensors", whole_tensors(_trained_parameters(model))
        yield f"{role}.optimizer.safetensors", whole_tensors(_moments(model, optimizer))


def _trained_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in own_parameters(model).items() if p.requires_grad}


def _moments(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    names = {id(p): name for name, p in own_parameters(model).items()}
    return {
        f"{names[id(p)]}/{key}": torch.as_tensor(value)
        for p, moments in optimizer.state.items()
        for key, value in moments.items()
    }


def _save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    save_file({name: t.contiguous() for name, t in tensors.items()}, path)
    fsync(path)


def _save_in_hand(in_hand: InHand, folder: Path, state: Mapping[str, Any]) -> None:
    """Bound to its checkpoint by run and step; apart from its sums, as it is added later."""
    of = {key: state[key] for key in ("run", "step") if key in state}
    save_tensors(in_hand[0], folder / IN_HAND, {**in_hand[1], **of})


def _restore(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    weights: Mapping[str, torch.Tensor],
    moments: Mapping[str, torch.Tensor],
    place: Path,
) -> None:
    parameters = _trained_parameters(model)
    shapes = {name: p.shape for name, p in parameters.items()}
    if shapes != {name: w.shape for name, w in weights.items()}:
        raise AlignError(f"checkpoint {place}: holds other parameters than this recipe trains")
    states: dict[str, dict[str, torch.Tensor]] = {}
    for key, moment in moments.items():
        owner, _, name = key.rpartition("/")
        states.setdefault(owner, {})[name] = moment
    for name, state in states.items():
        shapes_of_state = {value.shape for value in state.values() if value.ndim}
        if name not in shapes or not shapes_of_state <= {shapes[name]}:
            raise AlignError(f"checkpoint {place}: holds other moments than this recipe trains")
    for name, parameter in parameters.items():
        parameter.data.copy_(laid_out_as(parameter, weights[name]))
        if name in states:
            # the step count too: a fused AdamW keeps it beside its parameter
            optimizer.state[parameter] = {
                key: laid_out_as(parameter, value) for key, value in states[name].items()
            }
