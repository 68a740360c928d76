"""Rules of the run doctor: one pure function for each kind of trouble.

A rule takes a run's log and manifest, and returns one `Finding` or None. Limits are rules of thumb,
explained in docs/metrics.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import sqrt
from statistics import fmean, median
from typing import Any

Row = Mapping[str, Any]

LOSS_RISE = 1.2
"""Ratio of the training loss at the end to that at the start."""
OVERFIT = 1.05
"""Ratio of the final to the lowest held-out loss, while the training loss falls."""
SCORE_RISE = 0.5
"""Smallest rise of the mean score, in standard deviations of the first scores."""
FEWEST = 8
"""Fewest rows for a trend."""
LAST = 3
"""Fewest rows at the end whose mean is the final value."""
NOISE = 5.0
"""Smallest difference of start and end for a trend, in standard errors. A run is checked some
twenty times, and its rows are not independent."""


@dataclass(frozen=True)
class Finding:
    """One trouble: ``value`` is beyond ``limit``, in the unit of its rule."""

    kind: str
    value: float
    limit: float
    says: str
    cure: str

    def __str__(self) -> str:
        return f"{self.says} [{self.kind}]; {self.cure}"


class Rows:
    """Logged numbers by name, with their start and end."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __call__(self, name: str) -> list[float]:
        return [float(row[name]) for row in self.rows if name in row]

    def ends(
        self, name: str, mean: Callable[[Sequence[float]], float] = fmean
    ) -> tuple[float, float] | None:
        """Return means over the first and the last fifth; None with too few rows."""
        values = self(name)
        if len(values) < FEWEST:
            return None
        fifth = max(LAST, len(values) // 5)
        return mean(values[:fifth]), mean(values[-fifth:])

    def trend(
        self, name: str, mean: Callable[[Sequence[float]], float] = fmean
    ) -> tuple[float, float] | None:
        """Return `ends`, or None if they differ by no more than the noise between rows.

        The noise of a row is estimated from the median step between neighbours (0.954 standard
        deviations if rows are normal), which neither a trend nor a few wild rows change much.
        """
        values, ends = self(name), self.ends(name, mean)
        if ends is None:
            return None
        steps = [abs(after - before) for before, after in pairwise(values)]
        window = max(LAST, len(values) // 5)
        error = median(steps) / 0.954 * sqrt(2 / window)
        return ends if abs(ends[1] - ends[0]) > NOISE * error else None

    def end(self, name: str) -> float | None:
        """Return the mean over the last fifth; None with too few rows."""
        values = self(name)
        return fmean(values[-max(LAST, len(values) // 5) :]) if len(values) >= LAST else None


def kl_over_budget(rows: Rows, manifest: Row, limit: float) -> Finding | None:
    end, recipe = rows.end("kl"), manifest.get("recipe", {})
    if recipe.get("kl.adaptive"):
        limit = 1.5 * float(recipe["kl.target"])
    if end is None or end <= limit:
        return None
    says = f"KL to the reference is {end:.3g} nats per response, over its budget of {limit:.3g}"
    return Finding(
        "kl_over_budget", end, limit, says, "raise kl.coef, lower optim.lr, or stop earlier"
    )


def _score_rises(rows: Rows) -> bool:
    score, spread = rows.ends("score_mean"), rows.ends("score_std")
    return bool(score and spread and score[1] - score[0] > SCORE_RISE * spread[0])


def length_hacking(rows: Rows, manifest: Row, limit: float) -> Finding | None:
    ends = rows.trend("length_mean")
    if ends is None or ends[1] <= limit * ends[0] or not _score_rises(rows):
        return None
    says = (
        f"the score rises together with the length: {ends[0]:.3g} -> {ends[1]:.3g} tokens per "
        f"response, more than {limit:g} times as long"
    )
    cure = "compare rewards at equal length, take length out of the reward, or raise kl.coef"
    return Finding("length_hacking", ends[1] / ends[0], limit, says, cure)


def repetition_hacking(rows: Rows, manifest: Row, limit: float) -> Finding | None:
    ends = rows.trend("repetition")
    if ends is None or ends[1] - ends[0] <= limit or not _score_rises(rows):
        return None
    says = (
        f"the score rises together with repetition: {ends[0]:.0%} -> {ends[1]:.0%} of trigrams had "
        f"been there before, a rise of more than {limit:.0%}"
    )
    cure = "read samples.jsonl; mend the reward, or raise kl.coef"
    return Finding("repetition_hacking", ends[1] - ends[0], limit, says, cure)


def entropy_collapse(rows: Rows, manifest: Row, limit: float) -> Finding | None:
    ends = rows.trend("entropy")
    if ends is None or ends[1] >= limit * ends[0]:
        return None
    says = (
        f"entropy collapsed: {ends[0]:.3g} -> {ends[1]:.3g} nats per token, below {limit:g} of its "
        "start, so samples no longer differ"
    )
    cure = "raise kl.coef, set ppo.entropy_coef, or lower optim.lr"
    return Finding("entropy_collapse", ends[1] / ends[0], limit, says, cure)


def eos_falling(rows: Rows, manifest: Row, limit: float) -> Finding | None:
    ends = rows.trend("eos_rate")
    if ends is None or ends[0] - ends[1] <= limit:
        return None
    says = (
        f"responses stop ending: {ends[0]:.0%} -> {ends[1]:.0%} end by themselves, a fall of more "
        f"than {limit:.0%}"
    )
    cure = "set ppo.missing_eos_score below what a bad answer earns, or raise max_new_tokens"
    return Finding("eos_falling", ends[0] - ends[1], limit, says, cure)


def clip_fraction(rows: Rows, manifest: Row, limit: float) -> Finding | None:
    end = rows.end("clip_fraction")
    if end is None or end <= limit:
        return None
    says = f"{end:.0%} of tokens are clipped and teach nothing, more than {limit:.0%}"
    return Finding("clip_fraction", end, limit, says, "lower optim.lr or ppo.epochs")


def approx_kl(rows: Rows, manifest: Row, limit: float) -> Finding | None:
    end = rows.end("approx_kl")
    if end is None or end <= limit:
        return None
    says = f"an update moves the policy by {end:.3g} nats per token, more than {limit:g}"
    return Finding("approx_kl", end, limit, says, "lower optim.lr, ppo.epochs or ppo.clip_range")


def sampled_otherwise(rows: Rows, manifest: Row, limit: float) -> Finding | None:
    end = rows.end("first_ratio_error")
    if end is None or end <= limit:
        return None
    says = (
        "sampling and training disagree on log-probabilities: with the same weights their ratio is "
        f"off from 1 by up to {end:.2g}, more than {limit:g}, which rounding to bf16 does not do"
    )
    cure = "set precision=fp32 and see whether the run stops, and report it with the model's name"
    return Finding("sampled_otherwise", end, limit, says, cure)


def critic_useless(rows: Rows, manifest: Row, limit: float) -> Finding | None:
    ends = rows.ends("explained_variance")
    if ends is None or ends[1] > limit:
        return None
    says = (
        f"the critic explains nothing: explained variance {ends[1]:.2g}, wanted above {limit:g} (a "
        "constant has 0)"
    )
    cure = "give it ppo.critic_warmup or a higher critic.lr, or start it from the reward model"
    return Finding("critic_useless", ends[1], limit, says, cure)


def never_ends(rows: Rows, manifest: Row, limit: float) -> Finding | None:
    end = rows.end("eos_rate")
    if end is None or end >= limit:
        return None
    says = f"{end:.0%} of responses end by themselves, fewer than {limit:.0%}: the rest are cut off"
    cure = "raise generation.max_new_tokens, or do SFT on answers that end first"
    return Finding("never_ends", end, limit, says, cure)


def scores_equal(rows: Rows, manifest: Row, limit: float) -> Finding | None:
    end = rows.end("score_std")
    if end is None or end > limit:
        return None
    says = "all responses of a rollout score the same, so that there is nothing to learn"
    return Finding("scores_equal", end, limit, says, "read samples.jsonl and mend the reward")


def held_out_worse(rows: Rows, manifest: Row, limit: float) -> Finding | None:
    loss = rows("eval_loss")
    train = rows.ends("loss")
    if len(loss) < 2 or loss[-1] <= limit * loss[0] or manifest.get("best"):
        return None  # `best`: the run kept weights from before it became worse
    if train and train[1] < min(train[0], loss[0]):
        return None  # that is `too_little_data`
    says = (
        f"training made held-out rows worse: loss {loss[0]:.3g} -> {loss[-1]:.3g}, over {limit:g} "
        "times what it was before the first step"
    )
    cure = "lower optim.lr (try a third), or see that training and held-out rows are of one task"
    return Finding("held_out_worse", loss[-1] / loss[0], limit, says, cure)


def unfinished(rows: Rows, manifest: Row, limit: float) -> Finding | None:
    """Find a run that is neither done nor running."""
    status = manifest.get("status")
    if status not in ("failed", "interrupted", "died"):
        return None
    steps = max(rows("step"), default=0.0)
    why = f": {manifest['error']}" if manifest.get("error") else ""
    says = f"the run did not reach its end ({status} after step {steps:g}){why}"
    cure = "resume with resume=auto if it has checkpoints, or start anew with overwrite=true"
    return Finding("unfinished", steps, limit, says, cure)


def reward_model_weak(rows: Rows, manifest: Row, limit: float) -> Finding | None:
    accuracy = rows("eval_accuracy")
    if len(accuracy) < 2:  # the first is from before training
        return None
    longer = float(manifest.get("held_out", {}).get("accuracy_of_longer", 0.0))
    limit = max(limit, longer)
    interval = manifest.get("held_out_accuracy_ci95")
    if (interval[0] if interval else accuracy[-1]) > limit:
        return None
    rival = "preferring the longer answer" if longer == limit else "a coin"
    how = "no better" if accuracy[-1] <= limit else "not surely better"
    within = f" (95% interval {interval[0]:.0%} to {interval[1]:.0%})" if interval else ""
    says = (
        f"the reward model is right on {accuracy[-1]:.0%} of held-out pairs{within}, {how} than "
        f"{rival} ({limit:.0%})"
    )
    cure = "give it more pairs, or pairs that differ more; do not optimise it yet"
    return Finding("reward_model_weak", accuracy[-1], limit, says, cure)


def chosen_falling(rows: Rows, manifest: Row, limit: float) -> Finding | None:
    beta = float(manifest.get("recipe", {}).get("dpo.beta", 0.1))
    chosen, rejected = rows.ends("rewards_chosen"), rows.ends("rewards_rejected")
    if chosen is None or rejected is None or chosen[1] / beta >= limit or rejected[1] >= 0:
        return None
    says = (
        f"chosen answers lose probability as well as rejected ones: {chosen[1] / beta:.3g} and "
        f"{rejected[1] / beta:.3g} nats per response against the reference, beyond {limit:g}"
    )
    cure = "raise dpo.beta, lower optim.lr, add dpo.sft_coef, or do SFT on the chosen answers first"
    return Finding("chosen_falling", chosen[1] / beta, limit, says, cure)


def lr_too_high(rows: Rows, manifest: Row, limit: float) -> Finding | None:
    cure = "lower optim.lr (try a third), or raise optim.warmup_fraction"
    ends = rows.trend("grad_norm", median)
    if ends is not None and ends[1] > limit * ends[0] > 0:
        says = f"the gradient grew from {ends[0]:.3g} to {ends[1]:.3g}, over {limit:g} times"
        return Finding("lr_too_high", ends[1] / ends[0], limit, says, cure)
    ends = rows.trend("loss")
    if ends is not None and ends[1] > LOSS_RISE * ends[0] > 0:
        says = f"the training loss rose from {ends[0]:.3g} to {ends[1]:.3g}, over {LOSS_RISE} times"
        return Finding("lr_too_high", ends[1] / ends[0], LOSS_RISE, says, cure)
    return None


def too_little_data(rows: Rows, manifest: Row, limit: float) -> Finding | None:
    count = limit if "stream" in manifest else manifest.get("train_rows", limit)
    if count < limit:
        says = f"only {count} training rows, fewer than {limit:g}: they will be learnt by heart"
        return Finding("too_little_data", count, limit, says, "add rows")
    held_out, train = rows("eval_loss"), rows.ends("loss")
    if len(held_out) < 2 or train is None or manifest.get("best"):
        return None
    if train[1] >= min(train[0], held_out[0]):
        return None  # it has learnt nothing
    lowest = min(held_out)
    if held_out[-1] <= OVERFIT * lowest:
        return None
    says = (
        f"held-out loss rose from {lowest:.3g} to {held_out[-1]:.3g} while the training loss fell: "
        f"the rows are learnt by heart (over {OVERFIT} times)"
    )
    cure = "add rows, lower train.epochs, or train an adapter (lora) instead of the whole model"
    return Finding("too_little_data", held_out[-1] / lowest, OVERFIT, says, cure)
