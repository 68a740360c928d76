from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from align.losses import (
    adapt_kl_coef,
    approx_kl,
    clip_fraction,
    explained_variance,
    ppo_policy_loss,
    value_loss,
)

# three tokens and a masked one; ratios 1.1, 1.5, .5; advantages 1, 1, -1
LOGPROBS = torch.tensor([[1.1, 1.5, 0.5, 9.0]]).log()
OLD_LOGPROBS = torch.zeros(1, 4)
ADVANTAGES = torch.tensor([[1.0, 1.0, -1.0, 50.0]])
MASK = torch.tensor([[True, True, True, False]])


def test_golden_policy_loss() -> None:
    # max(-1.1, -1.1) = -1.1;  max(-1.5, -1.2) = -1.2;  max(.5, .8) = .8;  sum -1.5, mean -.5
    loss = ppo_policy_loss(LOGPROBS, OLD_LOGPROBS, ADVANTAGES, MASK, clip_range=0.2)
    assert loss.item() == pytest.approx(-0.5, abs=1e-6)


def test_golden_clip_fraction_and_approx_kl() -> None:
    # the second and the third token are clipped
    fraction = clip_fraction(LOGPROBS, OLD_LOGPROBS, ADVANTAGES, MASK, clip_range=0.2)
    assert fraction.item() == pytest.approx(2 / 3)
    # rho - 1 - log rho: .1 - .095310 = .004690, .5 - .405465 = .094535, -.5 + .693147 = .193147
    kl = approx_kl(LOGPROBS, OLD_LOGPROBS, MASK)
    assert kl.item() == pytest.approx(0.292372 / 3, abs=1e-6)


def test_clipping_spares_the_side_that_makes_amends() -> None:
    # A > 0 and rho < 1 - eps, or A < 0 and rho > 1 + eps: the plain branch is larger and teaches
    logprobs = torch.tensor([[0.5, 1.5]]).log().requires_grad_()
    advantages, mask = torch.tensor([[1.0, -1.0]]), torch.ones(1, 2, dtype=torch.bool)
    old = torch.zeros(1, 2)
    assert clip_fraction(logprobs, old, advantages, mask, clip_range=0.2).item() == 0
    ppo_policy_loss(logprobs, old, advantages, mask, clip_range=0.2).backward()
    # d(-A rho)/d logp = -A rho, halved by the mean
    assert logprobs.grad[0].tolist() == pytest.approx([-0.25, 0.75])


def test_clipped_tokens_have_no_gradient() -> None:
    logprobs = LOGPROBS.clone().requires_grad_()
    ppo_policy_loss(logprobs, OLD_LOGPROBS, ADVANTAGES, MASK, clip_range=0.2).backward()
    assert logprobs.grad[0].tolist() == pytest.approx([-1.1 / 3, 0, 0, 0])


@pytest.mark.parametrize("clip_range", [0.1, 0.2, 1.5])
def test_gradient_at_ratio_1_is_reinforce_with_baseline(clip_range: float) -> None:
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([[0, 3, 1], [4, 4, 2]])
    advantages = torch.randn(2, 3, dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, True, True]])

    logprobs = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    loss = ppo_policy_loss(logprobs, logprobs.detach(), advantages, mask, clip_range=clip_range)
    got = torch.autograd.grad(loss, logits)[0]

    logprobs = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    reinforce = -(advantages * logprobs)[mask].sum() / 5
    expected = torch.autograd.grad(reinforce, logits)[0]
    assert torch.allclose(got, expected, rtol=1e-12, atol=1e-14)


def test_golden_value_loss() -> None:
    # V 1, V_old .5, R 0: clipped to .7; max(1, .49) = 1
    # V 2, V_old 2, R 2.5: .25 either way
    # V 2.4, V_old 2, R 2.5: clipped to 2.2; max(.01, .09) = .09
    # .5 * 1.34 / 3
    values = torch.tensor([[1.0, 2.0, 2.4, math.nan]], requires_grad=True)
    old_values = torch.tensor([[0.5, 2.0, 2.0, 0.0]])
    returns = torch.tensor([[0.0, 2.5, 2.5, math.inf]])
    loss = value_loss(values, old_values, returns, MASK, clip_range=0.2)
    assert loss.item() == pytest.approx(0.67 / 3, abs=1e-6)
    loss.backward()
    # (V - R) / 3 where the plain branch is the larger (or equal), 0 where the clipped one is
    assert values.grad[0].tolist() == pytest.approx([1 / 3, -0.5 / 3, 0, 0], abs=1e-6)


def test_value_loss_without_clipping() -> None:
    # .5 * (1 + .25 + .01) / 3
    values = torch.tensor([[1.0, 2.0, 2.4, 7.0]])
    returns = torch.tensor([[0.0, 2.5, 2.5, 0.0]])
    loss = value_loss(values, torch.zeros(1, 4), returns, MASK, clip_range=None)
    assert loss.item() == pytest.approx(0.21, abs=1e-6)


@given(data=st.data())
def test_losses_equal_float64_formulas(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    number = st.floats(-2, 2, width=32)

    def draw(elements: st.SearchStrategy) -> list[list]:
        row = st.lists(elements, min_size=columns, max_size=columns)
        return data.draw(st.lists(row, min_size=rows, max_size=rows))

    new, old, advantages, values = (draw(number) for _ in range(4))
    mask = draw(st.booleans())
    eps = data.draw(st.floats(0.05, 0.5))
    policy_terms, value_terms = [], []
    for b in range(rows):
        for t in range(columns):
            if mask[b][t]:
                rho, a = math.exp(new[b][t] - old[b][t]), advantages[b][t]
                policy_terms.append(max(-a * rho, -a * min(max(rho, 1 - eps), 1 + eps)))
                v, v_old, r = values[b][t], old[b][t], a
                clipped = min(max(v, v_old - eps), v_old + eps)
                value_terms.append(max((v - r) ** 2, (clipped - r) ** 2))
    n = max(len(policy_terms), 1)
    t_new, t_old, t_adv, t_values = (torch.tensor(x) for x in (new, old, advantages, values))
    t_mask = torch.tensor(mask)
    policy = ppo_policy_loss(t_new, t_old, t_adv, t_mask, clip_range=eps)
    assert policy.item() == pytest.approx(sum(policy_terms) / n, rel=1e-4, abs=1e-4)
    value = value_loss(t_values, t_old, t_adv, t_mask, clip_range=eps)
    assert value.item() == pytest.approx(0.5 * sum(value_terms) / n, rel=1e-4, abs=1e-4)


def losses_of(rows: slice, denominator: int | None, inputs: list[Tensor], mask: Tensor) -> Tensor:
    new, old, advantages, values = (x[rows] for x in inputs)
    return torch.stack(
        [
            ppo_policy_loss(
                new, old, advantages, mask[rows], clip_range=0.2, denominator=denominator
            ),
            value_loss(
                values, old, advantages, mask[rows], clip_range=0.2, denominator=denominator
            ),
            clip_fraction(
                new, old, advantages, mask[rows], clip_range=0.2, denominator=denominator
            ),
            approx_kl(new, old, mask[rows], denominator=denominator),
        ]
    )


def test_microbatches_add_up_to_one_minibatch() -> None:
    inputs = [torch.randn(6, 7) for _ in range(4)]
    mask = torch.arange(7) < torch.tensor([7, 1, 3, 0, 5, 2])[:, None]
    whole = losses_of(slice(0, 6), None, inputs, mask)
    n = int(mask.sum())
    parts = [losses_of(slice(i, i + 2), n, inputs, mask) for i in (0, 2, 4)]
    assert torch.allclose(sum(parts), whole, rtol=1e-5, atol=1e-6)
    means = [losses_of(slice(i, i + 2), None, inputs, mask) for i in (0, 2, 4)]
    assert not torch.allclose(sum(means) / 3, whole, rtol=1e-3)


def test_masked_tokens_reach_neither_value_nor_gradient() -> None:
    # +inf in the ratio, NaN in the advantage: what an uninitialised column may hold
    logprobs = torch.tensor([[-1.0, 500.0]], requires_grad=True)
    advantages = torch.tensor([[1.0, math.nan]])
    mask = torch.tensor([[True, False]])
    loss = ppo_policy_loss(logprobs, torch.tensor([[-1.0, 0.0]]), advantages, mask, clip_range=0.2)
    loss.backward()
    assert loss.item() == -1
    assert logprobs.grad.tolist() == [[-1, 0]]


def test_nothing_counted_is_0_with_gradient_0() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    old = torch.randn(2, 3)
    loss = ppo_policy_loss(x, old, old, mask, clip_range=0.2)
    loss = loss + value_loss(x, old, old, mask, clip_range=0.2)
    loss.backward()
    assert loss.item() == 0
    assert x.grad.eq(0).all()


def test_gradient_does_not_reach_old_values_advantages_or_returns() -> None:
    x = torch.randn(1, 3, requires_grad=True)
    frozen = [torch.randn(1, 3, requires_grad=True) for _ in range(2)]
    mask = torch.ones(1, 3, dtype=torch.bool)
    loss = ppo_policy_loss(x, frozen[0], frozen[1], mask, clip_range=0.2)
    (loss + value_loss(x, frozen[0], frozen[1], mask, clip_range=0.2)).backward()
    assert all(f.grad is None for f in frozen)


@given(st.lists(st.tuples(st.floats(-20, 0), st.floats(-20, 0)), min_size=1, max_size=5))
def test_approx_kl_is_never_negative(pairs: list[tuple[float, float]]) -> None:
    new, old = (torch.tensor([list(column)]) for column in zip(*pairs, strict=True))
    mask = torch.ones(new.shape, dtype=torch.bool)
    assert approx_kl(new, old, mask).item() >= 0


def test_explained_variance() -> None:
    mask = torch.tensor([[True, True, True, False]])
    returns = torch.tensor([[1.0, 2.0, 3.0, 99.0]])
    # perfect; constant; residuals 0, 0, 1 with variance 2/9 against 2/3
    assert explained_variance(returns, returns, mask).item() == 1
    assert explained_variance(torch.full((1, 4), 5.0), returns, mask).item() == 0
    values = torch.tensor([[1.0, 2.0, 2.0, 0.0]])
    assert explained_variance(values, returns, mask).item() == pytest.approx(2 / 3)
    assert explained_variance(returns, torch.ones(1, 4), mask).item() == 0


@pytest.mark.parametrize(
    ("observed_kl", "expected"),
    [
        # 9/6 - 1 = .5, clipped to .2: .1 * (1 + .2 * 64 / 10000)
        (9.0, 0.100128),
        # 5.4/6 - 1 = -.1: .1 * (1 - .1 * .0064)
        (5.4, 0.099936),
        # on target
        (6.0, 0.1),
        # 0/6 - 1 = -1, clipped to -.2
        (0.0, 0.099872),
    ],
)
def test_golden_kl_coef(observed_kl: float, expected: float) -> None:
    coef = adapt_kl_coef(0.1, observed_kl=observed_kl, target=6.0, batch=64, horizon=10000)
    assert coef == pytest.approx(expected, abs=1e-12)


def test_bad_numbers_are_named() -> None:
    x, mask = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match="clip_range=0"):
        ppo_policy_loss(x, x, x, mask, clip_range=0)
    with pytest.raises(ValueError, match="None for no clipping"):
        value_loss(x, x, x, mask, clip_range=0)
    with pytest.raises(ValueError, match="target=0"):
        adapt_kl_coef(0.1, observed_kl=1.0, target=0, batch=1, horizon=10)
    with pytest.raises(ValueError, match="horizon=0"):
        adapt_kl_coef(0.1, observed_kl=1.0, target=1, batch=1, horizon=0)
