"""vLLM behind the sampler's interface: with a stand-in, and with vLLM where it is installed."""

from __future__ import annotations

import importlib.util
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from align.config.sections import GenerationOptions, LoraOptions, VLLMOptions
from align.models import Policy, load_policy
from align.rollout import sampler
from align.rollout.engine import require_engine, sample
from align.rollout.experience import over_rollout, rollout_groups
from align.types import AlignError, NonFiniteError, Rollout

CPU = torch.device("cpu")
ENDS = (7, 8, 9)
PROMPTS = [np.arange(10, 10 + n, dtype=np.int32) for n in (3, 9, 5, 1)]
INSTALLED = importlib.util.find_spec("vllm") is not None


@pytest.fixture
def policy(tiny: Path) -> Policy:
    return load_policy(str(tiny), device=CPU, precision="fp32")


def options(**changes: Any) -> GenerationOptions:
    defaults = {"max_new_tokens": 12, "temperature": 0.8, "samples_per_prompt": 3}
    return GenerationOptions(**{"engine": "vllm", **defaults, **changes})


def draw(policy: Policy, prompts: list[np.ndarray] = PROMPTS, **changes: Any) -> Rollout:
    seed, numbers = changes.pop("seed", 0), changes.pop("numbers", None)
    return sample(policy, prompts, options(**changes), end_ids=ENDS, seed=seed, numbers=numbers)


def answers(rollout: Rollout) -> list[list[int]]:
    rows = zip(rollout.input_ids, rollout.response_mask, strict=True)
    return [ids[mask].tolist() for ids, mask in rows]


def train(policy: Policy) -> None:
    """New values for all that is trained."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)


# ---------------------------------------------------------------- the rollout


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_logprobs_are_the_policys_own(policy: Policy, fake_vllm: Any, temperature: float) -> None:
    """Those of training to the bit of a packed pass, and vLLM's beside them."""
    rollout = draw(policy, temperature=temperature)
    again = over_rollout(
        rollout_groups(rollout, 3),
        lambda batch: policy(batch, temperature=temperature).logprobs,
        like=rollout.logprobs,
        tokens_per_microbatch=4096,
    )
    assert rollout.logprobs.equal(again)
    assert rollout.engine_logprobs is not None
    assert not rollout.engine_logprobs.equal(again)  # from another kernel
    torch.testing.assert_close(rollout.engine_logprobs, again, rtol=0, atol=1e-4)


def test_greedy_is_the_samplers(policy: Policy, fake_vllm: Any) -> None:
    """The same tokens, and log-probabilities at temperature 1."""
    greedy = {"temperature": 0.0, "samples_per_prompt": 1}
    found = draw(policy, **greedy)
    plain = options(engine="align", **greedy)
    wanted = sampler.sample(policy, PROMPTS, plain, end_ids=ENDS, seed=0)
    assert answers(found) == answers(wanted)
    assert found.finished.equal(wanted.finished)
    torch.testing.assert_close(found.logprobs, wanted.logprobs, rtol=0, atol=1e-4)


def test_nucleus(policy: Policy, fake_vllm: Any) -> None:
    """vLLM's log-probabilities are of the nucleus, the rollout's of the whole distribution."""
    rollout = draw(policy, top_p=0.5, temperature=1.0)
    whole = draw(policy, temperature=1.0)
    assert rollout.engine_logprobs is None
    # of 60 tokens drawn freely some lie outside the nucleus, where a token is improbable
    inside, outside = (r.logprobs[r.response_mask].min() for r in (rollout, whole))
    assert inside > outside + 1


def test_responses_end_at_the_first_end_token(policy: Policy, fake_vllm: Any) -> None:
    rollout = draw(policy, samples_per_prompt=16)
    assert rollout.finished.any()
    assert not rollout.finished.all()
    for ids, finished in zip(answers(rollout), rollout.finished.tolist(), strict=True):
        ends = [i for i, token in enumerate(ids) if token in ENDS]
        assert ends == [len(ids) - 1] if finished else (not ends and len(ids) == 12)


def test_what_is_sampled_depends_on_seed_and_numbers_alone(policy: Policy, fake_vllm: Any) -> None:
    whole = answers(draw(policy))
    assert answers(draw(policy)) == whole
    assert answers(draw(policy, PROMPTS[1:3], numbers=[1, 2])) == whole[3:9]
    assert answers(draw(policy, PROMPTS[1:3])) != whole[3:9]
    assert answers(draw(policy, seed=1)) != whole
    same = draw(policy, [PROMPTS[0]] * 3, temperature=1.0)
    assert len({tuple(ids) for ids in answers(same)}) > 5


def test_random_numbers_of_the_process_are_kept(policy: Policy, fake_vllm: Any) -> None:
    """vLLM seeds them as it starts."""
    seeds: list[Callable[[], Any]] = [
        lambda: random.seed(5), lambda: np.random.seed(5), lambda: torch.manual_seed(5)
    ]  # fmt: skip

    def three() -> tuple[float, float, float]:
        return random.random(), np.random.rand(), torch.rand(1).item()

    for start in seeds:
        start()
    wanted = three()
    for start in seeds:
        start()
    draw(policy)
    assert len(fake_vllm.started) == 1
    assert three() == wanted


def test_tokens_are_reported(policy: Policy, fake_vllm: Any) -> None:
    told: list[int] = []
    made = sample(policy, PROMPTS, options(), end_ids=ENDS, seed=0, on_tokens=told.append)
    assert told == [int(made.response_mask.sum())]


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("lora", [None, LoraOptions(r=4)], ids=["full", "lora"])
def test_weights_are_those_of_this_moment(
    tiny: Path, fake_vllm: Any, lora: LoraOptions | None
) -> None:
    """After a step vLLM draws from the new weights, and has forgotten what it kept of prompts."""
    policy = load_policy(str(tiny), device=CPU, precision="fp32", lora=lora)
    before = draw(policy)
    train(policy)
    after = draw(policy)
    assert answers(after) != answers(before)
    assert after.engine_logprobs is not None
    torch.testing.assert_close(after.engine_logprobs, after.logprobs, rtol=0, atol=1e-4)
    assert len(fake_vllm.started) == 1


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "gpt_neox"])
def test_weights_of_other_architectures(
    architecture: Callable[[str], Path], fake_vllm: Any, name: str
) -> None:
    """Biases, tied heads, transposed matrices; each under its name, none left out."""
    policy = load_policy(
        str(architecture(name)), device=CPU, precision="fp32", lora=LoraOptions(r=4)
    )
    train(policy)
    rollout = draw(policy)
    assert rollout.engine_logprobs is not None
    torch.testing.assert_close(rollout.engine_logprobs, rollout.logprobs, rtol=0, atol=1e-4)


def test_another_model_of_the_same_architecture_takes_the_engine_over(
    tiny: Path, tiny_sft: Path, fake_vllm: Any
) -> None:
    """As `align eval` does with its models."""
    for folder in (tiny, tiny_sft):
        rollout = draw(load_policy(str(folder), device=CPU, precision="fp32"))
        assert rollout.engine_logprobs is not None
        torch.testing.assert_close(rollout.engine_logprobs, rollout.logprobs, rtol=0, atol=1e-4)
    assert len(fake_vllm.started) == 1


# ---------------------------------------------------------------- what is refused


def test_old_weights_are_refused(policy: Policy, fake_vllm: Any) -> None:
    """An engine that took nothing of what it was given runs on its random weights."""
    fake_vllm.reloads = False
    with pytest.raises(AlignError, match=r"differ from those of .* by \S+ nats per token"):
        draw(policy)
    fake_vllm.reloads = True
    draw(policy)


def test_a_weight_that_vllm_does_not_know_is_refused(
    policy: Policy, fake_vllm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy.inner.register_parameter("extra", torch.nn.Parameter(torch.ones(1)))
    with pytest.raises(AlignError, match=r"does not take the weights of .*: There is no module"):
        draw(policy)


def test_keys_of_older_weights_are_refused(
    policy: Policy, fake_vllm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_vllm, "reset_prefix_cache", lambda self: False)
    with pytest.raises(AlignError, match="still holds keys and values of older weights"):
        draw(policy)


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AlignError, match=r"run pip install 'align-rlhf\[vllm\]', or set generat"):
        require_engine(options())
    require_engine(options(engine="align"))


def test_several_processes(fake_vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(AlignError, match="vllm samples in one process, and 2 were started"):
        require_engine(options())


def test_what_vllm_cannot_start_is_one_line(policy: Policy, fake_vllm: Any) -> None:
    with pytest.raises(AlignError, match=r"vllm cannot run .*: Available memory is .*; change"):
        draw(policy, vllm=VLLMOptions(gpu_memory_utilization=1.0))


def test_what_vllm_cannot_sample_is_one_line(policy: Policy, fake_vllm: Any) -> None:
    def unsupported(self: Any, prompt: list[int], params: Any) -> None:
        raise RuntimeError("Unsupported CPU attention configuration: head_dim=8")

    fake_vllm._answer = unsupported
    with pytest.raises(AlignError, match=r"vllm stopped sampling: Unsupported CPU .*; set gener"):
        draw(policy)


def test_one_engine_in_a_process(
    policy: Policy, architecture: Callable[[str], Path], fake_vllm: Any
) -> None:
    draw(policy)
    other = load_policy(str(architecture("gpt2")), device=CPU, precision="fp32")
    with pytest.raises(AlignError, match="started for another architecture, precision or"):
        draw(other)
    with pytest.raises(AlignError, match="started for another architecture, precision or"):
        draw(policy, slots=2)


def test_no_room(policy: Policy, fake_vllm: Any) -> None:
    """The longest prompt has 9 tokens, and 12 may be new."""
    few = VLLMOptions(max_tokens=20)
    with pytest.raises(AlignError, match=r"max_tokens: is 20, but .* response may have 21; raise"):
        draw(policy, vllm=few)
    assert draw(policy, vllm=few, max_new_tokens=11).input_ids.shape[1] <= 11


def test_broken_weights_are_told(policy: Policy, fake_vllm: Any) -> None:
    with torch.no_grad():
        policy.inner.get_output_embeddings().weight[ENDS[0]].fill_(float("nan"))
    fake_vllm._answer = lambda self, prompt, params: _one_token()
    with pytest.raises(NonFiniteError, match="a log-probability became nan on response 0"):
        draw(policy)


def _one_token() -> Any:
    from types import SimpleNamespace

    logprobs = [{20: SimpleNamespace(logprob=-1.0)}]
    return SimpleNamespace(token_ids=[20], logprobs=logprobs, finish_reason="length")


# ---------------------------------------------------------------- vLLM itself

REAL = """
import sys, torch
import align.training.distributed  # which ends the process's group at exit
from tests.rollout.test_vllm import *

vllm = VLLMOptions(gpu_memory_utilization=0.05, eager=True)
lora = LoraOptions(r=4) if sys.argv[2] == "lora" else None
policy = load_policy(sys.argv[1], device=CPU, precision="fp32", lora=lora)
before = draw(policy, vllm=vllm)
assert answers(draw(policy, vllm=vllm)) == answers(before)
assert answers(draw(policy, PROMPTS[1:3], numbers=[1, 2], vllm=vllm)) == answers(before)[3:9]
many = [np.full(90, 10 + i, dtype=np.int32) for i in range(20)]  # more than one pass takes
draw(policy, many, vllm=vllm)
train(policy)
after = draw(policy, vllm=vllm)
assert answers(after) != answers(before)
torch.testing.assert_close(after.engine_logprobs, after.logprobs, rtol=0, atol=1e-3)
greedy = dict(temperature=0.0, samples_per_prompt=1)
plain = options(engine="align", **greedy)
wanted = sampler.sample(policy, PROMPTS, plain, end_ids=ENDS, seed=0)
assert answers(draw(policy, vllm=vllm, **greedy)) == answers(wanted)
print("same", (after.engine_logprobs - after.logprobs).abs()[after.response_mask].mean().item())
"""


SERVED = {
    "Llama": {"num_key_value_heads": 1, "intermediate_size": 256},
    "Qwen2": {"num_key_value_heads": 1, "intermediate_size": 256, "tie_word_embeddings": True},
    "GPT2": {},
}


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="vllm is not installed")
@pytest.mark.parametrize("lora", ["full", "lora"])
@pytest.mark.parametrize("name", SERVED)
def test_vllm_itself(tiny: Path, tmp_path: Path, name: str, lora: str) -> None:
    """In a process of its own, which then holds the one engine. Its heads have a width it knows."""
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = getattr(transformers, f"{name}Config")(vocab_size=96, **sizes, **SERVED[name])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # biases and norms of a new model are 0 and 1: no error would show
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path)
    command = [sys.executable, "-c", REAL, str(tmp_path), lora]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "same" in done.stdout, done.stderr[-2000:]
    assert (done.returncode, done.stderr.count("Traceback")) == (0, 0)
