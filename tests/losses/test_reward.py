from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align.losses import bradley_terry_loss

SCORES = st.floats(-30, 30, width=32)


def test_golden_value_with_margin() -> None:
    # 1.2 - .3 - .5 = .4; log(1 + e^-.4) = .513015
    chosen, rejected, margin = torch.tensor([1.2]), torch.tensor([0.3]), torch.tensor([0.5])
    loss = bradley_terry_loss(chosen, rejected, margin=margin)
    assert loss.item() == pytest.approx(0.513015, abs=1e-6)


def test_centring_adds_the_square_of_the_sum() -> None:
    # log 2 + .01 * (2 + 2)^2
    scores = torch.tensor([2.0])
    loss = bradley_terry_loss(scores, scores, center_coef=0.01)
    assert loss.item() == pytest.approx(math.log(2) + 0.16)


@given(SCORES, SCORES, st.floats(0, 3, width=32), st.floats(0, 1))
def test_equals_the_float64_formula(
    chosen: float, rejected: float, margin: float, center_coef: float
) -> None:
    got = bradley_terry_loss(
        torch.tensor([chosen]),
        torch.tensor([rejected]),
        margin=torch.tensor([margin]),
        center_coef=center_coef,
    )
    expected = math.log1p(math.exp(-(chosen - rejected - margin)))
    expected += center_coef * (chosen + rejected) ** 2
    assert got.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_one_loss_for_each_pair_and_bf16_in_float32_out() -> None:
    loss = bradley_terry_loss(torch.zeros(3, dtype=torch.bfloat16), torch.zeros(3).bfloat16())
    assert loss.shape == (3,)
    assert loss.dtype == torch.float32


def test_recovers_the_log_odds_of_the_preferences() -> None:
    # chosen wins 3 times of 4: the minimiser of the expected loss is log 3
    difference = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([difference], max_iter=50, line_search_fn="strong_wolfe")
    zero = torch.zeros(1, dtype=torch.float64)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        wins, loses = bradley_terry_loss(difference, zero), bradley_terry_loss(zero, difference)
        loss = (0.75 * wins + 0.25 * loses).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert difference.item() == pytest.approx(math.log(3), abs=1e-5)


def test_negative_centring_is_refused() -> None:
    with pytest.raises(ValueError, match="center_coef=-1"):
        bradley_terry_loss(torch.zeros(1), torch.zeros(1), center_coef=-1.0)
