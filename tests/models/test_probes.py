"""What a model is tried on when it is loaded, and which are refused, each with its reason."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from align.config.sections import LoraOptions
from align.data.tokens.packing import collate
from align.models import Policy, load_policy, load_scalar_model, scalar_model_on
from align.models.attention.masks import window_of
from align.models.attention.packed import WINDOW
from align.models.dropout import PINNED, switch_off_dropout
from align.models.policy import check_length
from align.models.sizes import count_parameters
from align.types import AlignError, TokenGroup, TokenSequence
from tests.conftest import ARCHITECTURES

CPU = torch.device("cpu")
Make = Callable[[str], Path]

REFUSED = {
    "falcon": "FalconForCausalLM is not on transformers' attention interface",
    "gptj": "GPTJForCausalLM is not on transformers' attention interface",
    "gpt_neo": "GPTNeoForCausalLM is not on transformers' attention interface",
    "bloom": "BloomForCausalLM is not on transformers' attention interface",
    "llama4": "mask is neither causal nor a sliding window, but has chunks or blocks of 5",
    "bert": "attention mask is neither causal nor a sliding window",
    "mamba": "MambaForCausalLM has no attention layer among its 2; the others carry a state",
    "jamba": "JambaForCausalLM has no attention layer among its 2; the others carry a state",
    "bart": "counts positions along the row and takes no position_ids",
    "stablelm": "it passes no further arguments to its attention layers",
    "doge": "its attention layers make masks or biases of their own",
    "gpt_oss": "it has attention sinks",
}


def policy_of(folder: Path, **more: Any) -> Policy:
    return load_policy(str(folder), device=CPU, precision="fp32", **more)


def batch() -> Any:
    rng = np.random.default_rng(0)

    def sequence(length: int) -> TokenSequence:
        return TokenSequence(rng.integers(5, 60, length).astype(np.int32), np.ones(length, bool))

    prefix = rng.integers(5, 60, 7).astype(np.int32)
    return collate([TokenGroup(prefix, (sequence(9), sequence(4)))])


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_packed_is_refused_with_its_reason(name: str, architecture: Make) -> None:
    with pytest.raises(AlignError, match=REFUSED[name]) as caught:
        policy_of(architecture(name))
    assert "\n" not in str(caught.value)
    assert "align_" not in str(caught.value)
    assert "ecoder such as Llama" in str(caught.value)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_align_check_refuses_what_the_run_would(name: str, architecture: Make) -> None:
    """Without weights; but for what values decide."""
    config = AutoConfig.from_pretrained(architecture(name))
    if name in REFUSED and name != "bart":
        with pytest.raises(AlignError, match=r"decoder such as Llama") as caught:
            count_parameters("model", config)
        assert "\n" not in str(caught.value)
    else:
        assert count_parameters("model", config).total > 0


def test_no_one_label_model_is_one_line(architecture: Make) -> None:
    line = r"transformers has no one-label model \(for a reward or a critic\).*\(CohereConfig\)"
    with pytest.raises(AlignError, match=line):
        count_parameters("reward", AutoConfig.from_pretrained(architecture("cohere")))
    with pytest.raises(AlignError, match=line):
        load_scalar_model(str(architecture("cohere")), device=CPU, precision="fp32")


def test_from_scratch_is_refused_alike(architecture: Make) -> None:
    with pytest.raises(AlignError, match=REFUSED["gptj"]):
        policy_of(architecture("gptj"), from_scratch=True)


# ---------------------------------------------------------------- training mode


def pinned(model: nn.Module) -> set[str]:
    return {type(m).__name__ for m in model.modules() if getattr(m, PINNED, False)}


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("llama", set()),
        ("gpt_bigcode", set()),
        ("biogpt", set()),
        ("mixtral", {"MixtralSparseMoeBlock"}),
        ("phimoe", {"PhimoeTopKRouter"}),
    ],
)
def test_training_mode_is_evaluation_mode(name: str, kinds: set[str], architecture: Make) -> None:
    """Whatever the seed; noise of routers and sampled experts too."""
    policy, row = policy_of(architecture(name)), batch()
    with torch.no_grad():
        want = policy.eval()(row).logprobs
        for seed in (3, 4):
            torch.manual_seed(seed)
            assert torch.equal(policy.train()(row).logprobs, want)
    assert pinned(policy) == kinds
    assert policy.training


def test_a_critic_on_the_same_weights_keeps_its_layers_pinned(architecture: Make) -> None:
    policy = policy_of(architecture("mixtral"), lora=LoraOptions(r=2, target_modules=("q_proj",)))
    critic = scalar_model_on(policy, name="critic", lora=LoraOptions(target_modules=("q_proj",)))
    assert critic is not None
    critic.train()
    blocks = [m for m in critic.modules() if type(m).__name__ == "MixtralSparseMoeBlock"]
    assert len(blocks) == 2
    assert not any(block.training for block in blocks)


def test_loading_draws_no_random_number(architecture: Make) -> None:
    folder = architecture("phimoe")
    states = random.getstate(), torch.get_rng_state()
    policy_of(folder)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])


def test_rates_are_set_to_0_and_other_numbers_stay() -> None:
    layer = nn.Module()
    rates = ("dropout", "attention_dropout", "layerdrop", "resid_pdrop", "drop_prob", "drop_path")
    others = {"token_drop_threshold": 0.5, "drop_tokens_above": 2.0, "dropped": 7.0}
    for name, value in {**dict.fromkeys(rates, 0.1), **others}.items():
        setattr(layer, name, value)
    layer.inner = nn.Dropout(0.1)
    switch_off_dropout(layer)
    assert {name: getattr(layer, name) for name in rates} == dict.fromkeys(rates, 0.0)
    assert {name: getattr(layer, name) for name in others} == others
    assert layer.inner.p == 0


def test_lora_keeps_its_own_dropout(tiny: Path) -> None:
    policy = policy_of(tiny, lora=LoraOptions(r=2, dropout=0.5))
    rates = {m.p for n, m in policy.named_modules() if "lora_dropout" in n and hasattr(m, "p")}
    assert rates == {0.5}
    assert not pinned(policy)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            nn.init.ones_(parameter)
    row = batch()
    with torch.no_grad():
        assert not torch.equal(policy.train()(row).logprobs, policy.eval()(row).logprobs)


def noisy(module: LlamaMLP, x: Tensor) -> Tensor:
    """Whatever the mode."""
    return module.down_proj(module.act_fn(module.gate_proj(x)) * torch.rand_like(x[..., :1]))


def detached(module: LlamaMLP, x: Tensor) -> Tensor:
    """As remote code that computes experts without gradients in evaluation mode."""
    out = module.down_proj(module.act_fn(module.gate_proj(x)) * module.up_proj(x))
    return 1.1 * out if module.training else out.detach()


@pytest.mark.parametrize(
    ("forward", "match"),
    [
        (noisy, r"layers\.0\.mlp \(LlamaMLP\), which cannot be switched off"),
        (detached, r"layers\.0\.mlp \(LlamaMLP\) acts otherwise .* passes no gradient"),
    ],
)
def test_what_cannot_be_switched_off_is_named(
    forward: Any, match: str, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaMLP, "forward", forward)
    with pytest.raises(AlignError, match=match) as caught:
        policy_of(tiny)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- windows, ropes, heads


@pytest.mark.parametrize(
    ("name", "windows"),
    [("llama", [None, None]), ("qwen2_moe", [5, None]), ("phimoe", [5, 5]), ("mistral", [5, 5])],
)
def test_windows_are_those_of_the_masks(
    name: str, windows: list[int | None], architecture: Make
) -> None:
    policy = policy_of(architecture(name))
    assert [getattr(layer.self_attn, WINDOW) for layer in policy.backbone.layers] == windows


def test_a_critics_windows_are_those_of_the_masks(architecture: Make) -> None:
    critic = load_scalar_model(str(architecture("qwen2_moe")), device=CPU, precision="fp32")
    assert [getattr(layer.self_attn, WINDOW) for layer in critic.backbone.layers] == [5, None]


def causal(b: Any, h: Any, query: Tensor, key: Tensor) -> Tensor:
    return key <= query


@pytest.mark.parametrize("size", [1, 2, 4096, 262144])
def test_window_of_a_mask(size: int) -> None:
    def sliding(b: Any, h: Any, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key > query - size)

    def chunked(b: Any, h: Any, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key // size == query // size)

    def both_ways(b: Any, h: Any, query: Tensor, key: Tensor) -> Tensor:
        return (key - query).abs() < size

    assert window_of(causal, None) is None
    assert window_of(sliding, size) == size
    wrong = [(sliding, None), (sliding, size + 1), (causal, size)]
    if size > 1:  # chunks of one token are a window of one
        wrong += [(chunked, size), (both_ways, size)]
    for function, said in wrong:
        with pytest.raises(NotImplementedError, match="neither causal nor a sliding window"):
            window_of(function, said)


def test_longrope_is_held_below_its_switch(architecture: Make, tmp_path: Path) -> None:
    import json
    import shutil

    folder = tmp_path / "phi3"
    shutil.copytree(architecture("phi3"), folder)
    config = json.loads((folder / "config.json").read_text())
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32}
    config["rope_parameters"] = rope | factors
    (folder / "config.json").write_text(
        json.dumps(config | {"original_max_position_embeddings": 32})
    )
    policy = policy_of(folder)
    check_length(policy, 32, "a row has")
    with pytest.raises(AlignError, match=r"more than 32 tokens \(longrope\).* a row has 33; lower"):
        check_length(policy, 33, "a row has")
    with pytest.raises(AlignError, match="has 64 positions, but a row has 65"):
        check_length(policy, 65, "a row has")


@pytest.mark.parametrize(("name", "scale"), [("granite", 0.5), ("cohere", 0.3), ("llama", 1.0)])
def test_logits_are_scaled_as_the_config_says(name: str, scale: float, architecture: Make) -> None:
    """To the last bit, in a frozen model that is held in bf16 too."""
    folder = architecture(name)
    policy = policy_of(folder)
    assert policy.logit_scale == scale
    rounded = Policy(policy_of(folder).model.bfloat16(), precision="bf16", name=name)
    from align.models.probes import check_packable

    check_packable(rounded)
    assert rounded.logit_scale == scale


def test_a_scale_counts_inside_a_cap(architecture: Make) -> None:
    """cap * tanh(scale * z / cap) / t, by the fused loss as by plain logits."""
    policy, row = policy_of(architecture("gemma2")), batch()
    policy.inner.config.final_logit_softcapping = 3.0
    policy.logit_scale = 1.7
    with torch.no_grad():
        hidden = policy.hidden_states(row)[0]
        z = hidden @ policy.head_weight().T
        want = (3 * torch.tanh(1.7 * z / 3) / 0.7).log_softmax(-1)
        want = want[row.predictor[row.loss_mask]].gather(-1, row.input_ids[row.loss_mask][:, None])
        got = policy(row, temperature=0.7).logprobs
        torch.testing.assert_close(got, want[:, 0], rtol=0, atol=1e-5)
        again = (policy.logits(hidden) / 0.7).log_softmax(-1)[row.predictor[row.loss_mask]]
    torch.testing.assert_close(
        again.gather(-1, row.input_ids[row.loss_mask][:, None])[:, 0], got, rtol=0, atol=1e-5
    )
