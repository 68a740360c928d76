"""The only file that knows that there may be several processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, gather_object
from torch.nn import functional as F

from align.types import AlignError, NonFiniteError, Rollout

T = TypeVar("T")


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
    """Precision is not set here: `models.precision` is its one place."""
    check_trackers(trackers)
    return Accelerator(
        mixed_precision="no",
        log_with=list(trackers) or None,
        project_dir=f"{output_dir}/tracking" if trackers else None,
    )


def my_share(items: Sequence[T], accelerator: Accelerator) -> list[T]:
    """Every world-size-th item, starting at this process's number."""
    return list(items[accelerator.process_index :: accelerator.num_processes])


def sum_over_processes(numbers: Mapping[str, float], accelerator: Accelerator) -> dict[str, float]:
    """Sums of the same keys on every process, float64."""
    if accelerator.num_processes == 1:
        return dict(numbers)
    values = torch.tensor(list(numbers.values()), dtype=torch.float64, device=accelerator.device)
    total = accelerator.reduce(values, reduction="sum")
    return dict(zip(numbers, total.tolist(), strict=True))


def add_over_processes(part: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    """The sum of every process's tensor of one shape: parts of a whole, zero where others' are."""
    return part if accelerator.num_processes == 1 else accelerator.reduce(part, reduction="sum")


def max_over_processes(number: float, accelerator: Accelerator) -> float:
    """The largest that any process has."""
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
        raise failed[0].having(rows=sorted(row for e in failed for row in e.rows))


def gather_in_order(items: Sequence[T], accelerator: Accelerator) -> list[T]:
    """Undo `my_share`: every process's items, in the order before they were shared out."""
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
    """Gradients are exchanged on the last microbatch of a step only."""
    return nullcontext() if last else accelerator.no_sync(model)


def gather_rollout(rollout: Rollout, samples_per_prompt: int, accelerator: Accelerator) -> Rollout:
    """Every process's rows in the order of the prompts before they were shared out."""
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
