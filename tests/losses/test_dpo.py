from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from align.losses import dpo_loss
from align.losses.dpo import (
    LOSSES,
    Loss,
    sft_term,
    wpo_weights,
)

# by their papers' formulas
WITH_LENGTHS = {"ipo", "sigmoid_norm", "simpo", "orpo"}
WITHOUT_REFERENCE = {"simpo", "orpo"}
WITH_SMOOTHING = {"sigmoid", "robust", "exo_pair"}
WITH_DIVERGENCE = {"sigmoid", "hinge", "robust", "exo_pair"}


def tensor(x: float) -> Tensor:
    return torch.tensor([x], dtype=torch.float64)


def loss_of(
    loss_type: str,
    policy: tuple[float, float] = (-10.0, -14.0),
    reference: tuple[float, float] = (-11.0, -13.0),
    lengths: tuple[int, int] = (5, 8),
    beta: float = 0.1,
    **options: float | str,
) -> float:
    return dpo_loss(
        *(tensor(x) for x in (*policy, *reference)),
        beta=beta,
        loss_type=loss_type,
        chosen_lengths=torch.tensor([lengths[0]]),
        rejected_lengths=torch.tensor([lengths[1]]),
        **options,
    ).per_example.item()


def sig(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def logsig(x: float) -> float:
    return min(x, 0) - math.log1p(math.exp(-abs(x)))


# c = -10 - -11 = 1, r = -14 - -13 = -1, D = 2, b = .1, lengths 5 and 8, e = .1
# c/5 = .2, r/8 = -.125; log-probs per token: -10/5 = -2, -14/8 = -1.75
GOLDEN = {
    # log(1 + e^-.2)
    ("sigmoid", 0.0): 0.598139,
    # .9 * .598139 + .1 * log(1 + e^.2) = .538325 + .1 * .798139
    ("sigmoid", 0.1): 0.618139,
    # 1 - .2
    ("hinge", 0.0): 0.8,
    # (.2 + .125 - 5)^2 = 4.675^2
    ("ipo", 0.0): 21.855625,
    # (2 - 5)^2
    ("ipo_sum", 0.0): 9.0,
    # (.9 * .598139 - .1 * .798139) / .8
    ("robust", 0.1): 0.573139,
    # log(1 + e^-.0325)
    ("sigmoid_norm", 0.0): 0.677029,
    # sig(.2) = .549834: .549834 (-.598139 - log .9) + .450166 (-.798139 - log .1)
    # = .549834 * -.492778 + .450166 * 1.504446
    ("exo_pair", 0.1): 0.406303,
    # log(1 + e^-.1) + .5 log(1 + e^.1) + .5 log(1 + e^-.1) = .644397 + .372198 + .322198
    ("nca_pair", 0.0): 1.338793,
    # 2 log(1 + e^-.1)
    ("bco_pair", 0.0): 1.288793,
    # (1 - 5)^2 + (-1 + 5)^2
    ("sppo_hard", 0.0): 32.0,
    # 1 - sig(.1) + sig(-.1) = 1 - .524979 + .475021
    ("apo_zero", 0.0): 0.950042,
    # sig(.1) + 1 - sig(.2) = .524979 + 1 - .549834
    ("apo_down", 0.0): 0.975145,
    # .1 (-2 + 1.75) - .5 = -.525: log(1 + e^.525)
    ("simpo", 0.0): 0.989712,
    # log-odds -2 - log(1 - e^-2) = -1.854587, -1.75 - log(1 - e^-1.75) = -1.559113;
    # 2 + .1 log(1 + e^.295474) = 2 + .1 * .851757
    ("orpo", 0.0): 2.085176,
}


@pytest.mark.parametrize(("loss_type", "smoothing"), GOLDEN)
def test_golden_value(loss_type: str, smoothing: float) -> None:
    got = loss_of(loss_type, label_smoothing=smoothing)
    assert got == pytest.approx(GOLDEN[loss_type, smoothing], abs=2e-6)


def test_every_loss_has_a_golden_value() -> None:
    assert {name for name, _ in GOLDEN} == set(LOSSES)


def formula(name: str, pc: float, pr: float, rc: float, rr: float, b: float, e: float) -> float:
    """The table once more, in python floats; lengths 5 and 8, gamma .5, lambda .1."""
    c, r = pc - rc, pr - rr
    bd = b * (c - r)
    odds = [m - math.log(1 - math.exp(m)) for m in (pc / 5, pr / 8)]
    kl = sum(
        math.exp(log_p) * (log_p - math.log(q))
        for log_p, q in ((logsig(bd), 1 - e), (logsig(-bd), max(e, 1e-9)))
    )
    return {
        "sigmoid": -(1 - e) * logsig(bd) - e * logsig(-bd),
        "hinge": max(0.0, 1 - bd),
        "ipo": (c / 5 - r / 8 - 1 / (2 * b)) ** 2,
        "ipo_sum": (c - r - 1 / (2 * b)) ** 2,
        "robust": (-(1 - e) * logsig(bd) + e * logsig(-bd)) / (1 - 2 * e),
        "sigmoid_norm": -logsig(b * (c / 5 - r / 8)),
        "exo_pair": kl,
        "nca_pair": -logsig(b * c) - 0.5 * logsig(-b * c) - 0.5 * logsig(-b * r),
        "bco_pair": -logsig(b * c) - logsig(-b * r),
        "sppo_hard": (c - 0.5 / b) ** 2 + (r + 0.5 / b) ** 2,
        "apo_zero": 1 - sig(b * c) + sig(b * r),
        "apo_down": sig(b * c) + 1 - sig(bd),
        "simpo": -logsig(b * (pc / 5 - pr / 8) - 0.5),
        "orpo": -pc / 5 - 0.1 * logsig(odds[0] - odds[1]),
    }[name]


@pytest.mark.parametrize("loss_type", LOSSES)
@given(data=st.data())
def test_equals_the_float64_formula(loss_type: str, data: st.DataObject) -> None:
    logprob = st.floats(-60, -0.5, width=32)
    pc, pr, rc, rr = (data.draw(logprob) for _ in range(4))
    beta = data.draw(st.floats(0.01, 3))
    smoothing = data.draw(st.floats(0.01, 0.45)) if loss_type in WITH_SMOOTHING else 0.0
    got = dpo_loss(
        *(torch.tensor([x]) for x in (pc, pr, rc, rr)),
        beta=beta,
        loss_type=loss_type,
        label_smoothing=smoothing,
        chosen_lengths=torch.tensor([5]),
        rejected_lengths=torch.tensor([8]),
    )
    assert got.per_example.dtype == torch.float32
    expected = formula(loss_type, pc, pr, rc, rr, beta, smoothing)
    assert got.per_example.item() == pytest.approx(expected, rel=2e-4, abs=2e-4)


# ---------------------------------------------------------------- rewards and gradients


def test_rewards_are_beta_times_the_log_ratios_and_detached() -> None:
    policy = torch.tensor([-10.0, -20.0], requires_grad=True)
    losses = dpo_loss(
        policy,
        policy - 4,
        torch.tensor([-11.0, -18.0]),
        torch.tensor([-13.0, -20.0]),
        beta=0.5,
    )
    # c = 1, -2 and r = -1, -4
    assert losses.chosen_rewards.tolist() == [0.5, -1.0]
    assert losses.rejected_rewards.tolist() == [-0.5, -2.0]
    assert losses.per_example.requires_grad
    assert not losses.chosen_rewards.requires_grad
    assert not losses.rejected_rewards.requires_grad


def test_rewards_without_a_reference_are_beta_times_the_token_means() -> None:
    losses = dpo_loss(
        torch.tensor([-10.0]),
        torch.tensor([-14.0]),
        None,
        None,
        beta=2.0,
        loss_type="simpo",
        chosen_lengths=torch.tensor([5]),
        rejected_lengths=torch.tensor([8]),
    )
    assert losses.chosen_rewards.item() == -4.0
    assert losses.rejected_rewards.item() == -3.5


@pytest.mark.parametrize("loss_type", LOSSES)
def test_gradient_flows_through_the_policy_only(loss_type: str) -> None:
    inputs = [torch.tensor([x], requires_grad=True) for x in (-10.0, -14.0, -11.0, -13.0)]
    losses = dpo_loss(
        *inputs,
        beta=0.1,
        loss_type=loss_type,
        label_smoothing=0.1 if loss_type == "exo_pair" else 0.0,
        chosen_lengths=torch.tensor([5]),
        rejected_lengths=torch.tensor([8]),
    )
    losses.per_example.sum().backward()
    policy_grads = [x.grad.item() for x in inputs[:2]]
    # descent raises chosen and lowers rejected; apo_down lowers chosen too where c is large
    assert policy_grads[0] < 0 or loss_type == "apo_down"
    assert policy_grads[1] > 0
    assert inputs[2].grad is None
    assert inputs[3].grad is None


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_gradient_at_init_is_minus_half_beta_times_the_difference(beta: float) -> None:
    # policy = reference: grad = -beta/2 (grad logp_chosen - grad logp_rejected)
    logits = torch.tensor([0.3, -1.0, 0.7, 0.1], dtype=torch.float64, requires_grad=True)
    chosen, rejected = torch.tensor([0, 2]), torch.tensor([1, 3, 3])

    def logprob(tokens: Tensor) -> Tensor:
        return logits.log_softmax(0)[tokens].sum()[None]

    p_c, p_r = logprob(chosen), logprob(rejected)
    loss = dpo_loss(p_c, p_r, p_c.detach(), p_r.detach(), beta=beta).per_example.sum()
    got = torch.autograd.grad(loss, logits)[0]
    difference = torch.autograd.grad((logprob(chosen) - logprob(rejected)).sum(), logits)[0]
    assert torch.allclose(got, -beta / 2 * difference, rtol=1e-12, atol=1e-14)


def test_extreme_ratios_stay_finite() -> None:
    for loss_type in set(LOSSES) - WITHOUT_REFERENCE:
        smoothing = 0.1 if loss_type in WITH_SMOOTHING else 0.0
        for policy in ((-1.0, -2000.0), (-2000.0, -1.0)):
            assert math.isfinite(loss_of(loss_type, policy, label_smoothing=smoothing, beta=1.0))


def test_orpo_survives_a_certain_policy() -> None:
    # float32 rounds a certain response's mean log-prob to 0, whose odds are infinite
    chosen = torch.zeros(1, requires_grad=True)
    one = torch.ones(1, dtype=torch.int64)
    losses = dpo_loss(
        chosen,
        torch.tensor([-3.0]),
        None,
        None,
        beta=0.1,
        loss_type="orpo",
        chosen_lengths=one,
        rejected_lengths=one,
    )
    losses.per_example.sum().backward()
    assert losses.per_example.isfinite().all()
    assert chosen.grad.isfinite().all()


# ---------------------------------------------------------------- minimisers


def minimiser(loss_type: str, **options: float) -> float:
    """The c that minimises the loss when r = 0, found numerically: h of the oracles."""
    h = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    optimizer = torch.optim.LBFGS(
        [h],
        max_iter=200,
        tolerance_grad=1e-12,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = dpo_loss(h, zero, zero, zero, loss_type=loss_type, **options).per_example.sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return h.item()


@pytest.mark.parametrize("beta", [0.2, 1.0])
@pytest.mark.parametrize("e", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("loss_type", ["sigmoid", "exo_pair"])
def test_smoothed_optimum(loss_type: str, beta: float, e: float) -> None:
    h = minimiser(loss_type, beta=beta, label_smoothing=e)
    assert beta * h == pytest.approx(math.log((1 - e) / e), abs=1e-4)


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_ipo_optimum(beta: float) -> None:
    assert minimiser("ipo_sum", beta=beta) == pytest.approx(1 / (2 * beta), rel=1e-6)


@pytest.mark.parametrize("e", [0.1, 0.4])
def test_robust_is_unbiased_under_flipped_labels(e: float) -> None:
    # (1-e) robust(D) + e robust(-D) = sigmoid(D)
    options = {"reference": (0.0, 0.0), "label_smoothing": e}
    right = loss_of("robust", (3.0, 1.0), **options)
    flipped = loss_of("robust", (1.0, 3.0), **options)
    clean = loss_of("sigmoid", (3.0, 1.0), reference=(0.0, 0.0))
    assert (1 - e) * right + e * flipped == pytest.approx(clean, abs=1e-12)


# ---------------------------------------------------------------- f-divergences


def test_golden_divergences() -> None:
    # c = 1, r = -1, b = 1
    def of(name: str, **options: float) -> float:
        return loss_of("sigmoid", beta=1.0, f_divergence=name, **options)

    # D = 2
    assert of("reverse_kl") == pytest.approx(-logsig(2.0))
    # D = (1 - e^-1) - (1 - e) = 2.350402
    assert of("forward_kl") == pytest.approx(-logsig(2.350402), abs=1e-6)
    # D = logsig(1) - logsig(-1) = 1, log 2 cancels
    assert of("js_divergence") == pytest.approx(-logsig(1.0))
    # a = .5: (e^-.5 - 1) / -.5 - (e^.5 - 1) / -.5 = .786939 + 1.297443 = 2.084381
    assert of("alpha_divergence", f_alpha=0.5) == pytest.approx(-logsig(2.084381), abs=1e-6)


def test_alpha_divergence_meets_its_limits() -> None:
    forward = loss_of("sigmoid", beta=1.0, f_divergence="forward_kl")
    alpha_0 = loss_of("sigmoid", beta=1.0, f_divergence="alpha_divergence", f_alpha=0.0)
    assert alpha_0 == pytest.approx(forward, rel=1e-12)
    reverse = loss_of("sigmoid", beta=1.0)
    near_1 = loss_of("sigmoid", beta=1.0, f_divergence="alpha_divergence", f_alpha=1 - 1e-7)
    assert near_1 == pytest.approx(reverse, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "f"),
    [
        ("reverse_kl", lambda u: u * math.log(u)),
        ("forward_kl", lambda u: -math.log(u)),
        ("js_divergence", lambda u: u * math.log(u) - (u + 1) * math.log((u + 1) / 2)),
    ],
)
def test_maps_are_the_derivatives_of_their_f(name: str, f: Callable[[float], float]) -> None:
    # s(x) = f'(e^x) + constant, so D = f'(e^c) - f'(e^r); derivatives by central differences
    def slope(x: float) -> float:
        u, h = math.exp(x), 1e-5
        return (f(u + h) - f(u - h)) / (2 * h)

    expected = -logsig(slope(1.0) - slope(-1.0))
    assert loss_of("sigmoid", beta=1.0, f_divergence=name) == pytest.approx(expected, abs=1e-6)


# ---------------------------------------------------------------- refusals


def test_the_table_says_what_each_loss_needs() -> None:
    def names(test: Callable[[Loss], object]) -> set[str]:
        return {name for name, loss in LOSSES.items() if test(loss)}

    assert names(lambda loss: loss.lengths) == WITH_LENGTHS
    assert names(lambda loss: not loss.reference) == WITHOUT_REFERENCE
    assert names(lambda loss: loss.smoothing) == WITH_SMOOTHING
    assert names(lambda loss: loss.divergence) == WITH_DIVERGENCE
    assert {name: LOSSES[name].options for name in names(lambda loss: loss.options)} == {
        "simpo": ("simpo_gamma",),
        "orpo": ("orpo_coef",),
    }


@pytest.mark.parametrize("loss_type", sorted(set(LOSSES) - WITH_SMOOTHING))
def test_smoothing_that_means_nothing_is_refused(loss_type: str) -> None:
    with pytest.raises(ValueError, match=f"label_smoothing=0.1 means nothing to .*{loss_type}"):
        loss_of(loss_type, label_smoothing=0.1)


@pytest.mark.parametrize("loss_type", sorted(WITH_SMOOTHING))
def test_smoothing_that_means_something_changes_the_loss(loss_type: str) -> None:
    assert loss_of(loss_type, label_smoothing=0.1) != loss_of(loss_type, label_smoothing=0.2)


@pytest.mark.parametrize("loss_type", sorted(set(LOSSES) - WITH_DIVERGENCE))
def test_divergence_that_means_nothing_is_refused(loss_type: str) -> None:
    with pytest.raises(ValueError, match=f"means nothing to .*{loss_type}"):
        loss_of(loss_type, f_divergence="js_divergence")


@pytest.mark.parametrize("loss_type", sorted(WITH_LENGTHS))
def test_missing_lengths_are_refused(loss_type: str) -> None:
    x = torch.zeros(1)
    with pytest.raises(ValueError, match="needs chosen_lengths"):
        dpo_loss(x, x, x, x, beta=0.1, loss_type=loss_type, chosen_lengths=torch.ones(1))


@pytest.mark.parametrize("loss_type", sorted(set(LOSSES) - WITHOUT_REFERENCE))
def test_missing_reference_is_refused(loss_type: str) -> None:
    x, ones = torch.zeros(1), torch.ones(1)
    smoothing = 0.1 if loss_type == "exo_pair" else 0.0
    with pytest.raises(ValueError, match="needs the reference"):
        dpo_loss(
            x,
            x,
            None,
            x,
            beta=0.1,
            loss_type=loss_type,
            label_smoothing=smoothing,
            chosen_lengths=ones,
            rejected_lengths=ones,
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "sigmod"}, "'sigmod': allowed are sigmoid, hinge, ipo"),
        ({"f_divergence": "kl"}, "'kl': allowed are reverse_kl, forward_kl"),
        ({"beta": 0}, "beta=0: must be positive"),
        ({"beta": -0.1}, "beta=-0.1"),
        ({"beta": math.nan}, "beta=nan"),
        ({"label_smoothing": 0.5}, "label_smoothing=0.5"),
        ({"label_smoothing": -0.1}, "label_smoothing=-0.1"),
        ({"loss_type": "exo_pair"}, "infinite at label_smoothing=0"),
        ({"f_divergence": "alpha_divergence", "f_alpha": 1}, "f_alpha=1"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], message: str) -> None:
    x = torch.zeros(1)
    with pytest.raises(ValueError, match=message):
        dpo_loss(x, x, x, x, **{"beta": 0.1, **options})


# ---------------------------------------------------------------- terms beside the loss


def test_sft_term_is_the_token_mean_nll() -> None:
    term = sft_term(torch.tensor([-10.0, -6.0]), torch.tensor([5, 4]))
    assert term.tolist() == [2.0, 1.5]


def test_wpo_weights() -> None:
    # exp(-.5) * exp(-.25)
    chosen = torch.tensor([-0.5], requires_grad=True)
    weights = wpo_weights(chosen, torch.tensor([-0.25]))
    assert weights.item() == pytest.approx(math.exp(-0.75))
    assert not weights.requires_grad
