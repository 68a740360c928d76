"""Whole checkpoints in safetensors and JSON: all of one there, or none of it.

A checkpoint is written beside its place and renamed into it, so a run that dies in the middle of a
save leaves the checkpoint before it untouched. Nothing is pickled. No random state is saved: every
step seeds its generators from (seed, step), so a resumed run draws what the whole run drew.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from align.types import AlignError

Trained = Mapping[str, tuple[torch.nn.Module, torch.optim.Optimizer]]


def save_checkpoint(
    folder: Path, step: int, trained: Trained, state: Mapping[str, Any], *, keep: int
) -> None:
    """Write ``folder/step-N`` with weights, moments and ``state``, and drop the oldest.

    Args:
        trained: Name of a role (``actor``) -> its model and optimizer.
        state: Whatever else the run needs to go on; JSON values only.
        keep: Newest checkpoints to keep, at least 1.
    """
    place, partial = folder / f"step-{step}", folder / f"partial-step-{step}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for role, (model, optimizer) in trained.items():
            _save_tensors(_trained_parameters(model), partial / f"{role}.safetensors")
            _save_tensors(_moments(model, optimizer), partial / f"{role}.optimizer.safetensors")
        text = json.dumps({"step": step, **state}, indent=2)
        (partial / "state.json").write_text(text, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise AlignError(f"checkpoint {place}: cannot be written: {error}") from error
    shutil.rmtree(place, ignore_errors=True)
    os.replace(partial, place)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def load_checkpoint(place: Path, trained: Trained) -> dict[str, Any]:
    """Put weights and moments back, exactly; returns the saved state with its ``step``."""
    try:
        for role, (model, optimizer) in trained.items():
            weights = load_file(place / f"{role}.safetensors")
            moments = load_file(place / f"{role}.optimizer.safetensors")
            _restore(model, optimizer, weights, moments, place)
        return json.loads((place / "state.json").read_text(encoding="utf-8"))
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise AlignError(f"checkpoint {place}: cannot be read: {error}; remove it") from error


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    found = [p for p in folder.glob("step-*") if (p / "state.json").is_file()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def _trained_parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def _moments(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        f"{names[id(p)]}/{key}": torch.as_tensor(value)
        for p, moments in optimizer.state.items()
        for key, value in moments.items()
    }


def _save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    save_file({name: t.contiguous() for name, t in tensors.items()}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _restore(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    weights: Mapping[str, torch.Tensor],
    moments: Mapping[str, torch.Tensor],
    place: Path,
) -> None:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if parameters.keys() != weights.keys():
        raise AlignError(f"checkpoint {place}: holds other parameters than this recipe trains")
    for name, parameter in parameters.items():
        parameter.data.copy_(weights[name])
        of_this = {k.rpartition("/"): v for k, v in moments.items()}
        state = {key: v for (owner, _, key), v in of_this.items() if owner == name}
        if state:
            # the step count too: a fused AdamW keeps it beside its parameter
            optimizer.state[parameter] = {k: v.to(parameter.device) for k, v in state.items()}
