from __future__ import annotations

import pytest
import torch

from align.config.sections import OptimOptions
from align.training.optim import lr_factor, make_optimizer, set_lr


def factors(schedule: str, *, total: int = 10, warmup: float = 0.2, final: float = 0.0) -> list:
    return [
        lr_factor(step, total, schedule=schedule, warmup_fraction=warmup, final_lr_fraction=final)
        for step in range(total)
    ]


def test_linear() -> None:
    # two steps of warm-up, then 1 - k/8
    want = [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    assert factors("linear") == pytest.approx(want)


def test_linear_to_a_tenth() -> None:
    # .1 + .9 * (1 - k/8)
    want = [0.5, 1.0, 1.0, 0.8875, 0.775, 0.6625, 0.55, 0.4375, 0.325, 0.2125]
    assert factors("linear", final=0.1) == pytest.approx(want)


def test_cosine() -> None:
    # (1 + cos(pi k/8)) / 2 for k = 0..7
    want = [0.5, 1.0, 1.0, 0.961940, 0.853553, 0.691342, 0.5, 0.308658, 0.146447, 0.038060]
    assert factors("cosine") == pytest.approx(want, abs=1e-6)


def test_constant_warms_up_too() -> None:
    assert factors("constant", total=5, warmup=0.4) == [0.5, 1, 1, 1, 1]
    assert factors("constant", total=5, warmup=0.0) == [1] * 5


def test_no_step_is_wasted_at_zero() -> None:
    for schedule in ("linear", "cosine", "constant"):
        for total in (1, 2, 3, 50):
            for warmup in (0.0, 0.05, 1.0):
                assert min(factors(schedule, total=total, warmup=warmup)) > 0


def test_set_lr_reaches_every_group() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    options = OptimOptions(lr=1.0, schedule="linear", warmup_fraction=0.0)
    optimizer = make_optimizer(model, options)
    assert set_lr(optimizer, 0.2, 1, 4, options) == pytest.approx(0.15)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.15, 0.15])


def test_options_reach_the_optimizer() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    model[0].weight.requires_grad_(True)
    options = OptimOptions(lr=0.3, weight_decay=0.25, beta1=0.8, beta2=0.7, eps=1e-4)
    optimizer = make_optimizer(model, options)
    matrices, vectors = optimizer.param_groups
    # biases and norms do not decay
    assert [p.ndim for p in matrices["params"]] == [2]
    assert [p.ndim for p in vectors["params"]] == [1, 1, 1]
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.25, 0.0)
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.3, (0.8, 0.7), 1e-4)
    assert make_optimizer(model, options, lr=0.1).param_groups[0]["lr"] == 0.1


def test_frozen_parameters_are_left_out() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 1))
    model[0].requires_grad_(False)
    optimizer = make_optimizer(model, OptimOptions())
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model[1].parameters()}
