from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from inspect import signature
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from align.data.tokens.packing import collate, path
from align.models import Policy, load_policy
from align.models.attention import cpu as products
from align.models.attention import flash as varlen
from align.models.attention import packed as attention
from align.models.attention.packed import DecodeState, segment_attention
from align.types import Segment, TokenBatch, TokenGroup, TokenSequence
from tools.trust import Trust

CPU = torch.device("cpu")
PACKABLE = (
    "llama",
    "qwen2",
    "qwen3",
    "gpt2",
    "gpt_neox",
    "opt",
    "phi3",
    "mistral",
    "gemma2",
    "gemma3",
    "granite",
    "cohere",
    "seed_oss",
    "starcoder2",
    "gpt_bigcode",
    "biogpt",
    "mixtral",
    "phimoe",
    "qwen2_moe",
    "deepseek_v3",
)


def tokens(rng: np.random.Generator, length: int) -> np.ndarray:
    return rng.integers(5, 80, size=length).astype(np.int32)


def sequence(ids: np.ndarray) -> TokenSequence:
    return TokenSequence(ids, np.ones(len(ids), dtype=bool))


@pytest.fixture(scope="module", params=[0, 9], ids=["", "one_opening"])
def groups(request: pytest.FixtureRequest) -> list[TokenGroup]:
    """A preference pair, a packed SFT row, and a prompt with three responses; windows are 5.

    With ``one_opening`` they all begin with the same nine tokens, of which nothing is learnt.
    """
    rng = np.random.default_rng(0)
    opening = tokens(rng, request.param)
    lone = np.concatenate([opening, tokens(rng, 11)])
    return [
        TokenGroup(
            np.concatenate([opening, tokens(rng, 9)]),
            (sequence(tokens(rng, 7)), sequence(tokens(rng, 1))),
        ),
        TokenGroup(
            np.zeros(0, np.int32), (TokenSequence(lone, np.arange(len(lone)) >= len(opening)),)
        ),
        TokenGroup(
            np.concatenate([opening, tokens(rng, 3)]),
            tuple(sequence(tokens(rng, n)) for n in (4, 12, 6)),
        ),
    ]


def whole(group: TokenGroup, number: int) -> tuple[Tensor, Tensor]:
    """Token ids ``[1,n]`` of one sequence alone, and which tokens count and can be predicted."""
    continuation = group.continuations[number]
    ids = np.concatenate([group.prefix_ids, continuation.input_ids])
    counts = np.concatenate([np.zeros(len(group.prefix_ids), bool), continuation.loss_mask])
    counts[0] = False
    return torch.from_numpy(ids).long()[None], torch.from_numpy(counts)


@pytest.fixture(scope="module", params=PACKABLE)
def model(
    request: pytest.FixtureRequest, architecture: Callable[[str], Path]
) -> tuple[Policy, torch.nn.Module]:
    """(packed by us, the same weights by transformers' own eager attention)."""
    folder = str(architecture(request.param))
    eager = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    return load_policy(folder, device=CPU, precision="fp32").train(), eager


def test_packed_and_prefix_shared_is_the_sequences_alone(
    model: tuple[Policy, torch.nn.Module], groups: list[TokenGroup], trust: Trust
) -> None:
    """Hidden states, log-probs and gradients; in training mode, so dropout has to be off."""
    policy, eager = model
    policy.zero_grad()
    eager.zero_grad()
    batch = collate(groups)
    hidden = policy.hidden_states(batch)[0]
    got = policy(batch).logprobs
    backbone = getattr(eager, eager.base_model_prefix)
    want: list[Tensor] = []
    segments = iter(batch.sequences)
    for group in groups:
        for number in range(len(group.continuations)):
            (ids, counts), columns = whole(group, number), path(batch, next(segments))
            alone = backbone(input_ids=ids).last_hidden_state[0]
            torch.testing.assert_close(hidden[columns], alone, rtol=1e-5, atol=1e-5)
            logprobs = eager(ids).logits[0].float().log_softmax(-1)
            found = logprobs[:-1].gather(-1, ids[0, 1:, None])[:, 0]
            want.append(found[counts[1:]])
    wanted = torch.cat(want)
    apart = (got - wanted).abs().max().item()
    what = f"{Path(policy.name).name}: packed behind a shared prompt = alone, log-probs, nats"
    trust.at_most("equivalences", what, apart, 1e-5)

    weights = torch.linspace(-1, 1, len(got))
    (got * weights).sum().backward()
    (wanted * weights).sum().backward()
    theirs = dict(eager.named_parameters())
    compared = 0
    for name, parameter in policy.model.named_parameters():
        if parameter.grad is None:
            assert theirs[name].grad is None or not theirs[name].grad.any(), name
            continue
        scale = theirs[name].grad.abs().max().clamp(min=1.0)
        torch.testing.assert_close(
            parameter.grad / scale, theirs[name].grad / scale, rtol=0, atol=1e-5
        )
        compared += 1
    assert compared >= 15


def test_editing_a_neighbour_changes_the_others_by_exactly_0(
    model: tuple[Policy, torch.nn.Module], groups: list[TokenGroup]
) -> None:
    policy, _ = model
    batch = collate(groups)
    with torch.no_grad():
        before = policy.hidden_states(batch)[0]
    for number, edited in enumerate(batch.segments):
        input_ids = batch.input_ids.clone()
        input_ids[0, edited.start : edited.stop] = 84
        with torch.no_grad():
            after = policy.hidden_states(replace(batch, input_ids=input_ids))[0]
        for other, segment in enumerate(batch.segments):
            columns = slice(segment.start, segment.stop)
            continues = segment.prefix_stop > 0 and segment.prefix_start == edited.start
            if other == number or continues:
                assert not torch.equal(after[columns], before[columns])
            elif edited.start not in path(batch, segment):  # a window may hide what is further up
                assert torch.equal(after[columns], before[columns])


# ---------------------------------------------------------------- the function itself


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    batch: TokenBatch,
    *,
    window: int | None,
    softcap: float | None,
    scale: float,
) -> Tensor:
    """Masked softmax over whole rows, in float64, from the batch's *tensors*, not its segments."""
    repeats = query.shape[1] // key.shape[1]
    query, key, value = (t.double() for t in (query, key, value))
    key, value = (t.repeat_interleave(repeats, dim=1) for t in (key, value))
    scores = query @ key.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    above = {0: set[int]()}  # segment -> itself and all that it continues
    numbers = {(s.row, s.start, s.stop): n for n, s in enumerate(batch.segments, start=1)}
    for number, s in enumerate(batch.segments, start=1):
        continued = numbers[s.row, s.prefix_start, s.prefix_stop] if s.prefix_stop else 0
        above[number] = {number} | above[continued]
    allowed = torch.tensor(
        [[[j in above[i] for j in row] for i in row] for row in batch.segment_ids.tolist()]
    )
    position = batch.position_ids
    distance = position[:, :, None] - position[:, None, :]
    allowed &= distance >= 0
    if window is not None:
        allowed &= distance < window
    allowed |= ~allowed.any(-1, keepdim=True)  # padding, whose output is thrown away
    weights = scores.masked_fill(~allowed[:, None], float("-inf")).softmax(-1)
    out = (weights @ value).transpose(1, 2)
    return torch.where(batch.segment_ids[:, :, None, None] > 0, out, 0.0)


def two_rows(groups: list[TokenGroup]) -> TokenBatch:
    """Rows of different length, the shorter one padded."""
    first, second = collate(groups[:2]), collate(groups[2:])
    count, missing = len(first.segments), first.input_ids.shape[1] - second.input_ids.shape[1]
    assert missing > 0

    def stacked(name: str) -> Tensor:
        a, b = getattr(first, name), getattr(second, name)
        if name == "segment_ids":
            b = torch.where(b > 0, b + count, 0)
        return torch.cat([a, torch.nn.functional.pad(b, (0, missing))])

    names = ("input_ids", "position_ids", "segment_ids", "predictor", "loss_mask")
    moved = tuple(replace(s, row=1) for s in second.segments)
    return TokenBatch(*(stacked(n) for n in names), segments=first.segments + moved)


def one_after_another(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """What torch says of its variable-length kernel, which runs on GPUs only: a loop over segments.

    Causal, and aligned to the last key; ``window_size[0]`` keys before it, -1 = all.
    """
    assert query.shape[1] == key.shape[1] or enable_gqa
    outputs = []
    for (a, b), (c, d) in zip(
        pairwise(cu_seq_q.tolist()), pairwise(cu_seq_k.tolist()), strict=True
    ):
        assert b - a <= max_q
        assert d - c <= max_k
        behind = torch.arange(b - a)[:, None] + (d - c) - (b - a) - torch.arange(d - c)
        seen = behind >= window_size[1]
        if window_size[0] >= 0:
            seen &= behind <= window_size[0]
        q, k, v = (t.transpose(0, 1) for t in (query[a:b], key[c:d], value[c:d]))
        k, v = (t.repeat_interleave(len(q) // len(t), dim=0) for t in (k, v))
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(~seen, float("-inf"))
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


def test_the_stand_in_of_the_kernel_is_called_as_the_kernel_is() -> None:
    wanted = signature(one_after_another).parameters
    theirs = signature(varlen.kernel()).parameters
    assert [(p.name, p.kind) for p in wanted.values()] == [
        (p.name, p.kind) for p in theirs.values() if p.name in wanted
    ]


WAYS = [
    (way, 1.5 if way == "capped" else None, *padded)
    for way in ("products", "blocks", "blocks made again", "fused", "capped")
    for padded in ((256, 32), (0, 32), (16, 4))
] + [(way, cap, 256, 32) for way, cap in (("flash", None), ("flex", None), ("flex", 1.5))]
"""(which way, soft cap, keys of a padded call, tokens by which its lengths differ)"""


@pytest.fixture(scope="module")
def many_graphs() -> Iterator[None]:
    """Flex's plain form compiles too: a graph for each number of heads, shared by what varies."""
    import torch._dynamo

    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=64):
        yield


@pytest.mark.usefixtures("many_graphs")
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize(("way", "softcap", "short", "step"), WAYS)
def test_segment_attention_is_masked_softmax(
    groups: list[TokenGroup],
    monkeypatch: pytest.MonkeyPatch,
    kv_heads: int,
    window: int | None,
    softcap: float | None,
    short: int,
    step: int,
    way: str,
) -> None:
    """Whether segments share one padded call, have one each, or some this and some that.

    Whether a call is of matrix products or of the fused kernel; values and gradients.
    """
    backend = way if way in attention.BACKENDS else "segments"
    monkeypatch.setattr(varlen, "kernel", lambda: one_after_another)
    # torch refuses gradients on a CPU, though its plain form has them
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    monkeypatch.setattr(products, "pays", lambda *_: way != "fused")
    if way.startswith("blocks"):
        monkeypatch.setattr(products, "BLOCK", 4)
    if way == "blocks made again":
        monkeypatch.setattr(products, "KEPT", 0)
    monkeypatch.setattr(attention, "SHORT", short)
    monkeypatch.setattr(attention, "STEP", step)
    attention._plan.cache_clear()
    batch = two_rows(groups)
    time = batch.input_ids.shape[1]
    torch.manual_seed(0)
    query = torch.randn(2, 4, time, 8, requires_grad=True)
    key, value = (torch.randn(2, kv_heads, time, 8, requires_grad=True) for _ in range(2))
    out, weights = segment_attention(
        torch.nn.Module(),
        query,
        key,
        value,
        None,
        scaling=0.3,
        sliding_window=window,
        softcap=softcap,
        segments=batch.segments,
        backend=backend,
    )
    want = dense(query, key, value, batch, window=window, softcap=softcap, scale=0.3)
    assert weights is None
    torch.testing.assert_close(out.double(), want, rtol=0, atol=1e-6)
    upstream = torch.randn(out.shape)
    grads = torch.autograd.grad(out, (query, key, value), upstream)
    wanted = torch.autograd.grad(want, (query, key, value), upstream.double())
    for got, expected in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=5e-6)
    assert not out[batch.segment_ids == 0].any()
    attention._plan.cache_clear()


@pytest.mark.parametrize(
    ("size", "offset", "bound"), [(1.0, 0.0, 2.0), (1.0, 50.0, 2.0), (3.0, 0.0, 9.0)]
)
def test_bf16_products_are_nearly_as_close_to_the_truth_as_the_fused_kernel(
    size: float, offset: float, bound: float
) -> None:
    """Errors against float64 of long segments and of short ones in one call, against the kernel's.

    Scores are rounded to bf16, which large ones feel (``size``), and a bias that all keys have in
    common must not (``offset``).
    """
    torch.manual_seed(0)
    ends = (0, 600, 690, 730, 800, 840)
    segments = tuple(Segment(0, a, b) for a, b in pairwise(ends))
    drawn = torch.randn(3, 1, 4, ends[-1], 80)
    drawn[:2] *= size
    drawn[1] += offset * torch.randn(80).sign() / 80**0.5
    truth = [t.requires_grad_() for t in drawn.bfloat16().double()]
    upstream = torch.randn(1, ends[-1], 4, 80).bfloat16()

    def errors(pays: bool) -> list[float]:
        mine = [t.detach().bfloat16().requires_grad_() for t in truth]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(products, "pays", lambda *_: pays)
            out, _ = segment_attention(torch.nn.Module(), *mine, None, segments=segments)
        found = [out, *torch.autograd.grad(out, mine, upstream)]
        return [(a.double() - b).norm().item() for a, b in zip(found, wanted, strict=True)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "pays", lambda *_: False)
        exact, _ = segment_attention(torch.nn.Module(), *truth, None, segments=segments)
    wanted = [exact, *torch.autograd.grad(exact, truth, upstream.double())]
    for ours, fused in zip(errors(True), errors(False), strict=True):
        assert ours < bound * fused


def test_a_window_of_a_long_row_has_no_mask_in_the_plan() -> None:
    plan = attention._plan((Segment(0, 0, 300),), 1, 300, 7, CPU)
    assert [bucket.mask for bucket in plan.buckets] == [None]


@pytest.mark.parametrize("window", [None, 3])
def test_decoding_looks_at_each_rows_own_columns(window: int | None) -> None:
    torch.manual_seed(0)
    query = torch.randn(3, 4, 1, 8)
    key, value = torch.randn(2, 3, 2, 6, 8)
    starts = torch.tensor([0, 2, 5])
    mask = torch.arange(6)[None] >= starts[:, None]
    out, _ = segment_attention(
        torch.nn.Module(), query, key, value, None, sliding_window=window, decode=DecodeState(mask)
    )
    for row, start in enumerate(starts.tolist()):
        first = start if window is None else max(start, 6 - window)
        keys, values = (t[row, :, first:].repeat_interleave(2, dim=0) for t in (key, value))
        weights = (query[row] @ keys.transpose(-1, -2) * 8**-0.5).softmax(-1)
        torch.testing.assert_close(out[row, 0], (weights @ values)[:, 0], rtol=0, atol=1e-6)


def test_refuses_to_run_without_segments_or_with_what_it_would_ignore() -> None:
    qkv = torch.randn(3, 1, 2, 4, 8)
    segments = (Segment(0, 0, 4),)
    with pytest.raises(RuntimeError, match="without segments"):
        segment_attention(torch.nn.Module(), *qkv, None)
    for name in ("position_bias", "s_aux"):
        with pytest.raises(NotImplementedError, match="which align does not compute"):
            segment_attention(
                torch.nn.Module(), *qkv, None, segments=segments, **{name: torch.zeros(2)}
            )
