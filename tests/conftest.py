"""Shape annotations executed, and a language model that is small enough for every stage.

``align.losses`` has its shape annotations checked under pytest; at run time they are free.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

from align.base import libraries
from tools.trust import Trust

install_import_hook("align.losses", "beartype.beartype")
settings.register_profile("align", deadline=None)  # a busy machine is no failure
settings.load_profile("align")
for _name, _value in libraries.QUIET.items():  # as `align` sets them before it imports anything
    os.environ.setdefault(_name, _value)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("bos", "eos", "pad")
WORDS = ("red", "green", "blue", "cat", "dog", "sun", "moon", "sea", "good", "bad", "one", "two")

R = TypeVar("R")
LoadRecipe = Callable[..., Any]


def _tokenizer(template: str | None) -> Any:
    """Byte-level BPE of about a hundred tokens, of lower-case words only."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    specials = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    letters = list("abcdefghijklmnopqrstuvwxyz:.?") + ["Ġ", "Ċ"]
    trainer = trainers.BpeTrainer(
        vocab_size=96, special_tokens=specials, initial_alphabet=letters, show_progress=False
    )
    raw.train_from_iterator([" ".join(WORDS), "user assistant system\n"], trainer)
    if template is None:
        raw.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", raw.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        chat_template=template,
        bos_token="<s>",
        eos_token="</s>" if template is None else "<|im_end|>",
        pad_token="<pad>",
    )


def _save_model(folder: Path, template: str | None) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer(template)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=256,
        initializer_range=0.15,  # far enough from uniform for a wrong number to show
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests that share a module's fixture on one worker: it is made once, not twice."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        if any(f.scope == "module" for f in fixtures_of(item)):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


def fixtures_of(item: pytest.Item) -> list[Any]:
    """The fixtures that a test gets, without those that another of the same name hides."""
    found = getattr(item, "_fixtureinfo", None)
    return [] if found is None else [d[-1] for d in found.name2fixturedefs.values()]


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What tests tokenise is not left in the user's cache."""
    os.environ["ALIGN_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def no_fsync() -> Iterator[None]:
    """Skip ``fsync``: only a power cut would lose what it guards, and no test has one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with a tokenizer for plain strings: BOS, no chat template."""
    return _save_model(tmp_path_factory.mktemp("models") / "tiny", None)


@pytest.fixture(scope="session")
def tiny_chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a ChatML template, whose turns end with a newline behind the end token."""
    return _save_model(tmp_path_factory.mktemp("models") / "tiny_chat", CHATML)


_HF = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_GROUPED = {**_HF, "num_key_value_heads": 2}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_PDROP = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "n_positions": 64}
_QWEN_MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "use_sliding_window": True,
    "layer_types": ["sliding_attention", "full_attention"],
}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
}
_NEO = [[["global", "local"], 1]]
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GROUPED | {"attention_dropout": 0.5}),
    "qwen2": ("Qwen2Config", _GROUPED | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", _GROUPED | {"head_dim": 8}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt_neox": ("GPTNeoXConfig", _HF | {"hidden_dropout": 0.5, "attention_dropout": 0.5}),
    "opt": ("OPTConfig", _HF | {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.5}),
    "phi3": ("Phi3Config", _HF | {"num_key_value_heads": 4, "resid_pdrop": 0.5}),
    "mistral": ("MistralConfig", _GROUPED | {"sliding_window": 5}),
    "gemma2": ("Gemma2Config", _GROUPED | {"head_dim": 8, "sliding_window": 5}),
    "gemma3": ("Gemma3TextConfig", _GROUPED | {"head_dim": 8, "sliding_window": 5}),
    # what scales its logits
    "granite": ("GraniteConfig", _GROUPED | {"logits_scaling": 2.0}),
    "cohere": ("CohereConfig", _GROUPED | {"logit_scale": 0.3}),
    # rates under other names, functional ones, noise and sampling in training mode
    "seed_oss": ("SeedOssConfig", _GROUPED | {"head_dim": 8, "residual_dropout": 0.5}),
    "starcoder2": ("Starcoder2Config", _GROUPED | {"residual_dropout": 0.5, "sliding_window": 5}),
    "gpt_bigcode": ("GPTBigCodeConfig", {"n_embd": 32, "n_layer": 2, "n_head": 4} | _PDROP),
    "biogpt": ("BioGptConfig", _HF | {"layerdrop": 0.5, "activation_dropout": 0.5}),
    "mixtral": ("MixtralConfig", _GROUPED | _EXPERTS | {"router_jitter_noise": 0.01}),
    # windows that are in the mask alone
    "phimoe": ("PhimoeConfig", _GROUPED | _EXPERTS | {"sliding_window": 5}),
    "qwen2_moe": ("Qwen2MoeConfig", _GROUPED | _QWEN_MOE | {"sliding_window": 5}),
    # values of another size than keys
    "deepseek_v3": ("DeepseekV3Config", _HF | _LATENT),
    # those that cannot be packed
    "falcon": ("FalconConfig", _HF),
    "gptj": ("GPTJConfig", {"n_layer": 2, "n_head": 4, "rotary_dim": 4}),
    "gpt_neo": ("GPTNeoConfig", {"num_layers": 2, "num_heads": 4, "attention_types": _NEO}),
    "llama4": ("Llama4TextConfig", _GROUPED | _EXPERTS | {"attention_chunk_size": 5}),
    "jamba": ("JambaConfig", _GROUPED | {"use_mamba_kernels": False, "num_experts": 1}),
    "bert": ("BertConfig", _HF),
    "bart": ("BartConfig", {"decoder_layers": 2, "decoder_attention_heads": 4, "d_model": 32}),
    "stablelm": ("StableLmConfig", _GROUPED),
    "doge": ("DogeConfig", _GROUPED),
    "mamba": ("MambaConfig", {"num_hidden_layers": 2}),
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 4}),
    "gpt_oss": ("GptOssConfig", _GROUPED | {"head_dim": 8} | _EXPERTS),
}


@pytest.fixture(scope="session")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with a small random model of that name, its dropout on, and a tokenizer."""
    from functools import cache

    @cache
    def save(name: str) -> Path:
        import torch
        import transformers

        config_class, options = ARCHITECTURES[name]
        tokenizer = _tokenizer(None)
        special = {f"{k}_token_id": getattr(tokenizer, f"{k}_token_id") for k in SPECIAL}
        sizes = {"vocab_size": 96, "hidden_size": 32, "max_position_embeddings": 64}
        config = getattr(transformers, config_class)(**sizes | special | options)
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():  # biases and norms of a new model are 0 and 1: no error would show
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        folder = tmp_path_factory.mktemp("architectures") / name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def demonstrations() -> list[dict[str, str]]:
    """Thirty prompts, each another one, with completions of one to six words."""
    import random

    rng = random.Random(0)
    prompts = [f"{a} {b}: " for a in WORDS for b in WORDS if a != b]
    return [
        {"prompt": prompt, "completion": " ".join(rng.choices(WORDS, k=rng.randint(1, 6)))}
        for prompt in rng.sample(prompts, 30)
    ]


@pytest.fixture(scope="session")
def tiny_sft(
    tiny: Path, demonstrations: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny model after a few steps on the demonstrations: its responses end, and vary."""
    from align.config.keys import SFTRecipe
    from align.config.sections import DataConfig, DataSource, OptimOptions, TrainOptions
    from align.stages import sft

    folder = tmp_path_factory.mktemp("tiny_sft")
    rows = folder / "demonstrations.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in demonstrations), encoding="utf-8")
    recipe = SFTRecipe(
        model=str(tiny),
        output_dir=str(folder / "run"),
        data=DataConfig(train=(DataSource(path=str(rows)),), test_fraction=0.0),
        precision="fp32",
        train=TrainOptions(max_steps=20, minibatch=30),
        optim=OptimOptions(lr=0.01),
    )
    sft.run(recipe)
    return folder / "run" / "model"


@pytest.fixture(scope="session")
def preferences(demonstrations: list[dict[str, str]]) -> list[dict[str, Any]]:
    """The same prompts; what is said with ``good`` beats what is said with ``bad``."""
    return [
        {
            "prompt": row["prompt"],
            "chosen": f"{row['completion']} good",
            "rejected": f"bad {row['completion'][::-1]}",
            "margin": 0.5 * (number % 3),
        }
        for number, row in enumerate(demonstrations)
    ]


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[[str, Sequence[Mapping[str, Any]]], Path]:
    """``write_rows("name.jsonl", rows)``: a JSONL file in the test's folder."""

    def write(name: str, rows: Sequence[Mapping[str, Any]]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def make_recipe(tmp_path: Path) -> LoadRecipe:
    """``make_recipe(SFTRecipe, tree, "a.b=c", ...)``: through YAML and the loader, as shipped."""
    from align.config.load import load_recipe

    def make(cls: type[R], tree: Mapping[str, Any], *overrides: str) -> R:
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps(tree), encoding="utf-8")  # JSON is YAML
        return load_recipe(cls, str(path), overrides)

    return make


class Stopped(Exception):
    """A run that was killed."""


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str, int], Any]:
    """``with stop_at(module, "function", n):`` its n-th call (from 1) kills the run."""
    from contextlib import contextmanager

    @contextmanager
    def stop(owner: Any, name: str, call: int):
        original, calls = getattr(owner, name), 0

        def stopping(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                raise Stopped
            return original(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, stopping)
            try:
                yield
            except Stopped:
                return
        pytest.fail(f"{name} was called {calls} times, {call} were needed to kill the run")

    return stop


@pytest.fixture
def spy_steps(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], dict[str, list[float]]]:
    """``norms = spy_steps(module)``: gradient norms at each real step of its optimizers, in order.

    Keys are ``"0"``, ``"1"``, ... for the optimizers that the module makes.
    """

    def spy(module: Any) -> dict[str, list[float]]:
        original, norms = module.make_optimizer, {}

        def spied(*args: Any, **options: Any) -> Any:
            optimizer = original(*args, **options)
            found = norms.setdefault(str(len(norms)), [])

            def before_step(*_: Any) -> None:
                held = [p for group in optimizer.param_groups for p in group["params"]]
                squares = [p.grad.double().square().sum() for p in held if p.grad is not None]
                found.append(float(sum(squares)) ** 0.5)

            optimizer.register_step_pre_hook(before_step)
            return optimizer

        monkeypatch.setattr(module, "make_optimizer", spied)
        return norms

    return spy


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``import vllm`` finds a stand-in, and no engine runs yet; its ``LLM`` is returned."""
    import sys

    from align.rollout import vllm as vllm_engine
    from tests import fake_vllm

    made = fake_vllm.module()
    monkeypatch.setitem(sys.modules, "vllm", made)
    monkeypatch.setattr(vllm_engine, "_running", [])
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL"):
        monkeypatch.setenv(name, "")  # put back afterwards
    return made.LLM


@pytest.fixture(scope="session")
def read_jsonl() -> Callable[[Path], list[dict[str, Any]]]:
    return lambda path: [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture(scope="session")
def assert_same_weights() -> Callable[[Path, Path], None]:
    """Two saved models are equal bit for bit, and are not empty."""
    from safetensors.torch import load_file

    def check(a: Path, b: Path) -> None:
        first, second = (load_file(f / "model.safetensors") for f in (a, b))
        assert first.keys() == second.keys()
        assert len(first) > 10
        different = [name for name in first if not first[name].equal(second[name])]
        assert different == []

    return check


@pytest.fixture
def trust(request: pytest.FixtureRequest) -> Trust:
    """Asserts a figure and hands it on to docs/trust.md: see tools/trust.py."""
    nodeid = request.node.nodeid.partition("[")[0]
    return Trust(nodeid.partition("@")[0])  # behind it a worker names the test's group
