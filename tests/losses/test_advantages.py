from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from align.losses import gae, kl_estimate, shape_rewards
from align.losses.advantages import ESTIMATORS, OPTIONS, Rewarded

LOGPROBS = torch.tensor([[-1.0, -0.5, -0.2]])
REF_LOGPROBS = torch.tensor([[-1.2, -0.9, -0.1]])
VALUES = torch.tensor([[0.1, 0.2, 0.3]])
ALL = torch.ones(1, 3, dtype=torch.bool)


def mask_of(lengths: list[int], width: int) -> Tensor:
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def test_golden_rewards_and_advantages() -> None:
    # kl      .2, .4, -.1
    # rewards -.05 * kl = -.01, -.02, .005; + score 1 on the last: 1.005
    rewards = shape_rewards(torch.tensor([1.0]), LOGPROBS, REF_LOGPROBS, ALL, kl_coef=0.05)
    assert rewards[0].tolist() == pytest.approx([-0.01, -0.02, 1.005], abs=1e-6)
    # delta   -.01 + .2 - .1 = .09    -.02 + .3 - .2 = .08    1.005 + 0 - .3 = .705
    # A[2] = .705    A[1] = .08 + .95 * .705 = .74975    A[0] = .09 + .95 * .74975 = .8022625
    # returns = A + V = .9022625, .94975, 1.005
    advantages, returns = gae(rewards, VALUES, ALL, gamma=1.0, gae_lambda=0.95)
    assert advantages[0].tolist() == pytest.approx([0.8022625, 0.74975, 0.705], abs=1e-6)
    assert returns[0].tolist() == pytest.approx([0.9022625, 0.94975, 1.005], abs=1e-6)


def test_golden_kl_estimates() -> None:
    # log p/ref = .5: k1 .5, k2 .125, k3 e^-.5 - 1 + .5 = .106531
    p, ref = torch.tensor([-1.0]), torch.tensor([-1.5])
    assert kl_estimate(p, ref).item() == pytest.approx(0.5)
    assert kl_estimate(p, ref, "k2").item() == pytest.approx(0.125)
    assert kl_estimate(p, ref, "k3").item() == pytest.approx(0.106531, abs=1e-6)


def test_kl_estimates_average_to_the_exact_kl() -> None:
    # exact expectation over a distribution of five tokens: k1 and k3 are unbiased, k2 is not
    p = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], dtype=torch.float64)
    ref = torch.tensor([0.1, 0.2, 0.2, 0.2, 0.3], dtype=torch.float64)
    exact = (p * (p / ref).log()).sum().item()
    kinds = ("k1", "k2", "k3")
    expected = {k: (p * kl_estimate(p.log(), ref.log(), k)).sum().item() for k in kinds}
    assert expected["k1"] == pytest.approx(exact, rel=1e-12)
    assert expected["k3"] == pytest.approx(exact, rel=1e-12)
    assert abs(expected["k2"] - exact) > 0.01


def test_gradients_of_the_kl_estimates_as_losses() -> None:
    # on-policy: E[grad k1] = 0, E[grad k2] = grad KL(p||ref), E[grad k3] = grad KL(ref||p)
    logits = torch.tensor([1.0, 0.5, -0.3, 0.0], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)

    def gradient_of(kind: str) -> Tensor:
        logp = logits.log_softmax(0)
        loss = (logp.exp().detach() * kl_estimate(logp, ref.log(), kind)).sum()
        return torch.autograd.grad(loss, logits)[0]

    logp = logits.log_softmax(0)
    reverse = torch.autograd.grad((logp.exp() * (logp - ref.log())).sum(), logits)[0]
    logp = logits.log_softmax(0)
    forward = torch.autograd.grad((ref * (ref.log() - logp)).sum(), logits)[0]
    assert torch.allclose(gradient_of("k1"), torch.zeros(4, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(gradient_of("k2"), reverse, atol=1e-12)
    assert torch.allclose(gradient_of("k3"), forward, atol=1e-12)


@given(st.floats(-20, 20), st.floats(-20, 20))
def test_kl_estimates_equal_float64_formulas(logp: float, ref: float) -> None:
    p, q = torch.tensor([logp]), torch.tensor([ref])
    d = p.double().item() - q.double().item()
    assert kl_estimate(p, q, "k1").item() == pytest.approx(d, rel=1e-5, abs=1e-5)
    assert kl_estimate(p, q, "k2").item() == pytest.approx(d * d / 2, rel=1e-5, abs=1e-4)
    k3 = kl_estimate(p, q, "k3").item()
    assert k3 == pytest.approx(math.exp(-d) - 1 + d, rel=1e-4, abs=1e-4)
    assert k3 >= 0


def test_k3_is_exact_for_tiny_differences() -> None:
    # d = 2^-12: d^2 / 2 - d^3 / 6 = 2.98e-8, which e^-d - 1 + d in float32 rounds away
    d = 2.0**-12
    got = kl_estimate(torch.tensor([d]), torch.tensor([0.0]), "k3").item()
    assert got == pytest.approx(d * d / 2, rel=0.01)


def test_unknown_kl_kind_names_the_allowed() -> None:
    with pytest.raises(ValueError, match="'k4': allowed are k1, k2, k3"):
        kl_estimate(LOGPROBS, REF_LOGPROBS, "k4")


# ---------------------------------------------------------------- shape_rewards


def test_score_lands_on_the_last_token_of_each_row() -> None:
    zeros = torch.zeros(4, 3)
    rewards = shape_rewards(
        torch.tensor([1.0, 2.0, 3.0, 4.0]), zeros, zeros, mask_of([1, 2, 3, 2], 3), kl_coef=0.1
    )
    assert rewards.tolist() == [[1, 0, 0], [0, 2, 0], [0, 0, 3], [0, 4, 0]]


def test_rewards_ignore_what_is_masked_and_carry_no_gradient() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, math.nan]], requires_grad=True)
    ref = torch.tensor([[-1.5, -2.0, math.inf]])
    rewards = shape_rewards(torch.tensor([3.0]), logprobs, ref, mask_of([2], 3), kl_coef=0.2)
    assert rewards[0].tolist() == pytest.approx([-0.1, 3.0, 0.0])
    assert not rewards.requires_grad


def test_kl_kind_is_charged() -> None:
    zero = torch.zeros(1)
    k2 = shape_rewards(zero, LOGPROBS, REF_LOGPROBS, ALL, kl_coef=1.0, kl_kind="k2")
    assert k2[0].tolist() == pytest.approx([-0.02, -0.08, -0.005], abs=1e-6)


def test_kl_coef_0_pays_the_score_alone() -> None:
    rewards = shape_rewards(torch.tensor([0.7]), LOGPROBS, REF_LOGPROBS, ALL, kl_coef=0)
    assert rewards[0].tolist() == pytest.approx([0, 0, 0.7])


def test_a_row_without_tokens_is_named() -> None:
    zeros = torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"row 1 has no response token \(1 such rows of 3\)"):
        shape_rewards(torch.zeros(3), zeros, zeros, mask_of([2, 0, 1], 2), kl_coef=0.1)


def test_negative_kl_coef_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kl_coef=-0\.1"):
        shape_rewards(torch.zeros(1), LOGPROBS, REF_LOGPROBS, ALL, kl_coef=-0.1)


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=5),
    st.floats(0, 2),
    st.integers(0, 2**31),
)
def test_row_sum_is_score_minus_kl(lengths: list[int], kl_coef: float, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    logprobs, ref = (-torch.rand(len(lengths), 6, generator=rng) * 5 for _ in range(2))
    scores = torch.randn(len(lengths), generator=rng)
    rewards = shape_rewards(scores, logprobs, ref, mask_of(lengths, 6), kl_coef=kl_coef)
    for b, n in enumerate(lengths):
        kl = (logprobs[b, :n].double() - ref[b, :n].double()).sum().item()
        expected = scores[b].item() - kl_coef * kl
        assert rewards[b].double().sum().item() == pytest.approx(expected, abs=1e-4)
        assert (rewards[b, n:] == 0).all()


# ---------------------------------------------------------------- gae


def slow_advantages(
    rewards: list[float], values: list[float], gamma: float, gae_lambda: float
) -> list[float]:
    """The definition, A_t = sum_k (gamma lambda)^k delta_{t+k}, one episode, python floats."""
    values = [*values, 0.0]
    deltas = [r + gamma * values[t + 1] - values[t] for t, r in enumerate(rewards)]
    return [
        sum((gamma * gae_lambda) ** k * delta for k, delta in enumerate(deltas[t:]))
        for t in range(len(deltas))
    ]


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("lengths", [[1], [4], [1, 4, 2], [3, 0, 1, 4]])
def test_gae_equals_each_episode_alone(gamma: float, gae_lambda: float, lengths: list[int]) -> None:
    rng = torch.Generator().manual_seed(7)
    shape = (len(lengths), 4)
    # what is masked holds noise, which must not leak in
    rewards, values = (torch.randn(shape, generator=rng) for _ in range(2))
    advantages, returns = gae(
        rewards, values, mask_of(lengths, 4), gamma=gamma, gae_lambda=gae_lambda
    )
    for b, n in enumerate(lengths):
        expected = slow_advantages(
            rewards[b, :n].tolist(), values[b, :n].tolist(), gamma, gae_lambda
        )
        assert advantages[b].tolist() == pytest.approx([*expected, *[0.0] * (4 - n)], abs=1e-5)
        expected_returns = [a + v for a, v in zip(expected, values[b, :n].tolist(), strict=True)]
        assert returns[b].tolist() == pytest.approx([*expected_returns, *[0.0] * (4 - n)], abs=1e-5)


@given(st.integers(0, 2**31), st.floats(0, 1), st.integers(1, 8))
@settings(max_examples=50)
def test_lambda_0_is_the_td_residual(seed: int, gamma: float, n: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(1, n, generator=rng) for _ in range(2))
    advantages, _ = gae(rewards, values, mask_of([n], n), gamma=gamma, gae_lambda=0)
    next_values = torch.cat([values[:, 1:], torch.zeros(1, 1)], dim=1)
    assert torch.allclose(advantages, rewards + gamma * next_values - values, atol=1e-5)


@given(st.integers(0, 2**31), st.floats(0, 1), st.integers(1, 8))
@settings(max_examples=50)
def test_lambda_1_is_the_monte_carlo_return(seed: int, gamma: float, n: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(1, n, generator=rng) for _ in range(2))
    advantages, returns = gae(rewards, values, mask_of([n], n), gamma=gamma, gae_lambda=1)
    r = rewards[0].double().numpy()
    monte_carlo = [float(np.dot(r[t:], gamma ** np.arange(n - t))) for t in range(n)]
    assert returns[0].tolist() == pytest.approx(monte_carlo, abs=1e-4)
    assert (advantages[0] + values[0]).tolist() == pytest.approx(monte_carlo, abs=1e-4)


def test_masked_columns_take_no_time() -> None:
    # a tool's output in the middle, or padding on the left, changes nothing for the tokens sampled
    rewards, values = torch.randn(1, 3), torch.randn(1, 3)
    plain, _ = gae(rewards, values, mask_of([3], 3), gamma=0.9, gae_lambda=0.8)
    columns = torch.tensor([1, 2, 5])
    wide_rewards, wide_values = torch.full((1, 6), math.nan), torch.full((1, 6), math.nan)
    wide_rewards[:, columns], wide_values[:, columns] = rewards, values
    mask = torch.zeros(1, 6, dtype=torch.bool)
    mask[:, columns] = True
    wide, _ = gae(wide_rewards, wide_values, mask, gamma=0.9, gae_lambda=0.8)
    assert torch.equal(wide[:, columns], plain)
    assert (wide[~mask] == 0).all()


def test_gae_carries_no_gradient() -> None:
    values = torch.randn(1, 3, requires_grad=True)
    advantages, returns = gae(torch.randn(1, 3), values, ALL, gamma=1.0, gae_lambda=0.95)
    assert not advantages.requires_grad
    assert not returns.requires_grad


@pytest.mark.parametrize(("name", "value"), [("gamma", 1.1), ("gae_lambda", -0.1)])
def test_gae_refuses_numbers_out_of_range(name: str, value: float) -> None:
    numbers = {"gamma": 1.0, "gae_lambda": 0.95, name: value}
    with pytest.raises(ValueError, match=name):
        gae(VALUES, VALUES, ALL, **numbers)


def test_estimators_by_name() -> None:
    (estimator,) = ESTIMATORS.values()
    rewards = torch.tensor([[1.0, 0.0, 2.0]])
    found = estimator.function(Rewarded(rewards, VALUES, ALL, 0.9, 0.5, 1))
    direct = gae(rewards, VALUES, ALL, gamma=0.9, gae_lambda=0.5)
    assert all(a.equal(b) for a, b in zip(found, direct, strict=True))
    assert (estimator.values, estimator.groups, estimator.options) == (True, False, ("gae_lambda",))
    assert OPTIONS == ("gae_lambda",)
