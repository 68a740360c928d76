"""Accuracy of preferring the longer answer: the baseline that a reward has to beat.

Length is counted in characters, which every reward source has in common; tokens would tie one pair
in eight of short answers, and depend on the tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def longer_wins(length_gaps: Sequence[float] | np.ndarray) -> float:
    """Share of pairs whose chosen answer is the longer one, ties half.

    Args:
        length_gaps: Characters of chosen minus characters of rejected, one for each pair.
    """
    gaps = np.asarray(length_gaps)
    return float(np.mean((gaps > 0) + 0.5 * (gaps == 0)))
