"""Choose the figures of ``eval.json`` that are columns of the closing table and of the page.

Every metric of the recipe is one: corpus metrics are known by their signature, a user's own by not
being in our tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

TITLES = {
    "bleu": "BLEU",
    "chrf": "chrF",
    "chrf++": "chrF++",
    "ter": "TER",
    "exact_match": "exact",
    "reward_mean": "reward",
    "gold_mean": "gold",
    "sample_chrf_mean": "chrF of samples",
    "sample_reward_mean": "reward of samples",
    "sample_gold_mean": "gold of samples",
    "kl": "KL, nats",
    "kl_per_token": "KL per token",
    "length_mean": "tokens",
    "eos_rate": "ended",
    "distinct_2": "distinct-2",
    "repetition_4": "repeated",
    "perplexity": "perplexity",
}
# columns of the page only, since a terminal is narrow
PAGE_ONLY = {"exact_match", "kl_per_token", "distinct_2", "perplexity"}
# our figures that are in eval.json alone
NO_COLUMN = {"distinct_1", "bits_per_byte", "sample_length_mean", "sample_eos_rate"}


def columns(rows: Sequence[dict[str, Any]], *, page: bool = False) -> dict[str, str]:
    """Map every figure that some row has to its title, the recipe's metrics first."""
    keys = dict.fromkeys(key for row in rows for key, value in row.items() if _is_number(value))
    corpus = [k for k in keys if any(f"{k}_signature" in row for row in rows)]
    # metrics with a title in the order of TITLES
    corpus.sort(key=lambda k: list(TITLES).index(k) if k in TITLES else 0)
    known = [k for k in TITLES if k in keys and k not in corpus and (page or k not in PAGE_ONLY)]
    own = [k for k in keys if k not in TITLES and k not in NO_COLUMN and k not in corpus]
    return {key: title(key) for key in (*corpus, *own, *known)}


def title(key: str) -> str:
    """Return the title: ``BLEU zh`` for ``bleu-zh``; a user's own metric keeps its name."""
    if key.startswith("bleu-"):
        return f"BLEU {key.removeprefix('bleu-')}"
    return TITLES.get(key, key.removesuffix("_mean"))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
