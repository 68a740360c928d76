from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from align.config.sections import GenerationOptions, LoraOptions
from align.data.tokens.packing import pack
from align.models import Policy, load_policy
from align.models.attention.packed import DecodeState
from align.rollout import sampler
from align.rollout.cache import SlotCache
from align.rollout.experience import over_rollout, rollout_groups
from align.rollout.sampler import draw_tokens, sample
from align.types import AlignError, Rollout

CPU = torch.device("cpu")
ENDS = (7, 8, 9)


@pytest.fixture(scope="module")
def policy(tiny: Path) -> Policy:
    return load_policy(str(tiny), device=CPU, precision="fp32")


@pytest.fixture(scope="module")
def prompts() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(10, 80, size=n).astype(np.int32) for n in (3, 9, 5, 14, 1, 6, 9)]


def options(**changes: float) -> GenerationOptions:
    defaults = {"max_new_tokens": 20, "temperature": 0.8, "samples_per_prompt": 3, "slots": 4}
    return GenerationOptions(**{**defaults, **changes})  # type: ignore[arg-type]


def answers(rollout: Rollout) -> list[list[int]]:
    rows = zip(rollout.input_ids, rollout.response_mask, strict=True)
    return [ids[mask].tolist() for ids, mask in rows]


def assert_complete(rollout: Rollout, max_new_tokens: int) -> None:
    """Every response ends at its first end token, or at the limit; nothing lies behind it."""
    for ids, finished in zip(answers(rollout), rollout.finished.tolist(), strict=True):
        ends = [i for i, token in enumerate(ids) if token in ENDS]
        assert finished == bool(ends)
        assert ends == [len(ids) - 1] if finished else len(ids) == max_new_tokens
    assert not rollout.logprobs[~rollout.response_mask].any()
    assert (rollout.logprobs[rollout.response_mask] < 0).all()


# ---------------------------------------------------------------- whole rollouts


SAMPLED = (
    "llama",
    "gpt2",
    "opt",
    "mistral",
    "gemma2",
    "gemma3",
    "qwen2_moe",
    "cohere",
    "deepseek_v3",
)


@pytest.mark.parametrize("name", SAMPLED)
def test_recorded_logprobs_are_the_training_ones(
    name: str, architecture: Callable[[str], Path], prompts: list[np.ndarray]
) -> None:
    """PPO's ratio is 1: cache, refills and windows against one packed forward."""
    policy = load_policy(str(architecture(name)), device=CPU, precision="fp32")
    rollout = sample(policy, prompts, options(), end_ids=ENDS, seed=0)
    assert_complete(rollout, 20)
    assert 0 < rollout.finished.float().mean() < 1
    again = over_rollout(
        rollout_groups(rollout, 3),
        lambda batch: policy(batch, temperature=0.8).logprobs,
        like=rollout.logprobs,
        tokens_per_microbatch=100,
    )
    torch.testing.assert_close(again, rollout.logprobs, rtol=0, atol=1e-5)


def test_k_samples_share_their_prompt(policy: Policy, prompts: list[np.ndarray]) -> None:
    rollout = sample(policy, prompts, options(), end_ids=ENDS, seed=0)
    assert len(rollout.prompt_ids) == len(prompts) * 3
    for row, prompt in enumerate(rollout.prompt_ids):
        assert prompt is prompts[row // 3]
    groups = rollout_groups(rollout, 3)
    assert [len(g.continuations) for g in groups] == [3] * len(prompts)
    assert groups[2].continuations[1].input_ids.tolist() == answers(rollout)[2 * 3 + 1]
    # the prompt's 3 + 9 + 5 + 14 + 1 + 6 + 9 = 47 tokens are packed once
    responses = int(rollout.response_mask.sum())
    packed = pack(groups, tokens_per_microbatch=10_000)
    assert [b.num_tokens for b in packed] == [47 + responses]
    # and the samples of one prompt are not all the same
    assert len({tuple(a) for a in answers(rollout)[:3]}) > 1


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(("slots", "prefill"), [(1, 4096), (5, 10), (100, 1)])
def test_slots_and_prefills_change_no_result(
    policy: Policy, prompts: list[np.ndarray], temperature: float, slots: int, prefill: int
) -> None:
    want = sample(policy, prompts, options(temperature=temperature), end_ids=ENDS, seed=0)
    got = sample(
        policy,
        prompts,
        options(temperature=temperature, slots=slots),
        end_ids=ENDS,
        seed=0,
        prefill_tokens=prefill,
    )
    assert_complete(got, 20)
    assert answers(got) == answers(want)
    torch.testing.assert_close(got.logprobs, want.logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("opening", [0, 11])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma3", "qwen2_moe", "deepseek_v3"])
def test_greedy_is_transformers_generate(
    name: str, architecture: Callable[[str], Path], prompts: list[np.ndarray], opening: int
) -> None:
    """Also where all prompts open alike and the prefill computes that once."""
    system = np.arange(20, 20 + opening, dtype=np.int32)
    prompts = [np.concatenate([system, prompt]) for prompt in prompts]
    folder = str(architecture(name))
    policy = load_policy(folder, device=CPU, precision="fp32")
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    greedy = options(temperature=0, samples_per_prompt=1)
    got = answers(sample(policy, prompts, greedy, end_ids=ENDS, seed=0))
    for prompt, answer in zip(prompts, got, strict=True):
        ids = torch.from_numpy(prompt).long()[None]
        want = plain.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=20,
            eos_token_id=list(ENDS),
            pad_token_id=0,
        )
        assert answer == want[0, len(prompt) :].tolist()


def test_the_seed_decides(policy: Policy, prompts: list[np.ndarray]) -> None:
    torch.manual_seed(1)
    first = sample(policy, prompts, options(), end_ids=ENDS, seed=5)
    torch.manual_seed(2)
    again = sample(policy, prompts, options(), end_ids=ENDS, seed=5)
    other = sample(policy, prompts, options(), end_ids=ENDS, seed=6)
    assert torch.equal(first.input_ids, again.input_ids)
    assert torch.equal(first.logprobs, again.logprobs)
    assert answers(first) != answers(other)


def test_a_share_of_the_prompts_gets_the_same_samples(
    policy: Policy, prompts: list[np.ndarray]
) -> None:
    """As one of two processes sees it: the odd prompts, under their own numbers."""
    whole = answers(sample(policy, prompts, options(), end_ids=ENDS, seed=5))
    share = sample(policy, prompts[1::2], options(), end_ids=ENDS, seed=5, numbers=[1, 3, 5])
    assert answers(share) == [whole[3 * i + j] for i in (1, 3, 5) for j in range(3)]


def test_mode_and_random_state_are_left_alone(policy: Policy, prompts: list[np.ndarray]) -> None:
    policy.train()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    counted: list[int] = []
    rollout = sample(policy, prompts, options(), end_ids=ENDS, seed=0, on_tokens=counted.append)
    assert torch.equal(torch.get_rng_state(), before)
    assert policy.training
    assert not rollout.logprobs.requires_grad
    assert sum(counted) == int(rollout.response_mask.sum())
    policy.eval()


def test_a_long_run_forgets_its_past(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, prompts: list[np.ndarray]
) -> None:
    """Memory is that of the sequences in the slots, however many went before them."""
    columns: list[int] = []
    original = SlotCache.next_step

    def spying(self: SlotCache) -> object:
        columns.append(self.length)
        return original(self)

    monkeypatch.setattr(SlotCache, "next_step", spying)
    sample(policy, prompts * 12, options(samples_per_prompt=1), end_ids=ENDS, seed=0)
    assert len(columns) > 200  # steps
    # the longest prompt, a response, and what is only dropped every so often
    assert max(columns) <= 14 + 20 + SlotCache.GROW


def test_more_tokens_than_positions_are_refused(policy: Policy) -> None:
    with pytest.raises(AlignError, match=r"256 positions, but .* 258 tokens"):
        sample(policy, [np.full(250, 9, np.int32)], options(max_new_tokens=8), end_ids=ENDS, seed=0)


# ---------------------------------------------------------------- one draw

# log-probabilities of .5, .3, .15, .05
LOGITS = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log() + 3.0


def drawn(count: int, **changes: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    uniforms = torch.rand(count, generator=generator, dtype=torch.float64)
    return draw_tokens(LOGITS.expand(count, 4), options(**changes), uniforms)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    # the mass before token 2 is .8: below .81, not below .79; the first token always stays
    [(1.0, {0, 1, 2, 3}), (0.81, {0, 1, 2}), (0.79, {0, 1}), (0.49, {0}), (0.01, {0})],
)
def test_top_p_keeps_the_right_tokens(top_p: float, kept: set[int]) -> None:
    tokens, logprobs = drawn(2000, temperature=1.0, top_p=top_p)
    assert set(tokens.tolist()) == kept
    # the log-probabilities are those of the whole distribution
    want = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[tokens]
    torch.testing.assert_close(logprobs, want, rtol=0, atol=1e-5)


def test_greedy_takes_the_most_probable() -> None:
    tokens, logprobs = drawn(5, temperature=0.0)
    assert tokens.tolist() == [0] * 5
    assert logprobs.tolist() == pytest.approx([-0.693147] * 5, abs=1e-5)


def test_temperature_sharpens() -> None:
    # at temperature 1/2 probabilities are squared: .25, .09, .0225, .0025, which sum to .365
    tokens, logprobs = drawn(4, temperature=0.5)
    want = torch.tensor([0.25, 0.09, 0.0225, 0.0025]).div(0.365).log()[tokens]
    torch.testing.assert_close(logprobs, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("size", "top_p"), [(4, 1.0), (sampler.BLOCK * 3 + 17, 1.0), (40, 0.6)])
def test_frequencies_are_the_probabilities(size: int, top_p: float) -> None:
    """Chi-square of 20,000 draws from logits that span the blocks of the vocabulary."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(1, size, generator=generator) * 1.5
    probs = logits.softmax(-1)[0].double()
    if top_p < 1:
        ordered, order = probs.sort(descending=True)
        probs[order[ordered.cumsum(0) - ordered >= top_p]] = 0
        probs /= probs.sum()
    count = 20_000
    uniforms = torch.rand(count, generator=generator, dtype=torch.float64)
    tokens, _ = draw_tokens(
        logits.expand(count, size), options(temperature=1.0, top_p=top_p), uniforms
    )
    seen = torch.bincount(tokens, minlength=size).double()
    assert len(seen) == size
    assert not seen[probs == 0].any()
    # rare tokens are pooled, so that every cell expects at least 10
    rare = probs * count < 10
    expected = torch.cat([probs[~rare], probs[rare].sum()[None]]) * count
    observed = torch.cat([seen[~rare], seen[rare].sum()[None]])
    expected, observed = expected[expected > 0], observed[expected > 0]
    chi2 = ((observed - expected) ** 2 / expected).sum().item()
    degrees = len(expected) - 1
    assert degrees >= 3
    # mean n, variance 2n: five standard deviations
    assert abs(chi2 - degrees) < 5 * (2 * degrees) ** 0.5


class CopiesOf(TorchDispatchMode):
    """Count casts and moves of tensors of one shape."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and args[0].shape == self.shape:
            self.count += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("lora", [None, LoraOptions(r=4, alpha=8.0)], ids=["whole", "adapter"])
def test_in_bf16_weights_are_cast_once_and_log_probs_are_those_of_training(
    tiny: Path,
    prompts: list[np.ndarray],
    lora: LoraOptions | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In however many steps; keys and values are cached in the products' dtype."""
    policy = load_policy(str(tiny), device=CPU, precision="bf16", lora=lora)
    flags = [p.requires_grad for p in policy.parameters()]
    dtypes: set[torch.dtype] = set()
    step = SlotCache.next_step

    def watched(cache: SlotCache) -> DecodeState:
        dtypes.update(t.dtype for layer in cache.layers for t in (layer.keys, layer.values))
        return step(cache)

    monkeypatch.setattr(SlotCache, "next_step", watched)
    head = policy.head_weight().shape
    with CopiesOf(head) as copies:
        rollout = sample(policy, prompts, options(temperature=1.0), end_ids=ENDS, seed=0)
    assert dtypes == {torch.bfloat16}
    assert [p.requires_grad for p in policy.parameters()] == flags
    assert copies.count == 1
    with torch.no_grad():
        again = over_rollout(
            rollout_groups(rollout, 3),
            lambda batch: policy(batch).logprobs,
            like=rollout.logprobs,
            tokens_per_microbatch=4096,
        )
    recorded = rollout.logprobs
    torch.testing.assert_close(recorded, again, rtol=0, atol=0.05)
