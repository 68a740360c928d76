"""Diagnose a run in plain words: the number, its limit and the usual cure.

`diagnose` is a pure function of a run's log (the rows of ``metrics.jsonl``) and its manifest. A run
calls it while it trains, and reports each kind of trouble once; its closing table,
``manifest.json`` and ``align doctor RUN`` have the troubles at the end. Limits are rules of thumb,
explained in docs/metrics.md; a run that breaks one need not be bad, but deserves a look.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from align.run.doctor_rules import FEWEST, RULES, Finding, Row, Rows, unfinished


def diagnose(stage: str, rows: Sequence[Row], manifest: Mapping[str, Any]) -> list[Finding]:
    """List everything that is wrong so far.

    Args:
        stage: ``sft``, ``rm``, ``dpo`` or ``ppo``; others have no rules.
        rows: Rows of metrics.jsonl, oldest first.
        manifest: Manifest of the same run; rules that need a missing key are skipped.
    """
    found = (rule(Rows(rows), manifest) for rule in (unfinished, *RULES.get(stage, ())))
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
