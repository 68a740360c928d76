"""Put a test's outcome into words, with the prompts or seeds that would settle it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

from align.evaluation.metrics import METRICS

ALPHA, POWER = 0.05, 0.8
OUT_OF_REACH = 1_000_000
"""Most prompts that a verdict suggests: a difference that needs more has no practical size."""
MIN_DIFFERING = 6
"""Fewest differing prompts for p < .05: with 5, one swap in 16 is as large as the difference."""


def prompts_needed(difference: float, paired_std: float) -> int | None:
    """Prompts that show a true difference of this size with power .8 at p < .05, two-sided.

        n = ((z_{1 - alpha/2} + z_power) * paired_std / difference)^2

    Args:
        difference: The observed mean difference.
        paired_std: Standard deviation over prompts of the per-prompt difference.

    Returns:
        None without a difference.

    Source: any text on sample size for paired means, e.g. Card et al. 2020 (arXiv:2010.06595).
        The observed difference replaces the true one, so the figure is rough.
    """
    if difference == 0:
        return None
    z = NormalDist().inv_cdf(1 - ALPHA / 2) + NormalDist().inv_cdf(POWER)
    return max(MIN_DIFFERING, math.ceil((z * paired_std / difference) ** 2))


def outcome(metric: str, difference: float, p: float) -> str:
    """Return ``better`` or ``worse``, or ``more`` or ``less`` without a direction; "" if not
    shown.
    """
    if difference == 0 or p >= ALPHA:
        return ""
    better = METRICS[metric].better if metric in METRICS else None
    if better is not None:
        return "better" if (difference > 0) == (better == "higher") else "worse"
    return "more" if difference > 0 else "less"


def verdict(
    metric: str,
    difference: float,
    p: float,
    *,
    num_prompts: int,
    needed: int | None,
    num_seeds: tuple[int, int] = (1, 1),
    num_differing: int | None = None,
    least_p: float = 0.0,
) -> str:
    """Describe a against b: ``better, p = .003``, or what these prompts or seeds cannot show.

    ``least_p`` is the smallest p that the test can give: from .05 upwards it can find nothing.
    """
    if difference == 0:
        return "no difference"
    word = outcome(metric, difference, p)
    if word:
        return f"{word}, {p_in_words(p)}"
    if least_p >= ALPHA:
        return _too_few(num_prompts, num_differing, needed)
    if max(num_seeds) > 1:
        of_a, of_b = num_seeds
        return (
            f"no difference that {of_a} against {of_b} seeds can show, {p_in_words(p)}; "
            "more seeds, not prompts, would tell"
        )
    if needed is None or needed <= num_prompts:
        # the power formula says they would have sufficed: the difference is borderline
        return f"no difference that {num_prompts} prompts can show, {p_in_words(p)}"
    if needed > OUT_OF_REACH:
        return f"no difference that {num_prompts} prompts can show, nor would {OUT_OF_REACH:,}"
    return (
        f"no difference that {num_prompts} prompts can show; "
        f"about {rounded(needed):,} would be needed"
    )


def _too_few(num_prompts: int, num_differing: int | None, needed: int | None) -> str:
    """Explain a test that can find no difference of any size."""
    if num_differing is not None and num_differing >= MIN_DIFFERING:
        return "too few resamples to tell: set num_resamples to 1000"
    counts = f"{num_differing} of {num_prompts} differ, {MIN_DIFFERING} have to"
    says = f"too few prompts to tell: {counts}"
    if needed is None or needed <= num_prompts:
        return says
    if needed > OUT_OF_REACH:
        return f"{says}; {OUT_OF_REACH:,} prompts would not be enough"
    return f"{says}; about {rounded(needed):,} prompts would be needed"


def deciding_p(test: Mapping[str, Any]) -> float:
    """Return the p of a comparison in ``eval.json`` on which its verdict is based.

    Files of earlier versions have several, and their verdict is not always based on ``p``.
    """
    by_seeds = test.get("p_seeds")
    return float(test.get("p_randomization", test["p"]) if by_seeds is None else by_seeds)


def short_verdict(metric: str, difference: float, p: float) -> str:
    """Return a verdict without the number of prompts and seeds."""
    word = outcome(metric, difference, p)
    return "no difference" if difference == 0 else f"{word or 'none shown'}, {p_in_words(p)}"


def p_in_words(p: float) -> str:
    """Format ``p = .003``; never 0, which a resampling test cannot show."""
    return "p < .001" if p < 0.0005 else f"p = {p:.3f}".replace("0.", ".")


def rounded(count: int) -> int:
    """Round to two digits: a sample size is never known better."""
    return round(count, 2 - len(str(count))) if count > 99 else count
