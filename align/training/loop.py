"""The one loop of SFT, reward model and DPO: minibatches, microbatches, one optimizer step each.

The loss of a step is a sum over all counted units of the *global* minibatch divided by their
number, however it is cut into microbatches and spread over processes: accumulation changes no
result. PPO has a loop of its own in ``stages/ppo/run.py``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from align.base.progress import Progress
from align.config.sections import OptimOptions, TrainOptions
from align.data.batches import Batches
from align.data.tokens.packing import longest_of, pack, windows
from align.models.policy import check_length
from align.run.folder import Run
from align.training.distributed import (
    clip_gradients,
    my_share,
    pad_iterations,
    rounds,
    sum_over_processes,
    without_sync,
)
from align.training.finite import FiniteGuard
from align.training.microbatches import Microbatches
from align.training.optim import make_optimizer, set_lr
from align.training.saver import Saver
from align.types import AlignError, TokenBatch, TokenGroup


@dataclass(frozen=True)
class StepOutput:
    """Loss of one microbatch and the numbers to log.

    Attributes:
        loss: Scalar with a gradient, *summed* over the microbatch's units.
        sums: Name -> (sum, weight): logged as the weighted mean over the whole step; ``loss``
            with the stage's units as its weight.
    """

    loss: Tensor
    sums: Mapping[str, tuple[float, float]]


LossFn = Callable[[TokenBatch, Sequence[TokenGroup]], StepOutput]
"""Function ``(batch, groups)``: sequences of ``batch`` are numbered over the groups in order."""


def train(
    model: torch.nn.Module,
    batches: Batches,
    measure: LossFn,
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
    """Train ``model`` in place; return the held-out numbers before and after.

    Args:
        model: From `distributed.prepare`; ``measure`` runs it.
        batches: At their beginning.
        units: Share of a group in the loss's denominator: counted tokens (SFT) or 1 (pairs).
        evaluate: Held-out numbers; called before the first step and after the last.
    """
    if not batches.num_rows:
        raise AlignError("data: no training rows are left; see the dropped rows in manifest.json")

    def must_fit(some: Sequence[TokenGroup]) -> None:
        check_length(accelerator.unwrap_model(model), longest_of(some), "a training row has")

    batches.check(must_fit)
    shortest = min(train.minibatch, batches.num_rows % train.minibatch or train.minibatch)
    if shortest < accelerator.num_processes:
        raise AlignError(
            f"train.minibatch: an epoch's last minibatch has {shortest} rows, too few for "
            f"{accelerator.num_processes} processes; change it"
        )
    optimizer = make_optimizer(model, optim)
    peak = optimizer.param_groups[0]["lr"]
    total = num_steps(batches.num_rows, train)
    saver = Saver(
        run,
        accelerator,
        {"model": (accelerator.unwrap_model(model), optimizer)},
        keep=train.keep_checkpoints,
        best_by=train.keep_best,
    )
    state = saver.resume(resume) or {"step": 0}
    if state["step"]:  # version 0.1 kept a stream's mark alone
        old = {"step": state["step"], "mark": state.get("stream")}
        batches.load_state_dict(state.get("batches", old))
    guard = FiniteGuard(run, on_nonfinite=train.on_nonfinite)
    guard.in_a_row = state.get("left_out_in_a_row", 0)
    microbatches = Microbatches(
        state.get("tokens_per_microbatch", train.tokens_per_microbatch),
        num_processes=accelerator.num_processes,
    )
    step = state["step"]

    def measured_now() -> dict[str, float]:
        found = evaluate()
        run.log(step, {f"eval_{k}": v for k, v in found.items()})
        return found

    def lasting() -> dict[str, Any]:
        return {
            "before": before,
            "tokens_per_microbatch": microbatches.tokens,
            "left_out_in_a_row": guard.in_a_row,
            "batches": batches.state_dict(),
        }

    with saver, Progress(total, run.stage, shown=run.is_main) as bar:
        bar.advance(steps=step)
        before = state["before"] if "before" in state else measured_now()
        saver.require_best("train.keep_best", before)
        saver.checkpoint_if_signalled(step, lasting())
        for groups in islice(batches, total - step):
            lr = set_lr(optimizer, peak, step, total, optim)
            metrics = _step(
                model,
                optimizer,
                groups,
                measure,
                units,
                microbatches,
                optim,
                accelerator,
                reseed=partial(seed_step, seed, step),
                accept=partial(guard.accepts, step + 1),
            )
            metrics |= guard.metrics()
            step += 1
            bar.advance(tokens=int(metrics["tokens"]), loss=metrics.get("loss", math.nan))
            if step % train.log_every == 0 or step == total:
                run.log(step, {**metrics, "lr": lr, "epoch": batches.epoch})
            save = bool(train.save_every) and step % train.save_every == 0
            look = bool(train.eval_every) and step % train.eval_every == 0
            looked = step < total and (look or (save and train.keep_best))
            held_out = measured_now() if looked else None
            if save:
                saver.save(step, lasting(), held_out)
            if step < total:
                saver.checkpoint_if_signalled(step, lasting())
        after = measured_now()
        if saver.take_best(after):
            after = evaluate()
    return before, after


def num_steps(num_groups: int, options: TrainOptions) -> int:
    """Count the optimizer steps of a run; the last minibatch of an epoch may be short."""
    if options.max_steps is not None:
        return options.max_steps
    steps = options.epochs * math.ceil(num_groups / options.minibatch)
    return max(1, math.ceil(round(steps, 6)))  # 1.1 * 10 is above 11


def _step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    groups: Sequence[TokenGroup],
    measure: LossFn,
    units: Callable[[TokenGroup], int],
    microbatches: Microbatches,
    optim: OptimOptions,
    accelerator: Accelerator,
    *,
    reseed: Callable[[], None],
    accept: Callable[[Mapping[str, float], Sequence[str]], bool],
) -> dict[str, float]:
    """Take one optimizer step over a minibatch, if its numbers are finite."""
    started = time.monotonic()
    model.train()
    mine = my_share(groups, accelerator)
    # every process knows the whole minibatch, so the denominator needs no exchange
    denominator = max(sum(map(units, groups)), 1)
    sums: dict[str, float] = {}

    def visit(batch: TokenBatch, last: bool, *, weight: float = 1.0) -> None:
        with without_sync(accelerator, model, last=last):
            measured = measure(batch.to(accelerator.device), mine)
            # an average over processes follows; the denominator is already global
            scale = weight * accelerator.num_processes / denominator
            accelerator.backward(measured.loss * scale)
        _add(sums, measured.sums, weight)

    def restart() -> None:
        sums.clear()
        optimizer.zero_grad(set_to_none=True)
        reseed()

    reseed()
    tokens = microbatches.accumulate(
        mine,
        visit,
        restart,
        rounds=partial(rounds, model=model, accelerator=accelerator),
        idle=partial(visit, weight=0.0),
    )
    _add(sums, {"tokens": (float(tokens), 0.0)})
    norm = clip_gradients(model, optim.max_grad_norm, accelerator)
    # of all processes: every one of them takes the step, or none
    metrics = _means(sum_over_processes(sums, accelerator))
    metrics["grad_norm"] = norm
    must_be_finite = {"loss": metrics["loss"], "gradient": metrics["grad_norm"]}
    if accept(must_be_finite, [group.id for group in groups]):
        optimizer.step()
    else:
        metrics = {"tokens": metrics["tokens"]}
    optimizer.zero_grad(set_to_none=True)
    metrics["tokens_per_microbatch"] = float(microbatches.tokens)
    metrics["tokens_per_second"] = metrics["tokens"] / max(time.monotonic() - started, 1e-9)
    return metrics


@torch.no_grad()
def evaluate_groups(
    model: torch.nn.Module,
    groups: Sequence[TokenGroup],
    measure: LossFn,
    *,
    tokens_per_microbatch: int,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Average ``measure``'s sums over all groups, weighted."""
    if groups:
        check_length(accelerator.unwrap_model(model), longest_of(groups), "a held-out row has")
    model.eval()
    mine = my_share(list(range(len(groups))), accelerator)
    sums: dict[str, float] = {}

    def batches() -> Iterator[tuple[TokenBatch, Sequence[TokenGroup]]]:
        for members in windows(mine):
            read = [groups[i] for i in members]
            for batch in pack(read, tokens_per_microbatch=tokens_per_microbatch):
                yield batch, read
                bar.advance(steps=0, tokens=batch.num_tokens)
            bar.advance(steps=len(members))

    with Progress(len(mine), "evaluate", unit="row", shown=accelerator.is_main_process) as bar:
        for (batch, read), weight in pad_iterations(batches(), model, accelerator):
            _add(sums, measure(batch.to(accelerator.device), read).sums, weight)
    return _means(sum_over_processes(sums, accelerator))


def _add(
    sums: dict[str, float], more: Mapping[str, tuple[float, float]], times: float = 1.0
) -> None:
    for name, (value, weight) in more.items():
        sums[name] = sums.get(name, 0.0) + times * value
        if weight:
            sums[f"{name}/weight"] = sums.get(f"{name}/weight", 0.0) + times * weight


def _means(sums: Mapping[str, float]) -> dict[str, float]:
    """Divide sums by their weights; a sum without a weight is kept."""
    return {
        name: value / sums.get(f"{name}/weight", 1.0)
        for name, value in sums.items()
        if not name.endswith("/weight")
    }


def seed_step(seed: int, step: int) -> None:
    """Seed Python, NumPy and torch as a function of (seed, step)."""
    set_seed((seed * 1_000_003 + step) % 2**31)
