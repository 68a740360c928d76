"""Diagnose a run in plain words: the number, its limit and the usual cure.

`diagnose` is a pure function of a run's log (the rows of ``metrics.jsonl``) and its manifest. A run
calls it while it trains, and reports each kind of trouble once; its closing table,
``manifest.json`` and ``align doctor RUN`` have the troubles at the end. Limits are rules of thumb,
explained in docs/metrics.md; a run that breaks one need not be bad, but deserves a look.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align.run import doctor_rules as rules
from align.run.doctor_rules import FEWEST, Finding, Row, Rows


@dataclass(frozen=True)
class Rule:
    """One kind of trouble.

    Attributes:
        kind: Its name in messages and documents.
        limit: Beyond it something is wrong; rules of thumb, explained in docs/metrics.md.
        unit: Of the limit.
        stages: Whose runs have what it reads; empty means all.
        find: Rows, manifest and limit -> what is wrong, or None.
    """

    kind: str
    limit: float
    unit: str
    stages: tuple[str, ...]
    find: Callable[[Rows, Row, float], Finding | None]


_TRAINED = ("sft", "rm", "dpo")
RULES: tuple[Rule, ...] = (
    Rule("unfinished", 0.0, "steps logged", (), rules.unfinished),
    Rule(
        "kl_over_budget",
        30.0,
        "nats per response; 1.5 x kl.target where kl.adaptive",
        ("ppo",),
        rules.kl_over_budget,
    ),
    Rule("length_hacking", 1.5, "ratio of tokens per response", ("ppo",), rules.length_hacking),
    Rule("repetition_hacking", 0.1, "share of trigrams, rise", ("ppo",), rules.repetition_hacking),
    Rule("entropy_collapse", 0.3, "ratio of nats per token", ("ppo",), rules.entropy_collapse),
    Rule("eos_falling", 0.15, "share of responses that end, fall", ("ppo",), rules.eos_falling),
    Rule("never_ends", 0.1, "share of responses that end", ("ppo",), rules.never_ends),
    Rule("scores_equal", 0.0, "standard deviation of a rollout's", ("ppo",), rules.scores_equal),
    Rule("clip_fraction", 0.3, "share of tokens", ("ppo",), rules.clip_fraction),
    Rule("approx_kl", 0.05, "nats per token and update", ("ppo",), rules.approx_kl),
    Rule(
        "sampled_otherwise",
        0.5,
        "distance of the first minibatch's ratios from 1",
        ("ppo",),
        rules.sampled_otherwise,
    ),
    Rule("critic_useless", 0.0, "explained variance", ("ppo",), rules.critic_useless),
    Rule(
        "lr_too_high",
        10.0,
        "ratio of gradient norms; of the loss: LOSS_RISE",
        ("ppo", *_TRAINED),
        rules.lr_too_high,
    ),
    Rule("held_out_worse", 1.05, "ratio of held-out losses", _TRAINED, rules.held_out_worse),
    Rule(
        "too_little_data",
        100.0,
        "training rows; of the loss: OVERFIT",
        _TRAINED,
        rules.too_little_data,
    ),
    Rule(
        "reward_model_weak",
        0.5,
        'lower end of the accuracy\'s 95% interval; accuracy of "longer wins" where that is more',
        ("rm",),
        rules.reward_model_weak,
    ),
    Rule("chosen_falling", -10.0, "log-ratio of chosen, nats", ("dpo",), rules.chosen_falling),
)
LIMITS: dict[str, float] = {rule.kind: rule.limit for rule in RULES}


def rules_of(stage: str) -> list[Rule]:
    """Rules for a stage's runs, those for every run first."""
    return [rule for rule in RULES if not rule.stages or stage in rule.stages]


def judged_stages() -> list[str]:
    """Stages that have rules of their own."""
    return list(dict.fromkeys(stage for rule in RULES for stage in rule.stages))


def diagnose(stage: str, rows: Sequence[Row], manifest: Mapping[str, Any]) -> list[Finding]:
    """List everything that is wrong so far.

    Args:
        stage: ``sft``, ``rm``, ``dpo`` or ``ppo``; others have no rules.
        rows: Rows of metrics.jsonl, oldest first.
        manifest: Manifest of the same run; rules that need a missing key are skipped.
    """
    found = (rule.find(Rows(rows), manifest, rule.limit) for rule in rules_of(stage))
    return [finding for finding in found if finding is not None]


def closing_lines(stage: str, rows: Sequence[Row], findings: Sequence[Finding]) -> list[str]:
    """Format the lines below the closing table's numbers."""
    lines = [f"doctor: {finding}" for finding in findings]
    steps = sum("eval_loss" not in row and "eval_score" not in row for row in rows)
    if steps < FEWEST:
        few = f"{steps} logged step{'' if steps == 1 else 's'}"
        found = f"no trend judged from {few}" if findings else f"nothing found that {few} can show"
        lines.append(f"doctor: {found}; a trend takes {FEWEST}")
    elif not findings:
        lines.append("doctor: nothing found")
    ends = Rows(rows).ends("optimality_gap") if stage == "ppo" else None
    if ends is not None:
        lines.insert(0, f"distance to the optimum (optimality_gap): {ends[0]:.3g} -> {ends[1]:.3g}")
    return lines
