"""What is wrong with a run, in plain words: the number, its limit and the usual cure.

`diagnose` is a pure function of what a run logged (the rows of ``metrics.jsonl``) and of its
manifest. A run asks it while it goes on, and tells each kind of trouble once; its closing table,
``manifest.json`` and ``align doctor RUN`` have what was still wrong at the end. Limits are rules of
thumb, explained in docs/metrics.md; a run that breaks one need not be bad, and is worth a look.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

Row = Mapping[str, Any]

LIMITS: dict[str, float] = {
    "kl_over_budget": 30.0,  # nats per response; 1.5 x kl.target where kl.adaptive
    "length_hacking": 1.5,  # tokens per response, as a share of those at the start
    "repetition_hacking": 0.1,  # rise of the share of repeated trigrams
    "entropy_collapse": 0.3,  # nats per token, as a share of those at the start
    "eos_falling": 0.15,  # fall of the share of responses that end
    "clip_fraction": 0.3,  # share of tokens
    "approx_kl": 0.05,  # nats per token and update
    "critic_useless": 0.0,  # explained variance
    "reward_model_weak": 0.5,  # accuracy; that of "longer wins" where it is more
    "chosen_falling": -10.0,  # log-ratio of chosen, nats per response
    "lr_too_high": 10.0,  # gradient norm, as a share of that at the start; loss: LOSS_RISE
    "too_little_data": 100.0,  # training rows of SFT, reward model, DPO; held-out loss: OVERFIT
}
LOSS_RISE = 1.2
"""Training loss at the end as a share of that at the start."""
OVERFIT = 1.05
"""Held-out loss at the end as a share of its lowest, while the training loss falls."""
SCORE_RISE = 0.5
"""Rise of the mean score that counts as rising, in standard deviations of the first scores."""
FEWEST = 8
"""Rows before a trend is spoken of."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: ``value`` is beyond ``limit``, in the unit of LIMITS."""

    kind: str
    value: float
    limit: float
    says: str
    cure: str

    def __str__(self) -> str:
        return f"{self.says} [{self.kind}]; {self.cure}"


def diagnose(stage: str, rows: Sequence[Row], manifest: Mapping[str, Any]) -> list[Finding]:
    """Everything that is wrong by now.

    Args:
        stage: ``sft``, ``rm``, ``dpo`` or ``ppo``; others have no rules.
        rows: Of metrics.jsonl, oldest first.
        manifest: Of the same run; a missing key leaves out what needs it.
    """
    found = (rule(_Rows(rows), manifest) for rule in RULES.get(stage, ()))
    return [finding for finding in found if finding is not None]


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The whole rows of a run's metrics.jsonl; one that a crash cut short is left out."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    *lines, _cut_short = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines]


def closing_lines(stage: str, rows: Sequence[Row], findings: Sequence[Finding]) -> list[str]:
    """What a closing table says under its numbers."""
    lines = [f"doctor: {finding}" for finding in findings] or ["doctor: nothing found"]
    ends = _Rows(rows).ends("optimality_gap") if stage == "ppo" else None
    if ends is not None:
        lines.insert(0, f"distance to the optimum (optimality_gap): {ends[0]:.3g} -> {ends[1]:.3g}")
    return lines


class _Rows:
    """The numbers of one name, and how they were at the start and are at the end."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __call__(self, name: str) -> list[float]:
        return [float(row[name]) for row in self.rows if name in row]

    def ends(
        self, name: str, mean: Callable[[Sequence[float]], float] = fmean
    ) -> tuple[float, float] | None:
        """Means over the first and the last fifth; None while there are too few rows."""
        values = self(name)
        if len(values) < FEWEST:
            return None
        fifth = max(3, len(values) // 5)
        return mean(values[:fifth]), mean(values[-fifth:])


def _kl_over_budget(rows: _Rows, manifest: Row) -> Finding | None:
    ends, recipe = rows.ends("kl"), manifest.get("recipe", {})
    limit = LIMITS["kl_over_budget"]
    if recipe.get("kl.adaptive"):
        limit = 1.5 * float(recipe["kl.target"])
    if ends is None or ends[1] <= limit:
        return None
    says = f"KL to the reference is {ends[1]:.3g} nats per response, over its budget of {limit:.3g}"
    return Finding(
        "kl_over_budget", ends[1], limit, says, "raise kl.coef, lower optim.lr, or stop earlier"
    )


def _score_rises(rows: _Rows) -> bool:
    score, spread = rows.ends("score_mean"), rows.ends("score_std")
    return bool(score and spread and score[1] - score[0] > SCORE_RISE * spread[0])


def _length_hacking(rows: _Rows, manifest: Row) -> Finding | None:
    ends, limit = rows.ends("length_mean"), LIMITS["length_hacking"]
    if ends is None or ends[1] <= limit * ends[0] or not _score_rises(rows):
        return None
    says = (
        f"the score rises together with the length: {ends[0]:.3g} -> {ends[1]:.3g} tokens per "
        f"response, more than {limit:g} times as long"
    )
    cure = "compare rewards at equal length, take length out of the reward, or raise kl.coef"
    return Finding("length_hacking", ends[1] / ends[0], limit, says, cure)


def _repetition_hacking(rows: _Rows, manifest: Row) -> Finding | None:
    ends, limit = rows.ends("repetition"), LIMITS["repetition_hacking"]
    if ends is None or ends[1] - ends[0] <= limit or not _score_rises(rows):
        return None
    says = (
        f"the score rises together with repetition: {ends[0]:.0%} -> {ends[1]:.0%} of trigrams had "
        f"been there before, a rise of more than {limit:.0%}"
    )
    cure = "read samples.jsonl; mend the reward, or raise kl.coef"
    return Finding("repetition_hacking", ends[1] - ends[0], limit, says, cure)


def _entropy_collapse(rows: _Rows, manifest: Row) -> Finding | None:
    ends, limit = rows.ends("entropy"), LIMITS["entropy_collapse"]
    if ends is None or ends[1] >= limit * ends[0]:
        return None
    says = (
        f"entropy collapsed: {ends[0]:.3g} -> {ends[1]:.3g} nats per token, below {limit:g} of its "
        "start, so samples no longer differ"
    )
    cure = "raise kl.coef, set ppo.entropy_coef, or lower optim.lr"
    return Finding("entropy_collapse", ends[1] / ends[0], limit, says, cure)


def _eos_falling(rows: _Rows, manifest: Row) -> Finding | None:
    ends, limit = rows.ends("eos_rate"), LIMITS["eos_falling"]
    if ends is None or ends[0] - ends[1] <= limit:
        return None
    says = (
        f"responses stop ending: {ends[0]:.0%} -> {ends[1]:.0%} end by themselves, a fall of more "
        f"than {limit:.0%}"
    )
    cure = "set ppo.missing_eos_score below what a bad answer earns, or raise max_new_tokens"
    return Finding("eos_falling", ends[0] - ends[1], limit, says, cure)


def _clip_fraction(rows: _Rows, manifest: Row) -> Finding | None:
    ends, limit = rows.ends("clip_fraction"), LIMITS["clip_fraction"]
    if ends is None or ends[1] <= limit:
        return None
    says = f"{ends[1]:.0%} of tokens are clipped and teach nothing, more than {limit:.0%}"
    return Finding("clip_fraction", ends[1], limit, says, "lower optim.lr or ppo.epochs")


def _approx_kl(rows: _Rows, manifest: Row) -> Finding | None:
    ends, limit = rows.ends("approx_kl"), LIMITS["approx_kl"]
    if ends is None or ends[1] <= limit:
        return None
    says = f"an update moves the policy by {ends[1]:.3g} nats per token, more than {limit:g}"
    return Finding(
        "approx_kl", ends[1], limit, says, "lower optim.lr, ppo.epochs or ppo.clip_range"
    )


def _critic_useless(rows: _Rows, manifest: Row) -> Finding | None:
    ends, limit = rows.ends("explained_variance"), LIMITS["critic_useless"]
    if ends is None or ends[1] > limit:
        return None
    says = (
        f"the critic explains nothing: explained variance {ends[1]:.2g}, wanted above {limit:g} (a "
        "constant has 0)"
    )
    cure = "give it ppo.critic_warmup or a higher critic.lr, or start it from the reward model"
    return Finding("critic_useless", ends[1], limit, says, cure)


def _reward_model_weak(rows: _Rows, manifest: Row) -> Finding | None:
    accuracy = rows("eval_accuracy")
    if len(accuracy) < 2:  # the first is from before training
        return None
    longer = float(manifest.get("held_out", {}).get("accuracy_of_longer", 0.0))
    limit = max(LIMITS["reward_model_weak"], longer)
    if accuracy[-1] > limit:
        return None
    rival = "preferring the longer answer" if longer == limit else "a coin"
    says = (
        f"the reward model is right on {accuracy[-1]:.0%} of held-out pairs, no better than "
        f"{rival} ({limit:.0%})"
    )
    cure = "give it more pairs, or pairs that differ more; do not optimise it yet"
    return Finding("reward_model_weak", accuracy[-1], limit, says, cure)


def _chosen_falling(rows: _Rows, manifest: Row) -> Finding | None:
    beta = float(manifest.get("recipe", {}).get("dpo.beta", 0.1))
    chosen, rejected = rows.ends("rewards_chosen"), rows.ends("rewards_rejected")
    limit = LIMITS["chosen_falling"]
    if chosen is None or rejected is None or chosen[1] / beta >= limit or rejected[1] >= 0:
        return None
    says = (
        f"chosen answers lose probability as well as rejected ones: {chosen[1] / beta:.3g} and "
        f"{rejected[1] / beta:.3g} nats per response against the reference, beyond {limit:g}"
    )
    cure = "raise dpo.beta, lower optim.lr, add dpo.sft_coef, or do SFT on the chosen answers first"
    return Finding("chosen_falling", chosen[1] / beta, limit, says, cure)


def _lr_too_high(rows: _Rows, manifest: Row) -> Finding | None:
    cure = "lower optim.lr (try a third), or raise optim.warmup_fraction"
    ends, limit = rows.ends("grad_norm", median), LIMITS["lr_too_high"]
    if ends is not None and ends[1] > limit * ends[0] > 0:
        says = f"the gradient grew from {ends[0]:.3g} to {ends[1]:.3g}, over {limit:g} times"
        return Finding("lr_too_high", ends[1] / ends[0], limit, says, cure)
    ends = rows.ends("loss")
    if ends is not None and ends[1] > LOSS_RISE * ends[0] > 0:
        says = f"the training loss rose from {ends[0]:.3g} to {ends[1]:.3g}, over {LOSS_RISE} times"
        return Finding("lr_too_high", ends[1] / ends[0], LOSS_RISE, says, cure)
    return None


def _too_little_data(rows: _Rows, manifest: Row) -> Finding | None:
    limit = LIMITS["too_little_data"]
    count = manifest.get("train_rows", limit)
    if count < limit:
        says = f"only {count} training rows, fewer than {limit:g}: they will be learnt by heart"
        return Finding("too_little_data", count, limit, says, "add rows")
    held_out, train = rows("eval_loss"), rows.ends("loss")
    if len(held_out) < 2 or train is None or train[1] >= train[0]:
        return None
    lowest = min(held_out)
    if held_out[-1] <= OVERFIT * lowest:
        return None
    says = (
        f"held-out loss rose from {lowest:.3g} to {held_out[-1]:.3g} while the training loss fell: "
        f"the rows are learnt by heart (over {OVERFIT} times)"
    )
    cure = "add rows, lower train.epochs, or train an adapter (lora) instead of the whole model"
    return Finding("too_little_data", held_out[-1] / lowest, OVERFIT, says, cure)


Rule = Callable[[_Rows, Row], Finding | None]

RULES: dict[str, tuple[Rule, ...]] = {
    "sft": (_lr_too_high, _too_little_data),
    "rm": (_lr_too_high, _too_little_data, _reward_model_weak),
    "dpo": (_lr_too_high, _too_little_data, _chosen_falling),
    "ppo": (
        _kl_over_budget,
        _length_hacking,
        _repetition_hacking,
        _entropy_collapse,
        _eos_falling,
        _clip_fraction,
        _approx_kl,
        _critic_useless,
        _lr_too_high,
    ),
}
