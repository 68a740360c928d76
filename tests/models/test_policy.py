from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from align.data.tokens.packing import collate, pack
from align.models import Policy, ScalarModel, load_policy, load_scalar_model, load_tokenizer
from align.models.policy import batch_sequences
from align.models.precision import autocast_once
from align.types import TokenBatch, TokenGroup, TokenSequence
from tools.trust import Trust

CPU = torch.device("cpu")


def sequence(*ids: int) -> TokenSequence:
    return TokenSequence(np.array(ids, np.int32), np.ones(len(ids), dtype=bool))


@pytest.fixture
def groups() -> list[TokenGroup]:
    return [
        TokenGroup(np.array([1, 20, 30], np.int32), (sequence(40, 41, 2), sequence(50, 2))),
        TokenGroup(np.array([1, 60], np.int32), (sequence(7, 8, 9, 10, 2),)),
        TokenGroup(np.array([1, 22, 33, 44], np.int32), (sequence(2), sequence(70, 71, 2))),
    ]


@pytest.fixture
def policy(tiny: Path) -> Policy:
    return load_policy(str(tiny), device=CPU, precision="fp32")


@pytest.fixture
def scalar(tiny: Path) -> ScalarModel:
    torch.manual_seed(0)
    return load_scalar_model(str(tiny), device=CPU, precision="fp32")


def whole_sequences(groups: list[TokenGroup]) -> list[list[int]]:
    return [
        [*g.prefix_ids.tolist(), *c.input_ids.tolist()] for g in groups for c in g.continuations
    ]


# ---------------------------------------------------------------- policy


def test_temperature_divides_the_logits(policy: Policy, groups: list[TokenGroup]) -> None:
    batch = collate(groups)
    logits = policy.logits(policy.hidden_states(batch)[0])
    columns = batch.predictor[batch.loss_mask]
    want = (logits[columns] / 0.7).log_softmax(-1)
    want = want.gather(-1, batch.input_ids[batch.loss_mask][:, None])[:, 0]
    got = policy(batch, temperature=0.7)
    torch.testing.assert_close(got.logprobs, want, rtol=0, atol=1e-5)
    assert not got.entropy.any()


def test_statistics_are_asked_for(policy: Policy, groups: list[TokenGroup]) -> None:
    batch = collate(groups)
    plain, full = policy(batch), policy(batch, statistics=True)
    assert torch.equal(plain.logprobs, full.logprobs)
    whole = policy.logits(policy.hidden_states(batch)[0]).log_softmax(-1)
    whole = whole[batch.predictor[batch.loss_mask]]
    torch.testing.assert_close(full.entropy, -(whole.exp() * whole).sum(-1), rtol=0, atol=1e-5)


def test_bf16_is_close_and_comes_back_in_float32(
    tiny: Path, policy: Policy, groups: list[TokenGroup], trust: Trust
) -> None:
    rounded = load_policy(str(tiny), device=CPU, precision="bf16")
    a, b = policy(collate(groups)).logprobs, rounded(collate(groups)).logprobs
    assert b.dtype == torch.float32
    apart = (a - b).abs().max().item()
    assert apart > 1e-6
    trust.at_most("equivalences", "bf16 against fp32: log-prob of a token, nats", apart, 0.05)
    assert {p.dtype for p in rounded.parameters()} == {torch.float32}


def test_saved_model_is_plain_transformers(
    policy: Policy, tiny: Path, tmp_path: Path, groups: list[TokenGroup]
) -> None:
    with torch.no_grad():
        policy.head_weight().mul_(1.5)
    policy.save(tmp_path / "model", load_tokenizer(str(tiny)))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert "align_segments" not in json.dumps(config)
    assert config["pad_token_id"] != config["eos_token_id"]
    assert (tmp_path / "model" / "tokenizer.json").is_file()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    batch = collate(groups)
    got = iter(policy(batch).logprobs)
    for group, ids in zip(
        [g for g in groups for _ in g.continuations], whole_sequences(groups), strict=True
    ):
        want = plain(torch.tensor([ids])).logits[0].log_softmax(-1)
        for column in range(len(group.prefix_ids), len(ids)):
            assert next(got).item() == pytest.approx(want[column - 1, ids[column]].item(), abs=1e-5)


class Calls:
    """Counts how often each decoder layer runs."""

    def __init__(self, policy: Policy) -> None:
        self.count = 0
        for layer in policy.inner.model.layers:
            layer.self_attn.register_forward_hook(self._add)

    def _add(self, *_: object) -> None:
        self.count += 1


def gradient(policy: Policy, batch: TokenBatch) -> dict[str, Tensor]:
    policy.zero_grad()
    policy(batch).logprobs.sum().backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_recomputes_and_changes_nothing(
    tiny: Path, policy: Policy, groups: list[TokenGroup], trust: Trust
) -> None:
    batch = collate(groups)
    thrifty = load_policy(str(tiny), device=CPU, precision="fp32", gradient_checkpointing=True)
    plain_calls, thrifty_calls = Calls(policy), Calls(thrifty)
    want, got = gradient(policy.train(), batch), gradient(thrifty.train(), batch)
    assert plain_calls.count == 2  # two layers, forward only
    assert thrifty_calls.count == 4  # and once more in the backward pass
    assert want.keys() == got.keys()
    apart = max((want[name] - got[name]).abs().max().item() for name in want)
    trust.at_most("equivalences", "recomputed activations = kept ones, gradients", apart, 0.0)
    with torch.no_grad():
        thrifty.eval()(batch)
    assert thrifty_calls.count == 6


# ---------------------------------------------------------------- scalar model


def test_score_is_read_at_the_true_last_token(
    scalar: ScalarModel, tiny: Path, tmp_path: Path, groups: list[TokenGroup]
) -> None:
    """Against plain transformers, on a right-padded batch; every response ends in EOS."""
    tokenizer = load_tokenizer(str(tiny))
    scalar.save(tmp_path / "model", tokenizer)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    assert plain.config.num_labels == 1
    assert plain.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    padded = tokenizer.pad({"input_ids": whole_sequences(groups)}, return_tensors="pt")
    assert (padded["input_ids"] == tokenizer.pad_token_id).any()
    with torch.no_grad():
        want = plain(**padded).logits[:, 0]
        got = scalar(collate(groups), at="last")
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert got.std() > 0.1


def test_scores_find_their_way_back_through_packing(
    scalar: ScalarModel, groups: list[TokenGroup]
) -> None:
    with torch.no_grad():
        want = scalar(collate(groups), at="last")
        got = torch.zeros(5)
        batches = pack(groups, tokens_per_microbatch=9)
        for batch in batches:
            got[torch.from_numpy(batch_sequences(batch))] = scalar(batch, at="last")
    assert len(batches) == 3
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_values_are_read_before_the_token_is_chosen(
    scalar: ScalarModel, groups: list[TokenGroup]
) -> None:
    """The value at token t sees tokens before t only: those of the prompt for the first one."""
    got = iter(scalar(collate(groups), at="counted").tolist())
    for group, ids in zip(
        [g for g in groups for _ in g.continuations], whole_sequences(groups), strict=True
    ):
        for column in range(len(group.prefix_ids), len(ids)):
            before = TokenGroup(np.zeros(0, np.int32), (sequence(*ids[:column]),))
            want = scalar(collate([before]), at="last").item()
            assert next(got) == pytest.approx(want, abs=1e-5)
    assert next(got, None) is None


def test_scale_head_multiplies_every_score(scalar: ScalarModel, groups: list[TokenGroup]) -> None:
    before = scalar(collate(groups), at="last").detach()
    scalar.scale_head(2.5)
    torch.testing.assert_close(scalar(collate(groups), at="last"), 2.5 * before)
    scalar.scale_head(0.0)
    assert not scalar(collate(groups), at="last").any()


def test_sampling_casts_a_weight_once_whether_it_is_trained_or_frozen() -> None:
    """Seen by what a weight's change does not change while it lasts."""
    linears = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)).eval()
    linears[1].requires_grad_(False)
    x = torch.randn(2, 4)
    with autocast_once(linears, "bf16", CPU):
        before = linears(x)
        assert before.dtype == torch.bfloat16
        assert not before.requires_grad
        for linear in linears:
            linear.weight.data.mul_(2.0)
        assert torch.equal(linears(x), before)
    assert [p.requires_grad for p in linears.parameters()] == [True, True, False, False]
    with autocast_once(linears, "fp32", CPU):
        assert torch.equal(linears(x), linears(x).float())
    with autocast_once(linears, "bf16", CPU):
        assert not torch.equal(linears(x), before)
