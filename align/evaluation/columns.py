"""Choose the figures of ``eval.json`` that are columns of the closing table and of the page.

Every metric of the recipe is one: corpus metrics are known by their signature, a user's own by not
being in our tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from align.evaluation.metrics import METRICS


def columns(rows: Sequence[dict[str, Any]], *, page: bool = False) -> dict[str, str]:
    """Map every figure that some row has to its title, the recipe's metrics first."""
    keys = dict.fromkeys(key for row in rows for key, value in row.items() if _is_number(value))
    corpus = [k for k in keys if any(f"{k}_signature" in row for row in rows)]
    ours = {metric.figure: metric for metric in METRICS.values()}
    corpus.sort(key=lambda k: list(ours).index(k) if k in ours else 0)
    places = ("table", "page") if page else ("table",)
    known = [k for k, m in ours.items() if k in keys and k not in corpus and m.shown in places]
    own = [k for k in keys if k not in ours and k not in corpus]
    titles = {key: ours[key].title for key in (*corpus, *known) if key in ours}
    return {k: titles.get(k, k.removesuffix("_mean")) for k in (*corpus, *own, *known)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
