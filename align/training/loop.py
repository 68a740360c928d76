"""The training loop of SFT, reward model and DPO: minibatches, microbatches, one step each.

The loss of a step is a sum over all counted units of the *global* minibatch divided by their
number, however it is cut into microbatches and spread over ranks: accumulation changes no result.
PPO has a loop of its own in ``stages/ppo/run.py``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from align.base.progress import Progress
from align.config.sections import OptimOptions, TrainOptions
from align.data.batches import Batches
from align.data.tokens.packing import longest_of, pack, windows
from align.models.policy import check_length
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
from align.training.objective import LossFn, Objective, add_sums, means
from align.training.optim import make_optimizer, set_lr
from align.training.saver import Saver
from align.training.session import Session
from align.types import AlignError, TokenBatch, TokenGroup


class TrainingRecipe(Protocol):
    """The keys of a stage's recipe that the loop reads."""

    @property
    def train(self) -> TrainOptions: ...
    @property
    def optim(self) -> OptimOptions: ...
    @property
    def seed(self) -> int: ...
    @property
    def resume(self) -> str: ...


def train(
    model: torch.nn.Module,
    data: tuple[Batches, Sequence[TokenGroup]],
    objective: Objective,
    session: Session,
    recipe: TrainingRecipe,
) -> tuple[dict[str, float], dict[str, float]]:
    """Train ``model`` in place; returns the held-out numbers before and after.

    Args:
        model: The model as `distributed.prepare` returned it.
        data: Training minibatches, at their beginning, and held-out groups.
    """
    batches, held_out = data
    require_minibatches(model, batches, recipe.train, session.accelerator)
    return Trainer(model, batches, held_out, objective, session, recipe).run()


def require_minibatches(
    model: torch.nn.Module, batches: Batches, options: TrainOptions, accelerator: Accelerator
) -> None:
    """Refuse rows that are too long for the model, and minibatches with fewer rows than ranks."""
    if not batches.num_rows:
        raise AlignError("data: no training rows are left; see the dropped rows in manifest.json")

    def must_fit(some: Sequence[TokenGroup]) -> None:
        check_length(accelerator.unwrap_model(model), longest_of(some), "a training row has")

    batches.check(must_fit)
    shortest = min(options.minibatch, batches.num_rows % options.minibatch or options.minibatch)
    if shortest < accelerator.num_processes:
        raise AlignError(
            f"train.minibatch: an epoch's last minibatch has {shortest} rows, too few for "
            f"{accelerator.num_processes} processes; change it"
        )


class Trainer:
    """The loop over optimizer steps, and the state that goes from one step to the next."""

    def __init__(
        self,
        model: torch.nn.Module,
        batches: Batches,
        held_out: Sequence[TokenGroup],
        objective: Objective,
        session: Session,
        recipe: TrainingRecipe,
    ) -> None:
        self.model, self.batches, self.held_out = model, batches, held_out
        self.objective, self.session, self.recipe = objective, session, recipe
        self.accelerator, self.options = session.accelerator, recipe.train
        self.optimizer = make_optimizer(model, recipe.optim)
        self.peak_lr = self.optimizer.param_groups[0]["lr"]
        self.total = num_steps(batches.num_rows, recipe.train)
        self.saver = Saver(
            session.run,
            session.accelerator,
            {"model": (session.accelerator.unwrap_model(model), self.optimizer)},
            keep=recipe.train.keep_checkpoints,
            best_by=recipe.train.keep_best,
        )
        self.microbatches = Microbatches(
            recipe.train.tokens_per_microbatch, num_processes=session.accelerator.num_processes
        )
        self.step = 0  # optimizer steps done
        self.before: dict[str, float] | None = None  # held-out numbers before the first step

    def run(self) -> tuple[dict[str, float], dict[str, float]]:
        """Take all steps; returns the held-out numbers before and after."""
        run = self.session.run
        state = self.saver.resume(self.recipe.resume == "auto")
        # made after `resume`, so that it counts what the resumed run skipped
        self.guard = FiniteGuard(run, on_nonfinite=self.options.on_nonfinite)
        self.load_state_dict(state or {"step": 0})
        with self.saver, Progress(self.total, run.stage, shown=run.is_main) as bar:
            bar.advance(steps=self.step)
            if self.before is None:
                self.before = self.evaluate_and_log(None)
            self.saver.require_best("train.keep_best", self.before)
            self.saver.checkpoint_if_signalled(self.step, self.state_dict())
            if state and state.get("evaluation_due"):
                self.checkpoint()
            for groups in islice(self.batches, self.total - self.step):
                metrics = self.take_step(groups)
                bar.advance(tokens=int(metrics["tokens"]), loss=metrics.get("loss", math.nan))
                self.checkpoint()
            after = self.evaluate_and_log(self.state_dict())
            after = self.saver.take_best(after)
        return self.before, after

    def take_step(self, groups: Sequence[TokenGroup]) -> dict[str, float]:
        """Take one optimizer step on a minibatch, unless a number is not finite; logs metrics."""
        started = time.monotonic()
        lr = set_lr(self.optimizer, self.peak_lr, self.step, self.total, self.recipe.optim)
        metrics = self.accumulate(groups)
        must_be_finite = {"loss": metrics["loss"], "gradient": metrics["grad_norm"]}
        if self.guard.accepts(self.step + 1, must_be_finite, [group.id for group in groups]):
            self.optimizer.step()
        else:
            metrics = {"tokens": metrics["tokens"]}
        self.optimizer.zero_grad(set_to_none=True)
        metrics["tokens_per_microbatch"] = float(self.microbatches.tokens)
        metrics["tokens_per_second"] = metrics["tokens"] / max(time.monotonic() - started, 1e-9)
        metrics |= self.guard.metrics()
        self.step += 1
        if self.step % self.options.log_every == 0 or self.step == self.total:
            self.session.run.log(self.step, {**metrics, "lr": lr, "epoch": self.batches.epoch})
        return metrics

    def accumulate(self, groups: Sequence[TokenGroup]) -> dict[str, float]:
        """Add up a minibatch's gradients over microbatches and clip them; returns its metrics."""
        model, accelerator = self.model, self.accelerator
        model.train()
        mine = my_share(groups, accelerator)
        # every rank knows the whole minibatch, so the denominator needs no exchange
        denominator = max(sum(map(self.objective.num_units, groups)), 1)
        sums: dict[str, float] = {}

        def visit(batch: TokenBatch, last: bool, *, weight: float = 1.0) -> None:
            with without_sync(accelerator, model, last=last):
                output = self.objective.loss_fn(batch.to(accelerator.device), mine)
                # an average over ranks follows; the denominator is already global
                scale = weight * accelerator.num_processes / denominator
                accelerator.backward(output.loss * scale)
            add_sums(sums, output.sums, weight)

        def restart() -> None:
            sums.clear()
            self.optimizer.zero_grad(set_to_none=True)
            seed_step(self.recipe.seed, self.step)

        seed_step(self.recipe.seed, self.step)
        tokens = self.microbatches.accumulate(
            mine,
            visit,
            restart,
            rounds=partial(rounds, model=model, accelerator=accelerator),
            idle=partial(visit, weight=0.0),
        )
        add_sums(sums, {"tokens": (float(tokens), 0.0)})
        norm = clip_gradients(model, self.recipe.optim.max_grad_norm, accelerator)
        # sums over all ranks: every one of them takes the step, or none
        return means(sum_over_processes(sums, accelerator)) | {"grad_norm": norm}

    def checkpoint(self) -> None:
        """Evaluate held-out groups and save, where each is due after this step.

        Raises:
            Interrupted: A signal has come; a checkpoint is saved.
        """
        options, due = self.options, {"evaluation_due": True}
        save = bool(options.save_every) and self.step % options.save_every == 0
        evaluate = bool(options.eval_every) and self.step % options.eval_every == 0
        evaluate = evaluate or (save and options.keep_best is not None)
        # after the last step `run` evaluates in any case
        evaluate = evaluate and self.step < self.total
        found = self.evaluate_and_log(self.state_dict() | due) if evaluate else None
        if save:
            self.saver.save(self.step, self.state_dict(), found)
        self.saver.checkpoint_if_signalled(self.step, self.state_dict())

    def evaluate_and_log(self, state: Mapping[str, Any] | None) -> dict[str, float]:
        """Log what `evaluate` returns.

        Args:
            state: What to save if a signal comes meanwhile; the evaluation is then done again.
        """
        with self.saver.interruptible(self.step, state):
            found = self.evaluate()
        self.session.run.log(self.step, {f"eval_{name}": value for name, value in found.items()})
        return found

    def evaluate(self) -> dict[str, float]:
        """Measure the held-out groups; {} where there are none."""
        if not self.held_out:
            return {}
        loss_fn = self.objective.held_out_loss_fn or self.objective.loss_fn
        found = evaluate_groups(
            self.model,
            self.held_out,
            loss_fn,
            tokens_per_microbatch=self.options.tokens_per_microbatch,
            accelerator=self.accelerator,
        )
        return found | self.objective.derive(found)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds beside weights, moments and the step, as JSON values."""
        return {
            "before": self.before,
            "tokens_per_microbatch": self.microbatches.tokens,
            "left_out_in_a_row": self.guard.in_a_row,
            "batches": self.batches.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict` and the step."""
        self.step, self.before = state["step"], state.get("before")
        if self.step:  # version 0.1 kept a stream's mark alone
            old = {"step": self.step, "mark": state.get("stream")}
            self.batches.load_state_dict(state.get("batches", old))
        self.guard.in_a_row = state.get("left_out_in_a_row", 0)
        self.microbatches.tokens = state.get("tokens_per_microbatch", self.microbatches.tokens)


def num_steps(num_groups: int, options: TrainOptions) -> int:
    """Count the optimizer steps of a run; an epoch's last minibatch may be short."""
    if options.max_steps is not None:
        return options.max_steps
    steps = options.epochs * math.ceil(num_groups / options.minibatch)
    return max(1, math.ceil(round(steps, 6)))  # 1.1 * 10 is above 11


@torch.no_grad()
def evaluate_groups(
    model: torch.nn.Module,
    groups: Sequence[TokenGroup],
    loss_fn: LossFn,
    *,
    tokens_per_microbatch: int,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Return the weighted means of the loss function's sums over all groups."""
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
            add_sums(sums, loss_fn(batch.to(accelerator.device), read).sums, weight)
    return means(sum_over_processes(sums, accelerator))


def seed_step(seed: int, step: int) -> None:
    """Seed Python's, NumPy's and torch's generators as a function of (seed, step)."""
    set_seed((seed * 1_000_003 + step) % 2**31)
