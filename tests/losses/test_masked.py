from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from align.losses import masked_mean, masked_sum, masked_var, masked_whiten

FLOATS = st.floats(-100, 100, width=32)
SHAPES = hnp.array_shapes(min_dims=1, max_dims=3, max_side=6)


def draw_array_and_mask(data: st.DataObject) -> tuple[np.ndarray, np.ndarray]:
    shape = data.draw(SHAPES)
    x = data.draw(hnp.arrays(np.float32, shape, elements=FLOATS))
    return x, data.draw(hnp.arrays(np.bool_, shape))


def test_literal_sum_mean_variance() -> None:
    # counted: 1, 3, 8; sum 12, mean 4, squared deviations 9 + 1 + 16 = 26
    x = torch.tensor([[1.0, 3.0, 100.0], [8.0, -7.0, 0.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert masked_sum(x, mask).item() == 12
    assert masked_mean(x, mask).item() == 4
    assert masked_var(x, mask).item() == pytest.approx(26 / 3)
    assert masked_var(x, mask, unbiased=True).item() == 13


def test_whitening_of_the_golden_square() -> None:
    # 1.2 .. 2.0: mean 1.6, deviations -.4 .. .4, squares sum to 2 (.16 + .09 + .04 + .01) = .6
    # biased:   -.4 / sqrt(.6 / 9) = -1.5492      unbiased: -.4 / sqrt(.6 / 8) = -1.4606
    x = torch.arange(12, 21).reshape(3, 3) / 10
    mask = torch.ones(3, 3, dtype=torch.bool)
    assert masked_whiten(x, mask)[0, 0].item() == pytest.approx(-1.5492, abs=5e-5)
    unbiased = masked_whiten(x, mask, unbiased=True)
    assert unbiased[0, 0].item() == pytest.approx(-1.4606, abs=5e-5)
    kept = masked_whiten(x, mask, keep_mean=True)
    assert kept[0, 0].item() == pytest.approx(1.6 - 1.5492, abs=5e-5)


@given(st.data())
def test_equals_numpy_on_the_counted_entries(data: st.DataObject) -> None:
    x, mask = draw_array_and_mask(data)
    counted = x[mask].astype(np.float64)
    mean = counted.mean() if counted.size else 0.0
    got = masked_mean(torch.tensor(x), torch.tensor(mask)).item()
    assert got == pytest.approx(mean, rel=1e-5, abs=1e-4)
    variance = counted.var() if counted.size else 0.0
    got = masked_var(torch.tensor(x), torch.tensor(mask)).item()
    assert got == pytest.approx(variance, rel=1e-4, abs=1e-3)


@given(st.data())
def test_whitened_has_mean_0_variance_1_and_0_outside(data: st.DataObject) -> None:
    x, mask = draw_array_and_mask(data)
    white = masked_whiten(torch.tensor(x), torch.tensor(mask)).double().numpy()
    assert (white[~mask] == 0).all()
    counted = x[mask].astype(np.float64)
    if counted.size and counted.var() > 1e-2 * (1 + np.abs(counted).max()) ** 2:
        assert white[mask].mean() == pytest.approx(0, abs=1e-4)
        assert white[mask].var() == pytest.approx(1, abs=1e-3)


def test_nothing_counted_is_0_with_gradient_0() -> None:
    x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    mask = torch.zeros(1, 2, dtype=torch.bool)
    (masked_mean(x, mask) + masked_var(x, mask) + masked_whiten(x, mask).sum()).backward()
    assert masked_mean(x, mask).item() == 0
    assert x.grad.eq(0).all()


def test_one_counted_token() -> None:
    x, mask = torch.tensor([5.0, 9.0]), torch.tensor([True, False])
    assert masked_var(x, mask).item() == 0
    assert masked_var(x, mask, unbiased=True).item() == 0
    assert masked_whiten(x, mask).tolist() == [0, 0]
    assert masked_whiten(x, mask, keep_mean=True).tolist() == [5, 0]


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_masked_entries_reach_neither_value_nor_gradient(poison: float) -> None:
    x = torch.tensor([1.0, 3.0, poison], requires_grad=True)
    mask = torch.tensor([True, True, False])
    total = masked_mean(x, mask) + masked_var(x, mask) + masked_whiten(x, mask)[0]
    total.backward()
    assert total.item() == pytest.approx(2 + 1 - 1)
    assert x.grad.isfinite().all()
    assert x.grad[2] == 0


def test_counted_nan_is_not_hidden() -> None:
    x, mask = torch.tensor([1.0, math.nan]), torch.tensor([True, True])
    assert masked_mean(x, mask).isnan()


def test_microbatches_with_a_denominator_add_up() -> None:
    x, mask = torch.randn(6, 5), torch.rand(6, 5) > 0.4
    n = int(mask.sum())
    parts = [masked_mean(x[i : i + 2], mask[i : i + 2], denominator=n) for i in (0, 2, 4)]
    assert sum(parts).item() == pytest.approx(masked_mean(x, mask).item(), rel=1e-5)
    # a mean of microbatch means is something else when lengths differ
    assert x[:1].mean() != pytest.approx(masked_mean(x, mask).item())


def test_denominator_must_be_positive() -> None:
    with pytest.raises(ValueError, match="denominator=0"):
        masked_mean(torch.ones(1), torch.ones(1, dtype=torch.bool), denominator=0)


def test_bf16_is_summed_in_float32() -> None:
    # 1 + 1000 * 2^-9 in bf16 steps of 2^-7 would stay 1
    x = torch.full((1001,), 2.0**-9, dtype=torch.bfloat16)
    x[0] = 1
    total = masked_sum(x, torch.ones(1001, dtype=torch.bool))
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(1 + 1000 * 2**-9)


def test_shapes_are_checked() -> None:
    with pytest.raises(Exception, match=r"(?i)type-check"):
        masked_mean(torch.ones(2, 3), torch.ones(2, 2, dtype=torch.bool))
