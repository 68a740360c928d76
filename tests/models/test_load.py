from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from align.models import load_policy, load_scalar_model, load_tokenizer
from align.models.load import load_causal_lm, load_classifier, weights_hash
from align.types import AlignError

CPU = torch.device("cpu")


@pytest.fixture
def copy_of(tiny: Path, tmp_path: Path) -> Callable[[], Path]:
    return lambda: Path(shutil.copytree(tiny, tmp_path / "tiny"))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---------------------------------------------------------------- heads


def test_new_head_has_the_papers_spread(tiny: Path, tmp_path: Path) -> None:
    # N(0, 1/sqrt(512 + 1)) = N(0, .04415); transformers' own would be N(0, .02)
    tokenizer = load_tokenizer(str(tiny))
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=512,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=8,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    scalar = load_scalar_model(str(tmp_path), device=CPU, precision="fp32")
    assert scalar.fresh_head
    assert scalar.inner.score.weight.shape == (1, 512)
    assert scalar.inner.score.weight.std().item() == pytest.approx(0.04415, rel=0.1)
    assert scalar.inner.score.bias is None
    # the same seed gives the same head
    torch.manual_seed(0)
    again = load_scalar_model(str(tmp_path), device=CPU, precision="fp32")
    assert torch.equal(again.inner.score.weight, scalar.inner.score.weight)


def test_trained_head_is_kept(tiny: Path, tmp_path: Path) -> None:
    scalar = load_scalar_model(str(tiny), device=CPU, precision="fp32")
    scalar.save(tmp_path / "rm", load_tokenizer(str(tiny)))
    again = load_scalar_model(str(tmp_path / "rm"), device=CPU, precision="fp32")
    assert not again.fresh_head
    assert torch.equal(again.inner.score.weight, scalar.inner.score.weight)


def test_language_model_is_no_reward_model(tiny: Path) -> None:
    with pytest.raises(AlignError, match="no `score` head; train one with `align rm`"):
        load_scalar_model(str(tiny), device=CPU, precision="fp32", head_required=True)


# ---------------------------------------------------------------- tokenizers


def test_pad_token_is_never_eos(copy_of: Callable[[], Path]) -> None:
    folder = copy_of()
    edit_json(folder / "tokenizer_config.json", pad_token="</s>")
    assert AutoTokenizer.from_pretrained(folder).pad_token == "</s>"
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.pad_token == "<pad>"
    policy = load_policy(str(folder), device=CPU, precision="fp32")
    assert policy.inner.config.pad_token_id == tokenizer.pad_token_id
    assert policy.inner.generation_config.pad_token_id == tokenizer.pad_token_id


@pytest.fixture
def gpt2_like(tmp_path: Path) -> Path:
    """One special token, as GPT-2 has, and logits that all lie far below 0, as GPT-2's do."""
    raw = Tokenizer(BPE())
    trainer = BpeTrainer(special_tokens=["<|endoftext|>"], show_progress=False)
    raw.train_from_iterator(["red green blue"], trainer)
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=end, eos_token=end)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
        model.transformer.wte.weight.sub_(1.0)  # every logit is about -32
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_tokenizer_without_a_spare_token_gets_one(gpt2_like: Path) -> None:
    old = len(AutoTokenizer.from_pretrained(gpt2_like))
    tokenizer = load_tokenizer(str(gpt2_like))
    assert tokenizer.pad_token_id == old
    assert len(tokenizer) == old + 1
    policy = load_policy(str(gpt2_like), device=CPU, precision="fp32")
    assert policy.inner.config.pad_token_id == old
    logprobs = policy.logits(torch.ones(1, 32)).log_softmax(-1)[0]
    assert logprobs[old] < logprobs[:old].max()


def test_no_eos_is_one_line(copy_of: Callable[[], Path]) -> None:
    folder = copy_of()
    edit_json(folder / "tokenizer_config.json", eos_token=None)
    with pytest.raises(AlignError, match="has no EOS token"):
        load_tokenizer(str(folder))


def test_room_for_new_tokens_changes_no_other(copy_of: Callable[[], Path]) -> None:
    """Policy and reference are loaded apart: new rows must be the same, and take no probability."""
    folder = copy_of()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    old = len(tokenizer)
    tokenizer.add_tokens(["<new>", "<newer>"])
    tokenizer.save_pretrained(folder)
    first, second = (load_policy(str(folder), device=CPU, precision="fp32") for _ in range(2))
    for layer in ("get_input_embeddings", "get_output_embeddings"):
        rows, again = (getattr(p.inner, layer)().weight for p in (first, second))
        assert len(rows) == old + 2
        assert torch.equal(rows, again)
        want = rows[:old].mean(0).expand(2, -1)
        torch.testing.assert_close(rows[old:], want)
    assert first.inner.config.vocab_size == old + 2


# ---------------------------------------------------------------- weights


def test_weights_hash_is_of_the_weights(tiny: Path, copy_of: Callable[[], Path]) -> None:
    tokenizer = load_tokenizer(str(tiny))
    model, same = (load_causal_lm(str(f), tokenizer) for f in (tiny, copy_of()))
    want = weights_hash(model)
    assert len(want) == 64
    assert weights_hash(same) == want
    with torch.no_grad():
        next(same.parameters()).view(-1)[0] += 1e-6
    assert weights_hash(same) != want


def test_from_scratch_draws_by_the_seed(tiny: Path) -> None:
    def made(seed: int) -> str:
        torch.manual_seed(seed)
        policy = load_policy(str(tiny), device=CPU, precision="fp32", from_scratch=True)
        return weights_hash(policy.model)

    loaded = load_policy(str(tiny), device=CPU, precision="fp32")
    assert made(1) == made(1) != made(2)
    assert weights_hash(loaded.model) not in (made(1), made(2))


# ---------------------------------------------------------------- what is refused


def refuse(model: Path | str, match: str) -> None:
    with pytest.raises(AlignError, match=match) as caught:
        load_policy(str(model), device=CPU, precision="fp32")
    assert "\n" not in str(caught.value)


def test_misspelt_folder_names_the_nearest(copy_of: Callable[[], Path]) -> None:
    folder = copy_of()
    refuse(folder.parent / "tinny", f"no such folder; did you mean {folder}")


def test_a_misspelt_relative_folder_is_not_asked_of_the_hub(
    copy_of: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of()
    monkeypatch.chdir(folder.parent.parent)
    refuse(f"{folder.parent.name}/tinny", f"no such folder; did you mean {folder.parent.name}/")


def test_a_runs_folder_names_the_model_in_it(tmp_path: Path, tiny: Path) -> None:
    shutil.copytree(tiny, tmp_path / "run" / "model")
    with pytest.raises(AlignError, match=r"it is a run's folder: name .*run/model$"):
        load_tokenizer(str(tmp_path / "run"))


def test_reward_model_is_no_language_model(tiny: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tiny))
    classifier, _ = load_classifier(str(tiny), tokenizer)
    classifier.save_pretrained(tmp_path / "rm")
    with pytest.raises(AlignError, match=r"is a reward model \(\w+ForSequenceClassification\)"):
        load_causal_lm(str(tmp_path / "rm"), tokenizer)


def test_weights_of_which_a_part_is_missing(copy_of: Callable[[], Path]) -> None:
    folder = copy_of()
    weights = load_file(folder / "model.safetensors")
    gone = next(name for name in weights if "mlp" in name)
    del weights[gone]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    tokenizer = load_tokenizer(str(folder))
    for load in (load_causal_lm, load_classifier):
        with pytest.raises(AlignError, match=f"its files lack .*{gone}"):
            load(str(folder), tokenizer)


def test_weights_of_which_a_part_would_be_left_out(copy_of: Callable[[], Path]) -> None:
    folder = copy_of()
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # of old checkpoints
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    tokenizer = load_tokenizer(str(folder))
    load_causal_lm(str(folder), tokenizer)
    config = json.loads((folder / "config.json").read_text())
    last = config["num_hidden_layers"] - 1
    config["num_hidden_layers"] = last
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))
    for load in (load_causal_lm, load_classifier):
        with pytest.raises(AlignError, match=rf"files hold model\.layers\.{last}\..* left out"):
            load(str(folder), tokenizer)


def test_folder_without_a_model(tmp_path: Path) -> None:
    refuse(tmp_path, "no config.json")


def test_pickles_are_never_loaded(copy_of: Callable[[], Path]) -> None:
    folder = copy_of()
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    refuse(folder, "only pickled weights")


def test_half_a_weights_file(copy_of: Callable[[], Path]) -> None:
    folder = copy_of()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refuse(folder, "cannot be loaded")


def test_a_data_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text("{}")
    refuse(tmp_path / "pairs.jsonl", "a file, not a model")


def test_missing_gguf(tmp_path: Path) -> None:
    refuse(tmp_path / "model.gguf", "no such file")


def test_a_folder_of_models_names_them(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "runs" / "sft" / "model")
    with pytest.raises(AlignError, match=rf"holds no model; there are {tmp_path}/runs/sft/model$"):
        load_tokenizer(str(tmp_path / "runs"))
    with pytest.raises(AlignError, match=r"holds no model; it is a run's folder: name .*/model$"):
        load_tokenizer(str(tmp_path / "runs" / "sft"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(AlignError, match=r"holds no model; give another model: a folder, a hub id"):
        load_tokenizer(str(tmp_path / "empty"))
