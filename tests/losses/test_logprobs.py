from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from align.losses import logprobs as module
from align.losses import token_logprobs
from align.losses.logprobs import token_statistics

N, H, V = 37, 8, 50


@pytest.fixture
def problem() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).requires_grad_()

    return {
        "hidden": normal(N, H),
        "weight": normal(V, H),
        "bias": normal(V, scale=2.0),
        "targets": torch.randint(V, (N,), generator=generator),
        "mix": torch.randn(N, generator=generator),
        "mix_entropy": torch.randn(N, generator=generator),
    }


def dense(p: dict[str, Tensor], *, temperature: float, softcap: float | None, bias: bool) -> Tensor:
    """``[N,V]`` log-probabilities by torch's own log_softmax, in float64."""
    logits = p["hidden"].double() @ p["weight"].double().T
    if bias:
        logits = logits + p["bias"].double()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return (logits / temperature).log_softmax(-1)


def of_targets(logprobs: Tensor, p: dict[str, Tensor]) -> Tensor:
    return logprobs.gather(-1, p["targets"][:, None])[:, 0]


def gradients(loss: Tensor, p: dict[str, Tensor]) -> list[Tensor]:
    inputs = [p["hidden"], p["weight"], p["bias"]]
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def options(p: dict[str, Tensor], temperature: float, softcap: float | None, bias: bool) -> dict:
    chosen = {"temperature": temperature, "softcap": softcap}
    return chosen | ({"bias": p["bias"]} if bias else {})


CASES = [
    (1.0, None, False),
    (0.7, None, False),
    (1.0, None, True),
    (1.0, 2.0, False),
    (0.5, 3.0, True),
]


@pytest.fixture(
    params=[(2**24, 2**21), (2**24, 3 * V), (5 * V, 2 * V), (1, 1)],
    ids=["one chunk", "one chunk in pieces", "chunks of 5 in pieces of 2", "a row at a time"],
)
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    chunk, piece = request.param
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(module, "PIECE_ELEMENTS", piece)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize(("temperature", "softcap", "bias"), CASES)
def test_logprobs_are_dense_log_softmax(
    problem: dict[str, Tensor], temperature: float, softcap: float | None, bias: bool
) -> None:
    want = of_targets(dense(problem, temperature=temperature, softcap=softcap, bias=bias), problem)
    got = token_logprobs(
        problem["hidden"],
        problem["weight"],
        problem["targets"],
        **options(problem, temperature, softcap, bias),
    )
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)
    mix = problem["mix"]
    for a, b in zip(
        gradients((got * mix).sum(), problem), gradients((want * mix).sum(), problem), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize(("temperature", "softcap", "bias"), CASES)
def test_statistics_are_those_of_the_dense_distribution(
    problem: dict[str, Tensor], temperature: float, softcap: float | None, bias: bool
) -> None:
    whole = dense(problem, temperature=temperature, softcap=softcap, bias=bias)
    want_entropy = -(whole.exp() * whole).sum(-1)
    got = token_statistics(
        problem["hidden"],
        problem["weight"],
        problem["targets"],
        **options(problem, temperature, softcap, bias),
    )
    assert {x.dtype for x in got} == {torch.float32}
    want = of_targets(whole, problem)
    torch.testing.assert_close(got.logprobs.double(), want, rtol=0, atol=1e-5)
    torch.testing.assert_close(got.entropy.double(), want_entropy, rtol=0, atol=1e-5)
    collision = (2 * whole).logsumexp(-1)
    torch.testing.assert_close(got.log_collision.double(), collision, rtol=0, atol=1e-5)
    assert not got.log_collision.requires_grad

    # both outputs at once, each with weights of its own
    def loss(logprobs: Tensor, entropy: Tensor) -> Tensor:
        return (logprobs * problem["mix"]).sum() + (entropy * problem["mix_entropy"]).sum()

    for a, b in zip(
        gradients(loss(got.logprobs, got.entropy), problem),
        gradients(loss(want, want_entropy), problem),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=5e-5)


def test_literal_numbers() -> None:
    # logits (1, 3): p = 1 / (1 + e^2) = .119203 and .880797, log p = -2.126928 and -.126928;
    # at temperature 2 they are (.5, 1.5): log p = -log(1 + e) = -1.313262 and -.313262
    hidden, weight = torch.tensor([[1.0], [1.0]]), torch.tensor([[1.0], [3.0]])
    targets = torch.tensor([0, 1])
    cold = token_logprobs(hidden, weight, targets)
    assert cold.tolist() == pytest.approx([-2.126928, -0.126928], abs=1e-6)
    warm = token_logprobs(hidden, weight, targets, temperature=2.0)
    assert warm.tolist() == pytest.approx([-1.313262, -0.313262], abs=1e-6)
    found = token_statistics(hidden, weight, targets)
    # H = .119203 * 2.126928 + .880797 * .126928 = .365334;  log(.119203^2 + .880797^2) = -.235706
    assert found.entropy.tolist() == pytest.approx([0.365334] * 2, abs=1e-6)
    assert found.log_collision.tolist() == pytest.approx([-0.235706] * 2, abs=1e-6)


def test_the_graph_is_not_needed_for_frozen_weights(problem: dict[str, Tensor]) -> None:
    frozen = problem["weight"].detach()
    token_logprobs(problem["hidden"], frozen, problem["targets"]).sum().backward()
    assert frozen.grad is None
    assert problem["hidden"].grad is not None


def test_bf16_comes_back_in_float32(problem: dict[str, Tensor]) -> None:
    hidden, weight = (problem[k].detach().bfloat16().requires_grad_() for k in ("hidden", "weight"))
    got = token_logprobs(hidden, weight, problem["targets"])
    assert got.dtype == torch.float32
    # the log-softmax itself is float32: only the products round
    want = (hidden @ weight.T).float().log_softmax(-1).gather(-1, problem["targets"][:, None])[:, 0]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    got.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16


def test_autocast_computes_in_its_dtype_and_gives_gradients_in_the_parameters(
    problem: dict[str, Tensor],
) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = token_logprobs(problem["hidden"], problem["weight"], problem["targets"])
    plain = token_logprobs(problem["hidden"], problem["weight"], problem["targets"])
    assert got.dtype == torch.float32
    assert 1e-5 < (got - plain).abs().max() < 0.2  # bf16 has three digits
    got.sum().backward()
    assert problem["weight"].grad.dtype == torch.float32


@pytest.mark.usefixtures("chunked")
def test_memory_is_a_chunk_and_not_n_by_v(
    problem: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    original: Callable[..., Tensor] = module.F.linear

    def counting(hidden: Tensor, weight: Tensor) -> Tensor:
        rows.append(len(hidden))
        return original(hidden, weight)

    pieces: list[int] = []
    finished: Callable[..., Tensor] = module._finished

    def counting_pieces(raw: Tensor, *more: object) -> Tensor:
        pieces.append(len(raw))
        return finished(raw, *more)

    monkeypatch.setattr(module.F, "linear", counting)
    monkeypatch.setattr(module, "_finished", counting_pieces)
    token_logprobs(problem["hidden"], problem["weight"], problem["targets"]).sum().backward()
    assert max(rows) * V <= max(module.CHUNK_ELEMENTS, V)
    assert max(pieces) * V <= max(module.PIECE_ELEMENTS, V)
    assert sum(pieces) == 2 * N
    # once forward and once backward, but the logits of an only chunk are kept
    assert sum(rows) == (N if len(rows) == 1 else 2 * N)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_temperature_must_be_positive(problem: dict[str, Tensor], temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be > 0"):
        token_logprobs(
            problem["hidden"], problem["weight"], problem["targets"], temperature=temperature
        )


def test_no_rows() -> None:
    empty = token_logprobs(torch.zeros(0, 4), torch.zeros(3, 4), torch.zeros(0, dtype=torch.int64))
    assert empty.shape == (0,)


def test_a_second_backward_through_one_graph_gives_the_same(problem: dict[str, Tensor]) -> None:
    """The gradients of a single chunk's logits are written where the logits were."""
    inputs = problem["hidden"], problem["weight"]
    loss = token_logprobs(*inputs, problem["targets"]).square().sum()
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(loss, inputs), strict=True):
        assert torch.equal(one, other)
