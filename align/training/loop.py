"""The one loop of SFT, reward model and DPO: minibatches, microbatches, one optimizer step each.

The loss of a step is a sum over all counted units of the *global* minibatch divided by their
number, however it is cut into microbatches and spread over processes: accumulation changes no
result. PPO has a loop of its own in ``stages/ppo.py``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from align.data.packing import longest_of, pack, windows
from align.models.policy import check_length
from align.options import OptimOptions, TrainOptions
from align.progress import Progress, say
from align.run_folder import Run
from align.training.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from align.training.distributed import my_share, sum_over_processes, without_sync
from align.training.microbatches import Microbatches
from align.training.optim import make_optimizer, set_lr
from align.types import AlignError, TokenBatch, TokenGroup


@dataclass(frozen=True)
class Measured:
    """What a stage says of one microbatch.

    Attributes:
        loss: Scalar with a gradient, *summed* over the microbatch's units.
        sums: Name -> (sum, weight): logged as the weighted mean over the whole step; ``loss``
            with the stage's units as its weight.
    """

    loss: Tensor
    sums: Mapping[str, tuple[float, float]]


Measure = Callable[[TokenBatch, Sequence[int]], Measured]
"""``measure(batch, members)``: sequences of ``batch`` are numbered over ``members``' groups in
order; ``members`` are indices into the whole list of groups."""


def train(
    model: torch.nn.Module,
    groups: Sequence[TokenGroup],
    measure: Measure,
    *,
    units: Callable[[TokenGroup], int],
    evaluate: Callable[[], dict[str, float]],
    run: Run,
    accelerator: Accelerator,
    train: TrainOptions,
    optim: OptimOptions,
    seed: int,
    resume: bool,
) -> tuple[dict[str, float], dict[str, float]]:
    """Train ``model`` in place; returns the held-out numbers before and after.

    Args:
        model: Prepared by ``accelerator``; ``measure`` runs it.
        units: What a group adds to the loss's denominator: counted tokens (SFT) or 1 (pairs).
        evaluate: Held-out numbers; called before the first step and after the last.
    """
    if not groups:
        raise AlignError("data: no training rows are left; see the dropped rows in manifest.json")
    check_length(accelerator.unwrap_model(model), longest_of(groups), "a training row has")
    shortest = min(train.minibatch, len(groups) % train.minibatch or train.minibatch)
    if shortest < accelerator.num_processes:
        raise AlignError(
            f"train.minibatch: an epoch's last minibatch has {shortest} rows, too few for "
            f"{accelerator.num_processes} processes; change it"
        )
    optimizer = make_optimizer(model, optim)
    peak = optimizer.param_groups[0]["lr"]
    trained = {"model": (accelerator.unwrap_model(model), optimizer)}
    total, per_epoch = num_steps(len(groups), train), steps_per_epoch(len(groups), train)
    before, step = _resumed(run, trained, total, resume)
    if before is None:
        before = evaluate()
        run.log(0, {f"eval_{k}": v for k, v in before.items()})
    microbatches = Microbatches(
        train.tokens_per_microbatch, num_processes=accelerator.num_processes
    )
    with Progress(total, run.stage, shown=run.is_main) as bar:
        bar.advance(steps=step)
        for members in minibatches(len(groups), train.minibatch, seed, start=step, stop=total):
            lr = set_lr(optimizer, peak, step, total, optim)
            metrics = _step(
                model,
                optimizer,
                groups,
                members,
                measure,
                units,
                microbatches,
                optim,
                accelerator,
                _mix(seed, step),
            )
            step += 1
            bar.advance(tokens=int(metrics["tokens"]), loss=metrics["loss"])
            if step % train.log_every == 0 or step == total:
                run.log(step, {**metrics, "lr": lr, "epoch": step / per_epoch})
            if train.eval_every and step % train.eval_every == 0 and step < total:
                run.log(step, {f"eval_{k}": v for k, v in evaluate().items()})
            if train.save_every and step % train.save_every == 0 and accelerator.is_main_process:
                folder = run.folder / "checkpoints"
                save_checkpoint(
                    folder, step, trained, {"before": before}, keep=train.keep_checkpoints
                )
    after = evaluate()
    run.log(step, {f"eval_{k}": v for k, v in after.items()})
    return before, after


def num_steps(num_groups: int, options: TrainOptions) -> int:
    """Optimizer steps of a run; the last minibatch of an epoch may be short, none is dropped."""
    if options.max_steps is not None:
        return options.max_steps
    steps = options.epochs * steps_per_epoch(num_groups, options)
    return max(1, math.ceil(round(steps, 6)))  # 1.1 * 10 is above 11


def steps_per_epoch(num_groups: int, options: TrainOptions) -> int:
    return math.ceil(num_groups / options.minibatch)


def minibatches(
    num_groups: int, size: int, seed: int, *, start: int, stop: int
) -> Iterator[list[int]]:
    """Members of steps ``start`` to ``stop``: a new permutation every epoch, a pure function of
    (seed, step), so that a resumed run needs no sampler state."""
    per_epoch = math.ceil(num_groups / size)
    epoch, order = -1, np.zeros(0, dtype=np.int64)
    for step in range(start, stop):
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            order = np.random.default_rng([seed, epoch]).permutation(num_groups)
        at = (step % per_epoch) * size
        yield order[at : at + size].tolist()


def _step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    groups: Sequence[TokenGroup],
    members: Sequence[int],
    measure: Measure,
    units: Callable[[TokenGroup], int],
    microbatches: Microbatches,
    optim: OptimOptions,
    accelerator: Accelerator,
    step_seed: int,
) -> dict[str, float]:
    """One optimizer step over the minibatch ``members``."""
    started = time.monotonic()
    model.train()
    mine = my_share(members, accelerator)
    # every process knows the whole minibatch, so the denominator needs no exchange
    denominator = max(sum(units(groups[i]) for i in members), 1)
    sums: dict[str, float] = {}

    def visit(batch: TokenBatch, last: bool) -> None:
        with without_sync(accelerator, model, last=last):
            measured = measure(batch.to(accelerator.device), mine)
            # DDP averages over processes; the denominator is already global
            accelerator.backward(measured.loss * (accelerator.num_processes / denominator))
        _add(sums, measured.sums)

    def restart() -> None:
        sums.clear()
        optimizer.zero_grad(set_to_none=True)
        torch.manual_seed(step_seed)

    torch.manual_seed(step_seed)
    tokens = microbatches.accumulate([groups[i] for i in mine], visit, restart)
    _add(sums, {"tokens": (float(tokens), 0.0)})
    norm = accelerator.clip_grad_norm_(model.parameters(), optim.max_grad_norm)
    _check_finite(norm, members, groups)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    metrics = _means(sum_over_processes(sums, accelerator))
    metrics["grad_norm"] = float(norm)
    metrics["tokens_per_microbatch"] = float(microbatches.tokens)
    metrics["tokens_per_second"] = metrics["tokens"] / max(time.monotonic() - started, 1e-9)
    return metrics


@torch.no_grad()
def evaluate_groups(
    model: torch.nn.Module,
    groups: Sequence[TokenGroup],
    measure: Measure,
    *,
    tokens_per_microbatch: int,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Weighted means of ``measure``'s sums over all groups."""
    if groups:
        check_length(accelerator.unwrap_model(model), longest_of(groups), "a held-out row has")
    model.eval()
    mine = my_share(list(range(len(groups))), accelerator)
    sums: dict[str, float] = {}
    with Progress(len(mine), "evaluate", unit="row", shown=accelerator.is_main_process) as bar:
        for members in windows(mine):
            read = [groups[i] for i in members]
            for batch in pack(read, tokens_per_microbatch=tokens_per_microbatch):
                _add(sums, measure(batch.to(accelerator.device), members).sums)
                bar.advance(steps=0, tokens=batch.num_tokens)
            bar.advance(steps=len(members))
    return _means(sum_over_processes(sums, accelerator))


def _add(sums: dict[str, float], more: Mapping[str, tuple[float, float]]) -> None:
    for name, (value, weight) in more.items():
        sums[name] = sums.get(name, 0.0) + value
        if weight:
            sums[f"{name}/weight"] = sums.get(f"{name}/weight", 0.0) + weight


def _means(sums: Mapping[str, float]) -> dict[str, float]:
    """Sums over their weights; a sum without a weight stays a sum."""
    return {
        name: value / sums.get(f"{name}/weight", 1.0)
        for name, value in sums.items()
        if not name.endswith("/weight")
    }


def _check_finite(norm: Any, members: Sequence[int], groups: Sequence[TokenGroup]) -> None:
    if not math.isfinite(float(norm)):
        rows = ", ".join(groups[i].id for i in list(members)[:3])
        raise AlignError(
            f"training: the gradient became {float(norm)}; lower optim.lr, or look at the rows of "
            f"this step ({rows}, ...)"
        )


def _resumed(
    run: Run, trained: Any, total: int, resume: bool
) -> tuple[dict[str, float] | None, int]:
    """Go on from the newest whole checkpoint: (held-out numbers of the start, its step)."""
    found = checkpoints(run.folder / "checkpoints") if resume else []
    if not found:
        run.begin()
        run.forget_after(-1)
        return None, 0
    run.resume()
    state = load_checkpoint(Path(found[-1]), trained)
    run.forget_after(state["step"])
    if run.is_main:
        say(f"{run.stage}: resumed from {found[-1]} ({state['step']} of {total} steps done)")
    return state["before"], state["step"]


def _mix(seed: int, step: int) -> int:
    return (seed * 1_000_003 + step) % 2**31
