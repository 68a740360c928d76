"""Atomic checkpoints in safetensors and JSON, taken between two steps.

A checkpoint is written beside its place, forced to disk and renamed into it, so a run that dies in
the middle of a save leaves the checkpoint before it untouched. ``SHA256SUMS`` has the sum of every
file, and the state names the run, so that a changed bit or a checkpoint of another run is found.
Nothing is pickled. No random state is saved: every step seeds its generators from (seed, step), so
a resumed run draws the same random numbers as the uninterrupted one.
"""

from __future__ import annotations

import json
import shutil
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from align.base.checksums import SUMS, check_sums, summing
from align.base.files import Unreadable, fsync, load_json, writing
from align.base.folders import replace_folder
from align.training.distributed import distribute_like, own_parameters, whole_tensors
from align.types import AlignError

Trained = Mapping[str, tuple[torch.nn.Module, torch.optim.Optimizer]]
Shape = tuple[int, ...]

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
    write: bool = True,
) -> Path:
    """Write ``folder/step-N`` with weights, moments and ``state``, and remove the oldest.

    Args:
        trained: Name of a role (``actor``) -> its model and optimizer.
        state: Everything else that the run needs to resume; JSON values only.
        keep: Newest checkpoints to keep, at least 1.
        also_keep: Steps to keep whatever their age.
        write: False on the ranks that only take part in gathering a sharded model.
    """
    name = f"step-{step}"
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
            fsync(partial)
            replace_folder(partial, place, old)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for other in checkpoints(folder)[:-keep]:
        if _position(other) not in {(kept, 0) for kept in also_keep}:
            shutil.rmtree(other)
    return place


def load_checkpoint(place: Path, trained: Trained) -> dict[str, Any]:
    """Put weights and moments back, exactly; returns the saved state with its ``step``."""
    try:
        for role, (model, optimizer) in trained.items():
            weights, moments = (load_file(place / file) for file in _names(role))
            _restore(model, optimizer, weights, moments, place)
        return _read_state(place)
    except UNREADABLE as error:
        if isinstance(error, AlignError):
            raise
        raise _unreadable(place, error) from error


def damage(place: Path, trained: Trained, *, run: str | None = None, compare: bool = True) -> str:
    """Say why a run cannot resume from a checkpoint; an empty string where it can.

    Args:
        trained: Models and optimizers of the run; none of their values is read.
        run: Id of the run that the checkpoint must belong to; an older checkpoint names none.
        compare: Whether to compare files with their sums and the run with ``run``. One rank of
            several does that, the others look at headers, sizes and the state.
    """
    if _position(place)[1:] > (0,):
        return f"checkpoint {place}: an older align saved it in the middle of a PPO iteration"
    names = [file for role in trained for file in _names(role)]
    try:
        headers = {name: _read_shapes(place / name) for name in names}
        state = _read_state(place)
        if compare:
            if state.get("run") not in (None, run):
                return f"checkpoint {place}: is of another run ({state['run']}, not {run})"
            if not check_sums(place, [STATE, *names]) and "run" in state:
                raise Unreadable(f"{SUMS} is missing")
    except UNREADABLE as error:
        return f"checkpoint {place}: cannot be read: {error}"
    for role, (model, optimizer) in trained.items():
        weights, moments = (headers[file] for file in _names(role))
        other = _difference(_trained_parameters(model, optimizer), weights, moments)
        if other:
            return f"checkpoint {place}: {other}"
    return ""


def _names(role: str) -> tuple[str, str]:
    """Name the files of a role's weights and moments."""
    return f"{role}.safetensors", f"{role}.optimizer.safetensors"


def _read_shapes(path: Path) -> dict[str, Shape]:
    """Read the names and shapes of a file's tensors, not their values."""
    with named(path.name), safe_open(path, framework="pt") as file:
        keys = file.keys()
        return {key: tuple(file.get_slice(key).get_shape()) for key in keys}


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _difference(
    parameters: Mapping[str, torch.Tensor],
    weights: Mapping[str, Shape],
    moments: Mapping[str, Shape],
) -> str:
    """Compare a checkpoint's tensors with what the run trains; an empty string if they agree."""
    shapes = _shapes(parameters)
    if shapes != weights:
        return "holds other parameters than this recipe trains"
    for key, shape in moments.items():
        if shape not in ((), shapes.get(key.rpartition("/")[0])):  # a step count has no dimension
            return "holds other moments than this recipe trains"
    return ""


@contextmanager
def named(name: str) -> Iterator[None]:
    """Prefix safetensors' error with the file's name."""
    try:
        yield
    except SafetensorError as error:
        raise Unreadable(f"{name}: {error}") from error


def read_state(place: Path) -> dict[str, Any]:
    """Read the saved state with its ``step``, without weights."""
    try:
        return _read_state(place)
    except UNREADABLE as error:
        raise _unreadable(place, error) from error


def size_of(trained: Trained) -> int:
    """Estimate the bytes of a checkpoint: weights and two moments of what is trained."""
    sizes = [
        p.numel() * p.element_size()
        for model, optimizer in trained.values()
        for p in _trained_parameters(model, optimizer).values()
    ]
    return 3 * sum(sizes)


def set_aside(place: Path) -> Path:
    """Rename a damaged checkpoint, so that it neither counts nor is lost; return its new path."""
    names = (f"damaged-{place.name}" + (f"-{n}" if n else "") for n in count())
    aside = next(p for p in map(place.with_name, names) if not p.exists())
    place.rename(aside)
    return aside


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first.

    One that was set aside to be replaced counts as long as nothing has taken its place.
    """
    return [place for place in places(folder) if (place / STATE).is_file()]


def places(folder: Path) -> list[Path]:
    """List `checkpoints`, and folders that lost their state."""
    aside = [p for p in folder.glob("old-step-*") if not (folder / p.name[4:]).exists()]
    found = [p for p in [*folder.glob("step-*"), *aside] if p.is_dir()]
    return sorted(filter(_position, found), key=_position)


def _position(place: Path) -> tuple[int, int] | tuple[()]:
    """Parse ``step-N`` as (N, 0), and ``step-N-part-M`` of an older align as (N, M)."""
    name = place.name.removeprefix("old-").removeprefix("step-")
    step, _, part = name.partition("-part-")
    return (int(step), int(part or 0)) if (step + part).isdecimal() else ()


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
    """Yield file names and contents, one at a time, so that a large model is not held twice."""
    for role, (model, optimizer) in trained.items():
        weights, moments = _names(role)
        yield weights, whole_tensors(_trained_parameters(model, optimizer))
        yield moments, whole_tensors(_moments(model, optimizer))


def _trained_parameters(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, torch.nn.Parameter]:
    """Return what the optimizer steps, by name.

    ``requires_grad`` does not tell: it is switched for a while where a reference is read through
    an adapter that is off, or weights are cast once, and a signal may come meanwhile.
    """
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {name: p for name, p in own_parameters(model).items() if id(p) in stepped}


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


def _restore(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    weights: Mapping[str, torch.Tensor],
    moments: Mapping[str, torch.Tensor],
    place: Path,
) -> None:
    parameters = _trained_parameters(model, optimizer)
    other = _difference(parameters, _shapes(weights), _shapes(moments))
    if other:
        raise AlignError(f"checkpoint {place}: {other}")
    states: dict[str, dict[str, torch.Tensor]] = {}
    for key, moment in moments.items():
        owner, _, name = key.rpartition("/")
        states.setdefault(owner, {})[name] = moment
    for name, parameter in parameters.items():
        parameter.data.copy_(distribute_like(parameter, weights[name]))
        if name in states:
            # the step count too: a fused AdamW keeps it beside its parameter
            optimizer.state[parameter] = {
                key: distribute_like(parameter, value) for key, value in states[name].items()
            }
