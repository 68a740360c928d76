"""A test's outcome in words, and what would have settled it: so many prompts, or more seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

ALPHA, POWER = 0.05, 0.8
OUT_OF_REACH = 1_000_000
"""Prompts that nobody will collect: a difference that takes more of them is none in practice."""
MIN_DIFFERING = 6
"""Prompts that have to differ for p < .05: of 5 differences one swap in 16 is as large as all."""

# of any other metric, length or one of the user's own, nobody has said which way is better
LOWER_IS_BETTER = {"ter", "repetition_4", "perplexity", "bits_per_byte"}
HIGHER_IS_BETTER = {
    *("bleu", "bleu-intl", "bleu-char", "bleu-zh", "bleu-ja-mecab", "bleu-ko-mecab"),
    *("bleu-flores101", "bleu-flores200", "bleu-none", "chrf", "chrf++", "exact_match"),
    *("reward", "gold", "win_rate", "sample_chrf", "sample_reward", "sample_gold"),
}


def prompts_needed(difference: float, paired_std: float) -> int | None:
    """Prompts that would show a true difference of this size with power .8 at p < .05, two-sided.

        n = ((z_{1 - alpha/2} + z_power) * paired_std / difference)^2

    Args:
        difference: The observed mean difference.
        paired_std: Standard deviation over prompts of the per-prompt difference.

    Returns:
        None where there is no difference to show.

    Source: any text on sample size for paired means, e.g. Card et al. 2020 (arXiv:2010.06595).
        The observed difference stands in for the true one, so the figure is rough.
    """
    if difference == 0:
        return None
    z = NormalDist().inv_cdf(1 - ALPHA / 2) + NormalDist().inv_cdf(POWER)
    return max(MIN_DIFFERING, math.ceil((z * paired_std / difference) ** 2))


def outcome(metric: str, difference: float, p: float) -> str:
    """``better`` or ``worse``, ``more`` or ``less`` where neither end is; empty if not shown."""
    if difference == 0 or p >= ALPHA:
        return ""
    if metric in HIGHER_IS_BETTER or metric in LOWER_IS_BETTER:
        return "better" if (difference > 0) == (metric in HIGHER_IS_BETTER) else "worse"
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
    """``better, p = .003`` of a against b, or what these prompts or seeds cannot show.

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
        # by the power formula they would have sufficed: the difference is at the edge
        return f"no difference that {num_prompts} prompts can show, {p_in_words(p)}"
    if needed > OUT_OF_REACH:
        return f"no difference that {num_prompts} prompts can show, nor would {OUT_OF_REACH:,}"
    return (
        f"no difference that {num_prompts} prompts can show; "
        f"about {rounded(needed):,} would be needed"
    )


def _too_few(num_prompts: int, num_differing: int | None, needed: int | None) -> str:
    """No test can tell, however large the difference is."""
    if num_differing is not None and num_differing >= MIN_DIFFERING:
        return "too few resamples to tell: set num_resamples to 1000"
    counts = f"{num_differing} of {num_prompts} differ, {MIN_DIFFERING} have to"
    told = f"too few prompts to tell: {counts}"
    if needed is None or needed <= num_prompts:
        return told
    if needed > OUT_OF_REACH:
        return f"{told}; {OUT_OF_REACH:,} prompts would not be enough"
    return f"{told}; about {rounded(needed):,} prompts would be needed"


def deciding_p(test: Mapping[str, Any]) -> float:
    """The one p of a comparison in ``eval.json``.

    Files of earlier versions have several, and their verdict goes by one that is not ``p``.
    """
    by_seeds = test.get("p_seeds")
    return float(test.get("p_randomization", test["p"]) if by_seeds is None else by_seeds)


def short_verdict(metric: str, difference: float, p: float) -> str:
    """For a table that says elsewhere how many prompts and seeds there were."""
    word = outcome(metric, difference, p)
    return "no difference" if difference == 0 else f"{word or 'none shown'}, {p_in_words(p)}"


def p_in_words(p: float) -> str:
    """``p = .003``; never 0, because a resampling test cannot say so."""
    return "p < .001" if p < 0.0005 else f"p = {p:.3f}".replace("0.", ".")


def rounded(count: int) -> int:
    """Two digits: a sample size is never known better."""
    return round(count, 2 - len(str(count))) if count > 99 else count
