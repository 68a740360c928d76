"""Adapters as other trainers leave them: peft's own numbers are the truth for what is merged."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from align.cli import main
from align.config.sections import LoraOptions
from align.models import load_policy, load_scalar_model, load_tokenizer
from align.models.adapters import find_adapter
from align.models.load import load_causal_lm, load_classifier
from align.models.locate import name_on_the_hub
from align.models.sizes import find_config
from align.types import AlignError

CPU = torch.device("cpu")
TARGETS = ["q_proj", "v_proj"]
Make = Callable[..., tuple[Path, Any]]


def stir(model: torch.nn.Module) -> None:
    """Give what an adapter trains other numbers, as training would."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


@pytest.fixture
def adapter(tiny_chat: Path, tmp_path: Path) -> Make:
    """Train an adapter (by chance) with peft, save it, and give its folder and the peft model."""

    def make(
        base: Path = tiny_chat, new_tokens: int = 0, head: bool = False, **options: Any
    ) -> tuple[Path, Any]:
        auto = AutoModelForSequenceClassification if head else AutoModelForCausalLM
        more = {"num_labels": options.pop("num_labels", 1)} if head else {}
        model = auto.from_pretrained(base, dtype=torch.float32, **more)
        folder = tmp_path / "adapter"
        if new_tokens:
            tokenizer = AutoTokenizer.from_pretrained(base)
            tokenizer.add_tokens([f"<new{i}>" for i in range(new_tokens)])
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            tokenizer.save_pretrained(folder)
        save = options.pop("save_embedding_layers", "auto")
        task = options.pop("task_type", "SEQ_CLS" if head else "CAUSAL_LM")
        config = LoraConfig(task_type=task, r=4, **{"target_modules": TARGETS, **options})
        adapted = get_peft_model(model, config)
        stir(adapted)
        adapted.save_pretrained(folder, save_embedding_layers=save)
        return folder, adapted.eval()

    return make


@pytest.fixture(scope="session")
def tied(architecture: Callable[[str], Path]) -> Path:
    return architecture("qwen2")


def edit(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---------------------------------------------------------------- merged numbers

IDS = torch.tensor([[5, 9, 12, 7, 20, 31, 8]])
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no task type": {"task_type": None},
    "rank-stabilised": {"use_rslora": True},
    "dora": {"use_dora": True},
    "ranks by pattern": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    "biases": {"bias": "all"},
    "embeddings saved whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "input embeddings saved whole": {"modules_to_save": ["embed_tokens"]},
    "adapted embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "adapted head": {"target_modules": ["q_proj", "lm_head"]},
    "modules by a pattern": {"target_modules": r".*\.1\.self_attn\.(q|v)_proj"},
    "principal values": {"init_lora_weights": "pissa"},
    "parameters": {"target_parameters": ["mlp.up_proj.weight"]},
    "norms saved whole": {"modules_to_save": ["norm", "input_layernorm"]},
    "single tokens": {"trainable_token_indices": {"embed_tokens": [3, 9]}},
    "grown, embeddings saved whole": {
        "new_tokens": 3, "modules_to_save": ["embed_tokens", "lm_head"],
    },
    "grown, embeddings beside": {"new_tokens": 3, "save_embedding_layers": True},
    "grown, adapted embeddings": {"new_tokens": 3, "target_modules": ["q_proj", "embed_tokens"]},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", ["tiny_chat", "tied"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_merged_weights_are_those_of_peft(
    base: str, kind: str, adapter: Make, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    options = dict(KINDS[kind])
    folder, trained = adapter(request.getfixturevalue(base), **options)
    ids = IDS
    if options.get("new_tokens"):
        ids = torch.cat([IDS, torch.tensor([[trained.config.vocab_size - 1]])], dim=1)
    want = trained(input_ids=ids).logits
    policy = load_policy(str(folder), device=CPU, precision="fp32")
    assert all(p.requires_grad for p in policy.parameters())
    tokenizer = load_tokenizer(str(folder))
    policy.save(tmp_path / "saved", tokenizer)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    got = again(input_ids=ids).logits
    assert got.shape == want.shape
    if kind == "grown, adapted embeddings" and base == "tiny_chat":
        # peft does not save the new rows of a head of its own
        got, want = got[..., :-3], want[..., :-3]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_new_tokens_whose_embeddings_were_not_saved_are_said(
    adapter: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = adapter(new_tokens=3, save_embedding_layers=False)
    policy = load_policy(str(folder), device=CPU, precision="fp32")
    assert policy.inner.config.vocab_size == 87 + 3
    assert "3 tokens of its tokenizer have no embedding" in "".join(capsys.readouterr())


def test_a_new_adapter_goes_on_top(adapter: Make) -> None:
    folder, _ = adapter()
    policy = load_policy(str(folder), device=CPU, precision="fp32", lora=LoraOptions(r=2))
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)


def test_an_adapter_on_an_adapter(adapter: Make, tmp_path: Path) -> None:
    first, trained = adapter()
    shutil.copytree(first, tmp_path / "first")
    edit(first, base_model_name_or_path=str(tmp_path / "first"))
    config = trained.peft_config["default"]
    merged = trained.merge_and_unload()
    again = get_peft_model(merged, config)
    saved = load_file(first / "adapter_model.safetensors")
    again.load_state_dict(
        {k.replace(".weight", ".default.weight"): v for k, v in saved.items()}, strict=False
    )
    want = again.eval()(input_ids=IDS).logits
    model = load_causal_lm(str(first), load_tokenizer(str(first)))
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model.eval()(input_ids=IDS).logits, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("held", ["lm_head", "embed_tokens"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_tied_embeddings_that_an_adapter_leaves_as_they_were_are_saved_whole(
    held: str, tied: Path, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float32)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], modules_to_save=[held]
    )
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    policy = load_policy(str(tmp_path / "adapter"), device=CPU, precision="fp32")
    policy.save(tmp_path / "saved", load_tokenizer(str(tied)))
    again, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    plain = AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float32)
    torch.testing.assert_close(again(input_ids=IDS).logits, plain(input_ids=IDS).logits)


# ---------------------------------------------------------------- one-label heads


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_the_adapter_of_a_reward_model_brings_its_head(adapter: Make) -> None:
    folder, trained = adapter(head=True, modules_to_save=["score"])
    for required in (True, False):
        scalar = load_scalar_model(
            str(folder), device=CPU, precision="fp32", head_required=required
        )
        assert not scalar.fresh_head
        want = trained.base_model.model.score.modules_to_save["default"].weight
        assert torch.equal(scalar.inner.score.weight, want)
    model, fresh = load_classifier(str(folder), load_tokenizer(str(folder)))
    model.set_attn_implementation("eager")
    got = model.eval()(input_ids=IDS).logits
    torch.testing.assert_close(got, trained(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)
    assert not fresh


def test_the_adapter_of_a_language_model_starts_a_reward_model(adapter: Make) -> None:
    folder, trained = adapter()
    scalar = load_scalar_model(str(folder), device=CPU, precision="fp32")
    assert scalar.fresh_head
    merged = trained.merge_and_unload()
    name = "layers.0.self_attn.q_proj.weight"
    got = scalar.backbone.get_parameter(name)
    torch.testing.assert_close(got, merged.model.get_parameter(name))


@pytest.mark.parametrize(
    ("options", "use", "match"),
    [
        ({}, "reward", r"is the adapter of a language model \(CAUSAL_LM\) without a score head"),
        ({"head": True}, "policy", r"is the adapter of a reward model \(SEQ_CLS\)"),
        ({"head": True, "num_labels": 3}, "reward", "has a head of 3 labels"),
        ({"head": True, "num_labels": 2}, "start", "has a head of 2 labels"),
        ({"task_type": "TOKEN_CLS"}, "policy", "is an adapter for TOKEN_CLS"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_an_adapter_of_another_kind(
    adapter: Make, options: dict[str, Any], use: str, match: str
) -> None:
    task = options.get("task_type")
    folder, _ = adapter(**{k: v for k, v in options.items() if k != "task_type"})
    if task:
        edit(folder, task_type=task)
    load: Any = load_policy
    if use != "policy":
        load = partial(load_scalar_model, head_required=use == "reward")
    with pytest.raises(AlignError, match=match):
        load(str(folder), device=CPU, precision="fp32")


def test_a_value_head_of_trl_is_not_passed_over(adapter: Make) -> None:
    folder, _ = adapter()
    save_file({"v_head.summary.weight": torch.ones(1, 32)}, folder / "value_head.safetensors")
    load_policy(str(folder), device=CPU, precision="fp32")
    with pytest.raises(AlignError, match=r"keeps its score head in a value_head file"):
        load_scalar_model(str(folder), device=CPU, precision="fp32")


# ---------------------------------------------------------------- a base elsewhere


def test_a_lost_base_is_named_with_the_key(adapter: Make, tiny_chat: Path) -> None:
    folder, trained = adapter()
    edit(folder, base_model_name_or_path="/home/somebody/base")
    with pytest.raises(AlignError) as caught:
        load_policy(str(folder), device=CPU, precision="fp32")
    assert "its base model /home/somebody/base is not on this machine" in str(caught.value)
    assert "base_model=FOLDER" in str(caught.value)
    policy = load_policy(str(folder), device=CPU, precision="fp32", base_model=str(tiny_chat))
    name = "model.layers.0.self_attn.q_proj.weight"
    want = trained.merge_and_unload().get_parameter(name)
    torch.testing.assert_close(policy.inner.get_parameter(name), want)


def test_a_relative_base_is_looked_for_here_and_above_the_adapter(
    adapter: Make, tiny_chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = adapter()
    shutil.copytree(tiny_chat, tmp_path / "models" / "base")
    edit(folder, base_model_name_or_path="models/base")
    found = find_adapter(str(folder))
    assert found is not None
    assert found.base == str(tmp_path / "models" / "base")
    (tmp_path / "here" / "models" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    found = find_adapter(str(folder))
    assert found is not None
    assert found.base == "models/base"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path, str], None]:
    """Put folders into a cache of the hub, which cannot be asked, each under its revision."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(cache))

    def put(name: str, folder: Path, revision: str = "main") -> None:
        home = cache / f"models--{name.replace('/', '--')}"
        commit = (revision.encode().hex() + "0" * 40)[:40]
        shutil.copytree(folder, home / "snapshots" / commit)
        (home / "refs").mkdir(exist_ok=True)
        (home / "refs" / revision).write_text(commit)

    return put


def test_a_base_and_an_adapter_on_the_hub(
    adapter: Make, tiny_chat: Path, tiny: Path, hub: Callable[..., None]
) -> None:
    folder, trained = adapter()
    hub("some/base", tiny, "main")
    hub("some/base", tiny_chat, "v2")
    edit(folder, base_model_name_or_path="some/base", revision="v2")
    hub("some/adapter", folder)
    name = "model.layers.0.self_attn.q_proj.weight"
    want = trained.merge_and_unload().get_parameter(name)
    for model in (str(folder), "some/adapter"):
        policy = load_policy(model, device=CPU, precision="fp32")
        torch.testing.assert_close(policy.inner.get_parameter(name), want)
        assert load_tokenizer(model).chat_template  # of revision v2


@pytest.mark.parametrize("name", ["org/base-bnb-4bit", "org/base-unsloth-bnb-4bit", "org/base-AWQ"])
def test_a_quantised_base_of_the_hub_names_the_full_one(
    adapter: Make, hub: Callable[..., None], name: str
) -> None:
    folder, _ = adapter()
    edit(folder, base_model_name_or_path=name)
    with pytest.raises(AlignError, match=rf"{name}.*base_model=.*such as org/base,"):
        load_policy(str(folder), device=CPU, precision="fp32")


def test_a_base_that_transformers_does_not_know(adapter: Make, tiny: Path, tmp_path: Path) -> None:
    folder, _ = adapter()
    shutil.copytree(tiny, tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "foonet"}')
    edit(folder, base_model_name_or_path=str(tmp_path / "base"))
    said = f"`foonet`.*is the base of the adapter {folder}: base_model=FOLDER"
    with pytest.raises(AlignError, match=said):
        find_config(str(folder))


def test_what_the_hub_is_asked_for(adapter: Make, tiny: Path) -> None:
    folder, _ = adapter()
    assert name_on_the_hub(str(folder)) is None
    assert name_on_the_hub(str(folder), base_model="org/base") == "org/base"
    assert name_on_the_hub("org/base") == "org/base"


def test_data_check_takes_the_base_that_it_asks_for(
    adapter: Make, tiny_chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = adapter()
    edit(folder, base_model_name_or_path="/not/here")
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": turns}) + "\n")
    command = ["data", "check", str(rows), "--model"]
    assert main([*command, str(folder)]) == 2
    assert "name the base with --base-model FOLDER" in capsys.readouterr().err
    assert main([*command, str(folder), "--base-model", str(tiny_chat)]) == 0
    capsys.readouterr()
    assert main([*command, str(tiny_chat), "--base-model", str(tiny_chat)]) == 2
    assert "--base-model: has no effect" in capsys.readouterr().err
    assert main(["data", "check", str(rows), "--trust-remote-code"]) == 2
    assert "--trust-remote-code: has no effect without --model" in capsys.readouterr().err


def test_an_adapter_that_is_its_own_base(adapter: Make, tmp_path: Path) -> None:
    folder, _ = adapter()
    shutil.copytree(folder, tmp_path / "other")
    edit(folder, base_model_name_or_path=str(tmp_path / "other"))
    edit(tmp_path / "other", base_model_name_or_path=str(folder))
    for one in (folder, tmp_path / "other"):
        with pytest.raises(AlignError, match="is this adapter itself; name the base with"):
            load_policy(str(one), device=CPU, precision="fp32")


# ---------------------------------------------------------------- refused in one line


def no_pickle(path: Path) -> None:
    raise AssertionError(path)


def _unpickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({}))


def _cut(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:900])


def _renamed(folder: Path) -> None:
    held = load_file(folder / "adapter_model.safetensors")
    held["base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"] = torch.ones(4, 32)
    save_file(held, folder / "adapter_model.safetensors")


def _lacking(folder: Path) -> None:
    held = load_file(folder / "adapter_model.safetensors")
    save_file(dict(list(held.items())[1:]), folder / "adapter_model.safetensors")


def _both(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    save_file({"a": torch.ones(1)}, folder / "model.safetensors")


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pickled": (_unpickled, r"only pickled weights \(adapter_model.bin\), which are never loaded"),
    "no weights": (
        lambda f: (f / "adapter_model.safetensors").unlink(),
        "but no adapter_model.safetensors",
    ),
    "cut short": (_cut, "adapter_model.safetensors is cut short or damaged"),
    "a tensor too many": (_renamed, "has base_model.*layers.7.* which does not fit"),
    "a tensor too few": (_lacking, "lacks base_model.* which does not fit"),
    "a list": (
        lambda f: (f / "adapter_config.json").write_text("[]"),
        "adapter_config.json: cannot be read: wanted a JSON object",
    ),
    "half a config": (
        lambda f: (f / "adapter_config.json").write_text('{"r": '),
        "adapter_config.json: cannot be read: not JSON",
    ),
    "no base": (
        lambda f: edit(f, base_model_name_or_path=None),
        "does not name its base model; name it with base_model=FOLDER",
    ),
    "a base that is a list": (
        lambda f: edit(f, base_model_name_or_path=["a"]),
        "does not name its base model",
    ),
    "a rank in words": (lambda f: edit(f, r="four"), "cannot be loaded: .*adapter_config.json"),
    "another rank": (lambda f: edit(f, r=8), "cannot be loaded: .*size mismatch"),
    "prompt tuning": (lambda f: edit(f, peft_type="PROMPT_TUNING"), "cannot be merged"),
    "an unknown tuner": (lambda f: edit(f, peft_type="BETTER_LORA"), "cannot be merged"),
    "megatron": (lambda f: edit(f, megatron_config={"a": 1}), "asks for Megatron modules"),
    "a base changed by chance": (
        lambda f: edit(f, init_lora_weights="pissa_niter_4"),
        "init_lora_weights=pissa_niter_4 changed its base",
    ),
    "more layers": (lambda f: edit(f, layer_replication=[[0, 2]]), "layer_replication makes a"),
    "a newer peft": (
        lambda f: edit(f, use_better_lora=True),
        "has use_better_lora, which the installed peft does not know",
    ),
    "layers that do not exist": (
        lambda f: edit(f, target_modules=["gone"]),
        "cannot be loaded: .*adapter_config.json",
    ),
    "a model beside it": (_both, r"holds a whole model \(model.safetensors\) and an adapter"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_one_line(kind: str, adapter: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "load", no_pickle)
    folder, _ = adapter()
    harm, match = DAMAGE[kind]
    harm(folder)
    with pytest.raises(AlignError, match=match) as caught:
        load_policy(str(folder), device=CPU, precision="fp32")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


def test_pickles_beside_the_weights_are_not_read(
    adapter: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a trainer's checkpoint has them."""
    monkeypatch.setattr(torch, "load", no_pickle)
    folder, _ = adapter()
    for name in ("optimizer.pt", "rng_state.pth", "training_args.bin", "adapter_model.bin"):
        (folder / name).write_bytes(b"no pickle")
    load_policy(str(folder), device=CPU, precision="fp32")
