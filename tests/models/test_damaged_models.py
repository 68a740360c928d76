"""Folders of models that are damaged, hostile, or disagree with themselves: one line for each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from align import cli
from align.models import load_policy, load_scalar_model, load_tokenizer
from align.models.guard import loading
from align.types import AlignError

CPU = torch.device("cpu")
INDEX = "model.safetensors.index.json"
Harm = Callable[[Path], Any]


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def config(**changes: Any) -> Harm:
    def harm(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return harm


def more_weights(*names: str, value: float = 1.0) -> Harm:
    """Further tensors of zeros or ones in the file of weights."""

    def harm(folder: Path) -> None:
        path = folder / "model.safetensors"
        weights = load_file(path)
        weights |= {name: torch.full((4,), value) for name in names}
        save_file(weights, path, metadata={"format": "pt"})

    return harm


BIASES = [f"model.layers.0.self_attn.{part}_proj.bias" for part in "qkvo"]


def text(name: str, content: str) -> Harm:
    return lambda folder: (folder / name).write_text(content)


def sharded(name: str) -> Harm:
    """An index that says that all tensors are in ``name``."""

    def harm(folder: Path) -> None:
        weights = folder / "model.safetensors"
        with safe_open(weights, "np") as file:
            keys = list(file.keys())
        weights.rename(folder / "shard.safetensors")
        (folder / INDEX).write_text(
            json.dumps({"metadata": {}, "weight_map": dict.fromkeys(keys, name)})
        )

    return harm


def linked(folder: Path) -> None:
    sharded("link.safetensors")(folder)
    shutil.move(folder / "shard.safetensors", folder.parent / "elsewhere.safetensors")
    (folder / "link.safetensors").symlink_to(folder.parent / "elsewhere.safetensors")


def cached(folder: Path) -> None:
    """The layout of the hub's cache: blobs that are named by their sums, and links to them."""
    sharded("shard.safetensors")(folder)
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(p for p in folder.iterdir() if p.is_file())):
        path.rename(blobs / f"{number:064x}")
        path.symlink_to(blobs / f"{number:064x}")


@pytest.mark.parametrize("link", [linked, cached])
def test_shards_may_be_links(folder: Path, link: Harm) -> None:
    link(folder)
    load_policy(str(folder), device=CPU, precision="fp32")


def vocabulary_of_numbers(folder: Path) -> None:
    path = folder / "tokenizer.json"
    held = json.loads(path.read_text())
    held["model"]["vocab"] = [1, 2]
    path.write_text(json.dumps(held))


HARM: dict[str, tuple[Harm, str]] = {
    "a list": (text("config.json", "[]"), "config.json: .*wanted a JSON object"),
    "empty": (text("config.json", ""), "config.json: .*empty"),
    "nested": (text("config.json", '{"a":' * 9999), "config.json: .*nested too deeply"),
    "a size in words": (config(hidden_size="32"), "config.json: .*hidden_size"),
    "no layers": (config(num_hidden_layers=0), "num_hidden_layers=0"),
    "a milliard layers": (config(num_hidden_layers=10**9), "num_hidden_layers=1000000000"),
    "no heads": (config(num_attention_heads=0), "config.json: .*zero"),
    "a huge vocabulary": (config(vocab_size=10**12), "model.safetensors|other sizes"),
    "a negative one": (config(vocab_size=-1), "config.json: .*negative"),
    "other sizes": (config(intermediate_size=48), "holds model.layers.*config.json|other sizes"),
    "unknown activation": (config(hidden_act="nope"), "config.json: KeyError 'nope'"),
    "unknown type": (
        config(model_type="nope"),
        r"config.json: .*`nope`; upgrade it \(`pip install --upgrade transformers`\), or take",
    ),
    "another head": (config(architectures=["BertForMaskedLM"]), "BertForMaskedLM, which has ano"),
    "quantised": (config(quantization_config={"quant_method": "gptq"}), r"quantised \(gptq\)"),
    "a file elsewhere": (
        config(transformers_weights="../other/model.safetensors"),
        "'../other/model.safetensors' as transformers_weights",
    ),
    "a pickle by name": (config(transformers_weights="x.bin"), "'x.bin' as transformers_weights"),
    "half a generation config": (
        text("generation_config.json", "{"), "generation_config.json: cannot be read: not JSON",
    ),
    "half a tokenizer": (text("tokenizer.json", "{"), "tokenizer.json: not JSON"),
    "an empty tokenizer": (text("tokenizer.json", "{}"), "tokenizer.json"),
    "a wrong tokenizer": (vocabulary_of_numbers, "tokenizer.json: "),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "holds no tokenizer|tokenizer"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights|model.safetensors"),
    "empty weights": (text("model.safetensors", ""), "model.safetensors is cut short or damaged"),
    "shards above": (sharded("../x.safetensors"), "'../x.safetensors', which is outside its fol"),
    "shards anywhere": (sharded("/etc/x.safetensors"), "'/etc/x.safetensors', which is outside"),
    "shards by a way round": (
        sharded("a/../../x.safetensors"), "'a/../../x.safetensors', which is outside its fol",
    ),
    "a link to nothing": (
        lambda f: (linked(f), (f.parent / "elsewhere.safetensors").unlink()),
        "'link.safetensors', which is not there",
    ),
    "shards of pickles": (sharded("pytorch_model.bin"), "'pytorch_model.bin', which is no safete"),
    "shards that are gone": (sharded("gone.safetensors"), "'gone.safetensors', which is not ther"),
    "no map": (
        lambda f: (sharded("a")(f), (f / INDEX).write_text('{"metadata": {}, "weight_map": []}')),
        "weight_map is not",
    ),
    "a layer too many": (
        more_weights("model.layers.99.mlp.up_proj.weight"),
        "hold model.layers.99.mlp.up_proj.weight, which would be .* mend num_hidden_layers",
    ),
    "biases switched off": (
        more_weights(*BIASES),
        "hold model.layers.0.self_attn.k_proj.bias and 3 more, .*attention_bias",
    ),
    "consolidated": (
        lambda f: (f / "model.safetensors").rename(f / "consolidated.00.pth"),
        r"only pickled weights \(consolidated.00.pth\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", HARM)
def test_run_and_check_refuse_in_one_line(
    kind: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "load", None)  # a pickle would be
    harm, match = HARM[kind]
    harm(folder)
    with pytest.raises(AlignError, match=match) as caught:
        load_policy(str(folder), device=CPU, precision="fp32")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700
    (tmp_path / "rows.jsonl").write_text('{"prompt": "red", "completion": "blue"}\n' * 20)
    (tmp_path / "sft.yaml").write_text(
        f"model: {folder}\noutput_dir: {tmp_path / 'run'}\ndata: {tmp_path / 'rows.jsonl'}\n"
    )
    assert cli.main(["check", str(tmp_path / "sft.yaml")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_biases_of_zeros_may_be_switched_off(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more_weights(*BIASES, value=0.0)(folder)
    load_policy(str(folder), device=CPU, precision="fp32")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "red", "completion": "blue"}\n' * 20)
    (tmp_path / "sft.yaml").write_text(
        f"model: {folder}\noutput_dir: {tmp_path / 'run'}\ndata: {tmp_path / 'rows.jsonl'}\n"
    )
    assert cli.main(["check", str(tmp_path / "sft.yaml")]) == 0, capsys.readouterr().err


def test_shards_in_their_folder_are_loaded(folder: Path) -> None:
    sharded("shard.safetensors")(folder)
    load_policy(str(folder), device=CPU, precision="fp32")


def test_the_hubs_cache_may_link_into_its_blobs(folder: Path, tmp_path: Path) -> None:
    sharded("shard.safetensors")(folder)
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "1"
    blobs.mkdir(parents=True)
    shutil.copytree(folder, snapshot)
    shutil.move(snapshot / "shard.safetensors", blobs / "a1")
    (snapshot / "shard.safetensors").symlink_to(Path("../../blobs/a1"))
    load_policy(str(snapshot), device=CPU, precision="fp32")


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
def test_kernels_that_a_config_names_are_not_fetched(
    key: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetched(*_: Any, **__: Any) -> None:
        raise AssertionError("a kernel was fetched")

    config(**{key: "org/kernel", "_experts_implementation": "org/experts"})(folder)
    for name in ("lazy_import_flash_attention", "is_kernel"):
        monkeypatch.setattr(f"transformers.modeling_utils.{name}", fetched_if_named(fetched))
    for load in (load_policy, load_scalar_model):
        load(str(folder), device=CPU, precision="fp32")
    load_policy(str(folder), device=CPU, precision="fp32", from_scratch=True)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "red", "completion": "blue"}\n' * 20)
    (tmp_path / "sft.yaml").write_text(
        f"model: {folder}\noutput_dir: {tmp_path / 'run'}\ndata: {tmp_path / 'rows.jsonl'}\n"
    )
    assert cli.main(["check", str(tmp_path / "sft.yaml")]) == 0


def fetched_if_named(fetched: Callable[..., None]) -> Callable[..., bool]:
    def asked(name: str | None = None, *_: Any, **__: Any) -> bool:
        if name and "/" in name:
            fetched()
        return False

    return asked


def test_sampling_keys_that_cannot_be_saved_do_not_end_a_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Vicuna's: transformers warns on reading it, and refuses to save it."""
    keys = {"temperature": 0.9, "top_p": 0.6, "eos_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps(keys))
    policy = load_policy(str(folder), device=CPU, precision="fp32")
    assert "temperature, top_p beside do_sample=false: removed" in "".join(capsys.readouterr())
    policy.save(tmp_path / "saved", load_tokenizer(str(folder)))
    assert json.loads((tmp_path / "saved" / "generation_config.json").read_text())["eos_token_id"]


def test_an_eos_that_is_no_id(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(AlignError, match=r"generation_config.json has eos_token_id='</s>'"):
        load_policy(str(folder), device=CPU, precision="fp32")


def test_classifiers_of_several_labels(folder: Path) -> None:
    config(architectures=["LlamaForSequenceClassification"], id2label={"0": "a", "1": "b"})(folder)
    with pytest.raises(AlignError, match="is a classifier of 2 labels"):
        load_scalar_model(str(folder), device=CPU, precision="fp32")


def test_a_panic_is_a_line_and_an_interrupt_is_not(tmp_path: Path) -> None:
    class PanicException(BaseException):
        pass

    with pytest.raises(AlignError, match="model: m: cannot be loaded: boom"), loading("m"):
        raise PanicException("boom")
    with pytest.raises(KeyboardInterrupt), loading("m"):
        raise KeyboardInterrupt
    with pytest.raises(AlignError) as caught, loading(str(tmp_path)):
        raise RuntimeError("x" * 9999)
    assert len(str(caught.value)) < 500
