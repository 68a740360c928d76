"""Over-optimisation: a reward that is optimised stops measuring quality (Goodhart)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def turning_point(kl: Sequence[float], gold: Sequence[float]) -> tuple[float, float] | None:
    """Find KL and gold score where the gold score stops rising, by a fitted curve.

        gold(d) = start + a d - b d^2,   d = sqrt(KL)

    Args:
        kl: Nats to the reference of checkpoints, or of runs with increasing optimisation.
        gold: Gold score of each.

    Returns:
        (KL, score) at the top, d = a / 2b; None with under four points, or if the curve has no top
        inside the data: the score is still rising, or fell from the start.

    Source: Gao et al. 2022, eq. 1 (arXiv:2210.10760): the shape of best-of-n. Differs: the paper's
        shape for RL, d (a - b log d), is nearly the same inside the data, and has no value at d =
        0.
    """
    d, score = np.sqrt(np.maximum(kl, 0.0)), np.asarray(gold, dtype=float)
    if len(np.unique(d)) < 4:
        return None
    quadratic, linear, start = np.polyfit(d, score, 2)
    if quadratic >= 0:
        return None
    top = -linear / (2 * quadratic)
    if not d.min() < top < d.max():
        return None
    return float(top**2), float(start + linear * top + quadratic * top**2)
