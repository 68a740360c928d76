from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from align.config.sections import LoraOptions
from align.data.tokens.packing import collate
from align.models import Policy, ScalarModel, load_policy, load_scalar_model, load_tokenizer
from align.models.lora import adapter_off, merged, plain_weights
from align.types import AlignError, TokenBatch, TokenGroup, TokenSequence
from tools.trust import Trust

CPU = torch.device("cpu")
IDS = [1, 20, 30, 40, 41, 42, 2]


@pytest.fixture
def batch() -> TokenBatch:
    rest = TokenSequence(np.array(IDS[3:], np.int32), np.ones(4, dtype=bool))
    return collate([TokenGroup(np.array(IDS[:3], np.int32), (rest,))])


def policy(folder: Path, **options: object) -> Policy:
    lora = LoraOptions(**{"r": 4, "alpha": 8.0, **options})  # type: ignore[arg-type]
    return load_policy(str(folder), device=CPU, precision="fp32", lora=lora)


def as_if_trained(model: torch.nn.Module) -> None:
    """Adapters start at zero: give them, and a trained head, something to say."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def trained_names(model: Policy | ScalarModel) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def test_trains_adapters_only(tiny: Path) -> None:
    names = trained_names(policy(tiny))
    assert len(names) == 2 * 2 * 7  # A and B, two layers, seven linear maps each
    assert all("lora_A" in name or "lora_B" in name for name in names)


def test_new_adapter_changes_nothing_and_adapter_off_is_the_base(
    tiny: Path, batch: TokenBatch
) -> None:
    base = load_policy(str(tiny), device=CPU, precision="fp32")(batch).logprobs
    adapted = policy(tiny)
    assert torch.equal(adapted(batch).logprobs, base)
    as_if_trained(adapted)
    assert (adapted(batch).logprobs - base).abs().max() > 0.1
    with adapter_off(adapted.model):
        assert torch.equal(adapted(batch).logprobs, base)
    assert (adapted(batch).logprobs - base).abs().max() > 0.1


def test_adapter_off_without_an_adapter(tiny: Path) -> None:
    plain = load_policy(str(tiny), device=CPU, precision="fp32")
    with pytest.raises(AlignError, match="adapter_off needs lora"), adapter_off(plain.model):
        pass


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_merged_model_is_the_adapted_model(
    name: str, architecture: Callable[[str], Path], batch: TokenBatch, tmp_path: Path, trust: Trust
) -> None:
    folder = architecture(name)  # GPT-2's maps are Conv1D, Qwen2's embeddings are tied
    adapted = policy(folder)
    as_if_trained(adapted)
    with torch.no_grad():
        want = adapted(batch).logprobs
    adapted.save(tmp_path / "model", load_tokenizer(str(folder)))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        got = plain(torch.tensor([IDS])).logits[0].log_softmax(-1)
    got = got[2:-1].gather(-1, torch.tensor(IDS[3:])[:, None])[:, 0]
    apart = (got - want).abs().max().item()
    trust.at_most("equivalences", f"{name}: LoRA merged = beside, log-probs, nats", apart, 1e-5)
    assert not [k for k in load_file(tmp_path / "model" / "model.safetensors") if "lora" in k]
    assert (tmp_path / "model_adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_plain_weights_are_those_of_the_merged_model(
    name: str, architecture: Callable[[str], Path]
) -> None:
    """To the bit, under its names, each tensor once; the model's own are not written to."""
    adapted = policy(architecture(name))
    as_if_trained(adapted)
    before = {key: tensor.clone() for key, tensor in adapted.state_dict().items()}
    found = list(plain_weights(adapted.model))
    wanted = dict(merged(adapted.model).named_parameters())
    assert [key for key, _ in found] == list(wanted)
    assert all(tensor.equal(wanted[key]) for key, tensor in found)
    assert all(tensor.equal(before[key]) for key, tensor in adapted.state_dict().items())
    whole = load_policy(str(architecture(name)), device=CPU, precision="fp32").model
    own = dict(whole.named_parameters())
    assert all(tensor.data_ptr() == own[key].data_ptr() for key, tensor in plain_weights(whole))


def test_adapter_on_the_head_counts(tiny: Path, batch: TokenBatch) -> None:
    """``token_logprobs`` reads the head's weight, past the module's own forward."""
    adapted = policy(tiny, target_modules=("lm_head", "q_proj"))
    as_if_trained(adapted)
    with torch.no_grad():
        logits = adapted.model(
            input_ids=torch.tensor([IDS]), segments=collate([_alone()]).segments
        ).logits
        want = logits[0].log_softmax(-1)[2:-1].gather(-1, torch.tensor(IDS[3:])[:, None])[:, 0]
        torch.testing.assert_close(adapted(batch).logprobs, want, rtol=0, atol=1e-5)
        base = load_policy(str(tiny), device=CPU, precision="fp32")(batch).logprobs
        with adapter_off(adapted.model):
            assert torch.equal(adapted(batch).logprobs, base)

    def gradients(logprobs: torch.Tensor) -> dict[str, torch.Tensor]:
        adapted.zero_grad()
        (logprobs * torch.arange(1.0, 5.0)).sum().backward()
        return {n: p.grad.clone() for n, p in adapted.named_parameters() if p.grad is not None}

    got = gradients(adapted(batch).logprobs)
    logits = adapted.model(
        input_ids=torch.tensor([IDS]), segments=collate([_alone()]).segments
    ).logits
    dense = logits[0].log_softmax(-1)[2:-1].gather(-1, torch.tensor(IDS[3:])[:, None])[:, 0]
    want = gradients(dense)
    assert got.keys() == want.keys()
    assert len([name for name in got if "lm_head.lora" in name]) == 2
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, want[name], rtol=1e-4, atol=5e-5)


def test_an_adapter_on_a_head_that_is_the_embeddings_is_refused(
    architecture: Callable[[str], Path],
) -> None:
    """Merging it would change the embeddings too."""
    with pytest.raises(AlignError, match="output embeddings are its input embeddings"):
        policy(architecture("qwen2"), target_modules=("lm_head", "q_proj"))


def _alone() -> TokenGroup:
    ids = np.array(IDS, np.int32)
    return TokenGroup(np.zeros(0, np.int32), (TokenSequence(ids, np.ones(len(ids), dtype=bool)),))


def test_top_layers(architecture: Callable[[str], Path]) -> None:
    for name in ("llama", "gpt2"):
        names = trained_names(policy(architecture(name), top_layers=1))
        assert names
        assert all(".1." in n and ".0." not in n for n in names)
        with pytest.raises(AlignError, match=r"lora.top_layers: got 3; the model has 2 layers"):
            policy(architecture(name), top_layers=3)


def test_unknown_target_modules_are_one_line(tiny: Path) -> None:
    with pytest.raises(AlignError, match=r"lora\.target_modules") as caught:
        policy(tiny, target_modules=("q_proj", "attention_of_some_kind"))
    assert "no module is called 'attention_of_some_kind'; this model has down_proj, " in str(
        caught.value
    )
    assert "\n" not in str(caught.value)


def test_classifier_trains_and_keeps_its_head(
    tiny: Path, batch: TokenBatch, tmp_path: Path
) -> None:
    scalar = load_scalar_model(
        str(tiny), device=CPU, precision="fp32", lora=LoraOptions(r=4, alpha=8.0)
    )
    heads = [name for name in trained_names(scalar) if "score" in name]
    assert len(heads) == 1
    as_if_trained(scalar)
    with torch.no_grad():
        before = scalar(batch, at="last")
        scalar.scale_head(3.0)
        want = scalar(batch, at="last")
    torch.testing.assert_close(want, 3 * before)
    scalar.save(tmp_path / "rm", load_tokenizer(str(tiny)))
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    with torch.no_grad():
        got = plain(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    again = load_scalar_model(str(tmp_path / "rm"), device=CPU, precision="fp32")
    assert not again.fresh_head


def test_a_critic_has_no_head_to_adapt(tiny: Path) -> None:
    """It shares PPO's recipe with the actor, whose head may be adapted."""
    lora = LoraOptions(target_modules=("lm_head", "q_proj"))
    critic = load_scalar_model(str(tiny), device=CPU, precision="fp32", lora=lora)
    assert any("q_proj" in name for name in trained_names(critic))
    with pytest.raises(AlignError, match="no module is called 'q_prj'"):
        load_scalar_model(
            str(tiny), device=CPU, precision="fp32", lora=LoraOptions(target_modules=("q_prj",))
        )
