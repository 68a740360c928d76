"""Communication between processes: shares, sums, order, errors; DDP and FSDP2."""

from __future__ import annotations

import atexit
import copy
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, LoggerType, gather_object
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional as F

from align.types import AlignError, NonFiniteError, Rollout

T = TypeVar("T")

PATIENCE = timedelta(hours=6)
"""Longest wait of processes for one another, such as while the main one tokenises a data set."""


def check_trackers(trackers: Sequence[str]) -> None:
    """Refuse a tracker that Accelerate does not know, or whose package is not installed."""
    known = [str(t.value) for t in LoggerType if t is not LoggerType.ALL]
    available = {str(getattr(t, "value", t)) for t in get_available_trackers()}
    for name in trackers:
        if name not in known:
            raise AlignError(f"trackers: {name!r}: allowed are {', '.join(known)}")
        if name not in available:
            raise AlignError(f"trackers: {name} is not installed; pip install {name}")


def make_accelerator(trackers: Sequence[str], output_dir: str) -> Accelerator:
    """Make the Accelerator; precision is left to `models.precision`."""
    check_trackers(trackers)
    accelerator = Accelerator(
        mixed_precision="no",
        log_with=list(trackers) or None,
        project_dir=f"{output_dir}/tracking" if trackers else None,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    started = int(os.environ.get("WORLD_SIZE") or 1)
    if accelerator.num_processes != started:
        raise AlignError(
            f"accelerate: {started} processes were started (WORLD_SIZE), but this one knows of "
            f"{accelerator.num_processes}; on a CPU set ACCELERATE_USE_CPU=true"
        )
    return accelerator


@atexit.register
def _part() -> None:
    """Close the process group at exit: a process that exits with it open may crash."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# ---------------------------------------------------------------- one model sharded over all

# fsdp_<key> of an accelerate configuration: its default there, what align needs, and why
FSDP_NEEDS = {
    "version": ("1", "2", "FSDP1 is not supported"),
    "offload_params": ("false", "false", "the weights stay on their devices"),
    "cpu_ram_efficient_loading": ("false", "false", "every process reads the weights"),
    "activation_checkpointing": ("false", "false", "set gradient_checkpointing in the recipe"),
}

_OUTLINES: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()
"""Sharded model -> its unsharded structure, parameters without values."""


def is_sharded() -> bool:
    """Tell whether the launcher asks for FSDP, which Accelerate itself ignores on a CPU."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def check_sharding(stage: str, *, shardable: bool = True, activation_offload: bool = False) -> None:
    """Refuse FSDP for a stage that samples, and those of its settings that have no effect here."""
    if not is_sharded():
        return
    if not shardable:
        raise AlignError(
            f"{stage}: FSDP trains sft, rm and dpo only, because sampling runs the model token by "
            "token, on each process as often as its own responses need; launch it with "
            "recipes/accelerate/8gpu-ddp.yaml"
        )
    if activation_offload:
        raise AlignError(
            "accelerate: FSDP: activation_offload is not supported with it, because a layer's "
            "weights, put together for its forward pass, would be copied too; remove one of them"
        )
    for key, (default, needed, why) in FSDP_NEEDS.items():
        found = os.environ.get(f"FSDP_{key.upper()}", default).lower()
        if found != needed:
            raise AlignError(f"accelerate: fsdp_{key}: is {found}; set it to {needed}: {why}")


def prepare(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Make a model ready for training, before its optimizer: wrapped by DDP, or sharded by
    FSDP2.
    """
    if not is_sharded():
        return accelerator.prepare(model)
    if accelerator.num_processes > 1:
        _OUTLINES[model] = copy.deepcopy(model, {id(p): _hollow(p) for p in model.parameters()})
        shard(model, accelerator)
        accelerator.wait_for_everyone()  # as DDP does: all have looked at the folder before a run
    return model


def shard(model: nn.Module, accelerator: Accelerator) -> None:
    """Shard the parameters over the processes in place, layer by layer, where FSDP is asked for.

    From then on every forward pass takes all processes.
    """
    if not is_sharded() or accelerator.num_processes == 1:
        return
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    inner: Any = model.inner
    layers = set(inner._no_split_modules or ())  # the classes of transformers' decoder layers
    if not any(type(module).__name__ in layers for module in model.modules()):
        raise AlignError(
            f"accelerate: FSDP: {type(inner).__name__} does not say what its layers are, by which "
            "it would be sharded; launch it with recipes/accelerate/8gpu-ddp.yaml"
        )
    for module in list(model.modules()):
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh, reshard_after_forward=_saves_memory())
    fully_shard(model, mesh=mesh)


def _saves_memory() -> bool:
    """``fsdp_reshard_after_forward``: a layer's weights are dropped after its forward pass, and its
    gradients are never held whole. Otherwise both are held, for fewer exchanges."""
    return os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true"


def _hollow(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)


def gather_full_model(model: nn.Module, accelerator: Accelerator) -> Any:
    """The trained model as one process would hold it; None in all processes but the main one.

    A sharded model is put together on the CPU, for which all processes are needed.
    """
    if not isinstance(model, FSDPModule):
        return accelerator.unwrap_model(model) if accelerator.is_main_process else None
    tensors = whole_tensors(own_parameters(model))
    if not accelerator.is_main_process:
        return None
    outline = _OUTLINES[model]
    filled = {
        id(p): nn.Parameter(tensors[name], p.requires_grad)
        for name, p in outline.named_parameters()
    }
    return copy.deepcopy(outline, filled).cpu()


def own_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters by name as the optimizer holds them, this rank's shards if sharded."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # else those that the last forward pass put together are found
    return dict(model.named_parameters())


def whole_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sharded tensors put together, on the main process's CPU and nowhere else; others as they are.

    All processes take part, with the same names in the same order.
    """
    found = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, DTensor):
            found[name] = tensor.detach()
            continue
        together = tensor.full_tensor()
        if tensor.device_mesh.get_rank() == 0:
            found[name] = together.detach().cpu()
    return found


def distribute_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """Move a full tensor to the parameter's device and sharding; scalars are not sharded."""
    tensor = tensor.to(parameter.device)
    if not isinstance(parameter, DTensor) or tensor.ndim == 0:
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)


def clip_gradients(model: nn.Module, limit: float, accelerator: Accelerator) -> float:
    """Scale gradients down to a norm of at most ``limit``; return their norm before that."""
    norm = accelerator.clip_grad_norm_(model.parameters(), limit)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def rounds(own: int, model: nn.Module, accelerator: Accelerator) -> int:
    """Return the microbatches to visit of a rank that has ``own``; equal on all ranks if
    sharded.
    """
    return int(max_over_processes(own, accelerator)) if isinstance(model, FSDPModule) else own


def pad_iterations(
    items: Iterable[T], model: nn.Module, accelerator: Accelerator
) -> Iterator[tuple[T, float]]:
    """Yield each local item with weight 1; a rank that runs out repeats its last item with weight
    0.

    So all ranks of a sharded model run equally many forward passes. Each rank has at least one
    item.
    """
    if not isinstance(model, FSDPModule):
        yield from ((item, 1.0) for item in items)
        return
    own, weight = iter(items), 1.0
    item = next(own)
    while max_over_processes(weight, accelerator):
        yield item, weight
        following = next(own, None)
        weight = float(following is not None)
        item = item if following is None else following


def my_share(items: Sequence[T], accelerator: Accelerator) -> list[T]:
    """Return every world-size-th item, starting at this rank's number."""
    return list(items[accelerator.process_index :: accelerator.num_processes])


def sum_over_processes(numbers: Mapping[str, float], accelerator: Accelerator) -> dict[str, float]:
    """Sum the values of each key over all ranks, float64; keys are equal on all."""
    if accelerator.num_processes == 1:
        return dict(numbers)
    values = torch.tensor(list(numbers.values()), dtype=torch.float64, device=accelerator.device)
    total = accelerator.reduce(values, reduction="sum")
    return dict(zip(numbers, total.tolist(), strict=True))


def add_over_processes(part: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    """Add every rank's tensor of one shape, such as parts that are zero elsewhere."""
    return part if accelerator.num_processes == 1 else accelerator.reduce(part, reduction="sum")


def max_over_processes(number: float, accelerator: Accelerator) -> float:
    """Return the largest value of any rank."""
    if accelerator.num_processes == 1:
        return number
    value = torch.tensor([number], dtype=torch.float64, device=accelerator.device)
    return float(accelerator.gather(value).max())


def raise_together(error: NonFiniteError | None, accelerator: Accelerator) -> None:
    """Raise what any process has found, on every one of them: else the others would wait for ever.

    Rows are the whole's, not the process's.
    """
    if accelerator.num_processes == 1:
        found = [error]
    else:
        found = gather_object([error])
    failed = [e for e in found if e is not None]
    if failed:
        texts = {row: t for e in failed for row, t in zip(e.rows, e.responses, strict=False)}
        rows = sorted(row for e in failed for row in e.rows)
        raise failed[0].having(rows=rows, responses=[texts[row] for row in rows if row in texts])


def gather_in_order(items: Sequence[T], accelerator: Accelerator) -> list[T]:
    """Undo `my_share`: gather all ranks' items in the original order."""
    if accelerator.num_processes == 1:
        return list(items)
    world = accelerator.num_processes
    by_rank = [
        part[1] for part in sorted(gather_object([(accelerator.process_index, list(items))]))
    ]
    total = sum(len(part) for part in by_rank)
    return [by_rank[i % world][i // world] for i in range(total)]


def without_sync(
    accelerator: Accelerator, model: torch.nn.Module, *, last: bool
) -> AbstractContextManager[None]:
    """Exchange gradients on the last microbatch of a step only.

    A sharded model exchanges them on each microbatch, unless the launcher prefers speed to memory,
    since gradients are held in full until then.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last or _saves_memory())
        return nullcontext()
    return nullcontext() if last else accelerator.no_sync(model)


def gather_rollout(rollout: Rollout, samples_per_prompt: int, accelerator: Accelerator) -> Rollout:
    """Gather all ranks' rows in the prompts' original order."""
    if accelerator.num_processes == 1:
        return rollout
    k = samples_per_prompt
    mine = [
        (rollout.prompt_ids[i], *(_rows(rollout, name, i, k) for name in ROLLOUT_TENSORS))
        for i in range(0, len(rollout.prompt_ids), k)
    ]
    prompts: list[Any] = gather_in_order(mine, accelerator)
    width = max(item[1].shape[1] for item in prompts)
    device = rollout.input_ids.device
    columns = zip(*(item[1:] for item in prompts), strict=True)
    tensors = [
        torch.cat([_widened(rows, width) for rows in column]).to(device) for column in columns
    ]
    return Rollout(
        tuple(item[0] for item in prompts for _ in range(k)),
        **dict(zip(ROLLOUT_TENSORS, tensors, strict=True)),
    )


ROLLOUT_TENSORS = ("input_ids", "response_mask", "logprobs", "finished")


def _rows(rollout: Rollout, name: str, start: int, count: int) -> torch.Tensor:
    return getattr(rollout, name)[start : start + count].cpu()


def _widened(rows: torch.Tensor, width: int) -> torch.Tensor:
    return F.pad(rows, (0, width - rows.shape[1])) if rows.ndim == 2 else rows
