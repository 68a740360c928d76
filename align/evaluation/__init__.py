"""Evaluation: BLEU and other metrics, paired tests, rewards under test, the table.

What ``__all__`` names is public, and imported when it is first used; docs/python.md lists it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from align.evaluation.bleu import MetricResult, corpus_bleu, corpus_chrf, corpus_score
    from align.evaluation.compare import Comparison, compare_corpus, compare_values
    from align.evaluation.text import distinct_n, exact_matches, repetition
    from align.evaluation.verdict import prompts_needed
    from align.evaluation.wins import WinRate, length_controlled_win_rate, win_rate

__all__ = [
    "Comparison",
    "MetricResult",
    "WinRate",
    "compare_corpus",
    "compare_values",
    "corpus_bleu",
    "corpus_chrf",
    "corpus_score",
    "distinct_n",
    "exact_matches",
    "length_controlled_win_rate",
    "prompts_needed",
    "repetition",
    "win_rate",
]

FOUND_IN = {
    "Comparison": "compare",
    "MetricResult": "bleu",
    "WinRate": "wins",
    "compare_corpus": "compare",
    "compare_values": "compare",
    "corpus_bleu": "bleu",
    "corpus_chrf": "bleu",
    "corpus_score": "bleu",
    "distinct_n": "text",
    "exact_matches": "text",
    "length_controlled_win_rate": "wins",
    "prompts_needed": "verdict",
    "repetition": "text",
    "win_rate": "wins",
}
"""Name -> its module in this package."""


def __getattr__(name: str) -> Any:
    if name not in FOUND_IN:
        raise AttributeError(f"module 'align.evaluation' has no attribute {name!r}")
    return getattr(importlib.import_module(f"align.evaluation.{FOUND_IN[name]}"), name)
