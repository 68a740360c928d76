"""Win rates and rewards, raw and at equal length.

A policy that learns to write longer answers often wins by length alone (Singhal et al. 2023,
arXiv:2310.03716), so every raw figure has one at equal length beside it. Length is counted in
characters, which every text has, without a tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special

from align.base.intervals import Interval, share_ci95, student_t_quantile
from align.evaluation.compare import compare_values
from align.evaluation.seeds import seed_error_of_pairs

RIDGE = 1e-2


@dataclass(frozen=True, kw_only=True)
class WinRate:
    """Share of prompts on which a beats b.

    Attributes:
        a: Name of one system.
        b: Name of the other.
        judge: Name of the deciding reward source or function.
        wins: Prompts where a was better; with several seeds, in more than half of their pairs.
        ties: Prompts where neither was.
        losses: Prompts where b was better.
        win_rate: (wins + ties / 2) / prompts; with a judge of both orders the mean of its shares.
        win_rate_ci95: Score interval over prompts, Wilson's without ties; with several seeds
            Student's t over seeds, cut to [0, 1].
        win_rate_p: p of a rate at least this far from one half, by paired randomisation, two-sided
            (the sign test); with several seeds Student's t over seeds.
        win_rate_verdict: The same in words.
        length_controlled_win_rate: Expected rate at equal length; None if every prompt's two
            answers are equally long.
        length_controlled_win_rate_ci95: Its interval, by profile likelihood over prompts.
    """

    a: str
    b: str
    judge: str
    wins: int
    ties: int
    losses: int
    win_rate: float
    win_rate_ci95: Interval | None
    win_rate_p: float
    win_rate_verdict: str
    length_controlled_win_rate: float | None
    length_controlled_win_rate_ci95: Interval | None


@dataclass(frozen=True, kw_only=True)
class EqualLength:
    """A difference of rewards at equal length.

    Attributes:
        difference: Expected reward of a minus that of b on a prompt where both are equally long.
        ci95: Its interval, Student's t over prompts.
        per_100_characters: Difference in reward for 100 more characters.
    """

    difference: float
    ci95: tuple[float, float]
    per_100_characters: float


def shares_won(
    scores_a: Sequence[float], scores_b: Sequence[float], *, tie_margin: float = 0.0
) -> np.ndarray:
    """Return 1 where a scores higher, 0 where b does, 1/2 within ``tie_margin``."""
    gap = np.subtract(scores_a, scores_b)
    return np.where(np.abs(gap) <= tie_margin, 0.5, (gap > 0).astype(float))


def win_rate(
    a: str,
    b: str,
    shares: Sequence[float] | np.ndarray,
    *,
    judge: str,
    lengths_a: Sequence[float] | np.ndarray,
    lengths_b: Sequence[float] | np.ndarray,
    num_seeds: tuple[int, int] = (1, 1),
    num_resamples: int = 1000,
) -> WinRate:
    """Summarise one share in [0, 1] for each prompt: 1 = a won, 0 = b won.

    Args:
        shares: ``[prompts]``, or ``[pairs, prompts]`` of pairs of training seeds, which are
            averaged prompt by prompt.
        num_seeds: Seeds of a and of b; with several, p and interval are over seeds.
        num_resamples: Swaps of the test.
    """
    by_pair = np.atleast_2d(np.asarray(shares, dtype=float))
    won = by_pair.mean(0)
    test = compare_values(
        (a, won),
        (b, 1 - won),
        metric="win_rate",
        num_resamples=num_resamples,
        num_seeds=num_seeds,
        over_seeds=seed_error_of_pairs(2 * by_pair.mean(1), num_seeds),
    )
    controlled = length_controlled_win_rate(won, np.subtract(lengths_a, lengths_b))
    # over seeds the test compares shares won with shares lost, which doubles the difference
    over_seeds = test.ci95 and (max(0.0, (1 + test.ci95[0]) / 2), min(1.0, (1 + test.ci95[1]) / 2))
    return WinRate(
        a=a,
        b=b,
        judge=judge,
        wins=int((won > 0.5).sum()),
        ties=int((won == 0.5).sum()),
        losses=int((won < 0.5).sum()),
        win_rate=float(won.mean()),
        win_rate_ci95=over_seeds if test.test == "seeds" else share_ci95(won),
        win_rate_p=test.p,
        win_rate_verdict=test.verdict,
        length_controlled_win_rate=None if controlled is None else controlled[0],
        length_controlled_win_rate_ci95=None if controlled is None else controlled[1],
    )


def length_controlled_difference(
    scores_a: Sequence[float] | np.ndarray,
    scores_b: Sequence[float] | np.ndarray,
    lengths_a: Sequence[float] | np.ndarray,
    lengths_b: Sequence[float] | np.ndarray,
) -> EqualLength | None:
    """Estimate reward of a minus reward of b at equal length, by regression over prompts.

        (score_a - score_b)[i] = difference + slope * (length_a - length_b)[i] + noise

    Returns:
        None if lengths do not vary, so that the slope is unknown, if the fit leaves no residual to
        estimate the error, or with under four prompts.

    The prompt's own difficulty cancels in the pairing. A linear effect of length is removed, even
    if longer answers are also better ones.
    """
    from scipy.stats import linregress  # takes a second to import

    y = np.subtract(scores_a, scores_b).astype(float)
    x = np.subtract(lengths_a, lengths_b).astype(float)
    if len(y) < 4 or np.ptp(x) == 0:
        return None
    fit = linregress(x / 100, y)
    residual = y - fit.intercept - fit.slope * x / 100
    if residual @ residual <= 1e-18 * (y @ y):
        return None
    half_width = student_t_quantile(0.975, len(y) - 2) * fit.intercept_stderr
    return EqualLength(
        difference=float(fit.intercept),
        ci95=(float(fit.intercept - half_width), float(fit.intercept + half_width)),
        per_100_characters=float(fit.slope),
    )


def length_controlled_win_rate(
    shares: np.ndarray, length_gaps: np.ndarray
) -> tuple[float, Interval] | None:
    """Estimate the win rate expected if both answers are equally long, with its 95% interval.

        P(a wins prompt i) = sigmoid(quality + slope * tanh(gap[i] / std(gap)))

    fitted by maximum likelihood with a weak ridge (1e-2), then sigmoid(quality). The interval has
    every quality whose profile likelihood, the best over all slopes, is within t^2 / 2 of the
    maximum (t of n - 2 degrees of freedom). So it is [0, 1] if a won each time and was longer each
    time: equal lengths were never seen.

    Source: Dubois et al. 2024, eq. 1 (arXiv:2404.04475). Differs: no term for each prompt's
        difficulty, which takes many models' results to fit. Profile interval: Venzon and Moolgavkar
        1988 (Applied Statistics 37:87).
    """
    spread = float(np.std(length_gaps))
    if len(shares) < 4 or spread == 0:
        return None
    shift = np.tanh(length_gaps / spread)

    def loss(quality: float, slope: float) -> float:
        logits = quality + slope * shift
        return float(
            (np.logaddexp(0, logits) - shares * logits).sum() + RIDGE / 2 * (quality**2 + slope**2)
        )

    def profile(quality: float) -> float:
        return float(optimize.minimize_scalar(lambda slope: loss(quality, slope)).fun)

    best = optimize.minimize_scalar(profile)
    allowed = best.fun + student_t_quantile(0.975, len(shares) - 2) ** 2 / 2

    def end(side: int) -> float:
        # the ridge alone exceeds the allowed loss before 100 nats
        far = best.x + side * 100
        return float(optimize.brentq(lambda quality: profile(quality) - allowed, best.x, far))

    return float(special.expit(best.x)), (
        float(special.expit(end(-1))),
        float(special.expit(end(1))),
    )
