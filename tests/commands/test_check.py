"""``align check``: counts and bytes against numbers worked out by hand."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from align import cli
from align.commands import check as checking
from align.commands.check import check
from align.commands.check_memory import HOLES, largest_microbatch, training_bytes
from align.config.keys import DPOConfig, DPORecipe, GenerateRecipe, PPORecipe, SFTRecipe
from align.config.load import stage_of
from align.config.sections import (
    DataConfig,
    DataSource,
    GenerationOptions,
    LoraOptions,
    RewardTerm,
    TrainOptions,
)
from align.models.locate import looks_like_hub_id
from align.models.sizes import Size, count_parameters
from align.stages import recipe_classes
from align.types import AlignError

# embedding and head 2 x 256 x 64; a layer: q, k, v, o 4 x 64 x 64, gate, up, down 3 x 64 x 128,
# two norms of 64; a last norm of 64
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 256,
}
LAYER = 4 * 64 * 64 + 3 * 64 * 128 + 2 * 64
TRUNK = 256 * 64 + 3 * LAYER + 64


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder with a model whose weights are whole; check compares their names, and reads none."""
    monkeypatch.chdir(tmp_path)
    return save_config("models/small")


def save_config(folder: str, **options: Any) -> str:
    config = LlamaConfig(**SHAPE, **options)
    of_labels = "LlamaForSequenceClassification" in options.get("architectures", ())
    made = (LlamaForSequenceClassification if of_labels else LlamaForCausalLM)(config)
    made.save_pretrained(folder)
    LlamaConfig(**SHAPE, **options).save_pretrained(folder)  # which class it was is not said
    raw = Tokenizer(BPE({letter: i for i, letter in enumerate("abcp0123456789")}, []))
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>").save_pretrained(folder)
    return folder


def data(rows: int) -> tuple[DataSource, ...]:
    lines = [json.dumps({"prompt": f"p{i}", "completion": "c"}) for i in range(rows)]
    Path("rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return (DataSource(path="rows.jsonl"),)


def test_parameters_on_the_meta_device() -> None:
    config = LlamaConfig(**SHAPE)
    whole = TRUNK + 256 * 64
    assert count_parameters("model", config) == Size("model", whole, whole)
    assert count_parameters("reward", config, trained=False) == Size("reward", TRUNK + 64, 0)
    # r x (in + out) on q_proj of each of 3 layers
    lora = LoraOptions(r=4, target_modules=("q_proj",))
    assert count_parameters("model", config, lora=lora).trained == 3 * 4 * (64 + 64)
    # the score head is trained whole beside the adapters
    assert count_parameters("critic", config, lora=lora).trained == 3 * 4 * (64 + 64) + 64
    one = LoraOptions(r=4, target_modules=("q_proj",), top_layers=1)
    assert count_parameters("model", config, lora=one).trained == 4 * (64 + 64)


def test_bytes() -> None:
    # 10 trained x 16 bytes, 90 frozen x 4 or 2
    assert Size("model", 100, 10).gigabytes(4) == pytest.approx(520e-9)
    assert Size("model", 100, 10).gigabytes(2) == pytest.approx(340e-9)


def test_memory_of_a_microbatch_by_hand() -> None:
    config = LlamaConfig(**SHAPE)
    whole = SFTRecipe(model="m", output_dir="o", precision="fp32")
    # of each token, 64 wide: two norms with input and result, what follows them, queries, keys,
    # values and what attention gave; 10 keys for each of 4 heads; 4 x 128 of the MLP
    rows = {"gpu": False, "tokens_per_row": 10.0}
    block = 4 * (4 * 64 + 2 * 64 + 4 * 64 + 4 * 10 + 4 * 128)
    found = training_bytes(config, whole, 10, **rows)
    assert found["activations"] == 10 * 3 * block
    # 10 x 256 logits, twice more on the way, and the dense gradients of head and embedding
    assert found["logits"] == 3 * 10 * 256 * 4 + 2 * 256 * 64 * 4
    again = replace(whole, gradient_checkpointing=True)
    kept = 4 * 3 * 64 + block
    assert training_bytes(config, again, 10, **rows)["activations"] == 10 * kept
    adapted = replace(whole, lora=LoraOptions(top_layers=1))
    assert training_bytes(config, adapted, 10, **rows)["activations"] == 10 * (block - 4 * 2 * 64)
    # autocast: products in 2 bytes, and a copy for each of five linear layers behind norms in 4
    half = training_bytes(config, replace(whole, precision="bf16"), 10, **rows)
    in_bf16 = 4 * 4 * 64 + 2 * (5 * 64 + 4 * 64 + 4 * 10 + 4 * 128)
    assert half["activations"] == 10 * 3 * in_bf16
    linear = 64 * (4 * 64 + 3 * 128)
    assert half["weights in bf16"] == 2 * (3 * linear + 256 * 64)
    assert half["logits"] == (2 + 8) * 10 * 256 + 2 * 256 * 64 * 4


def test_memory_of_offloaded_activations_by_hand(model: str) -> None:
    """One layer's stay on the GPU, with the copies of its weights; the check says where the rest
    is."""
    config = LlamaConfig(**SHAPE)
    kept = SFTRecipe(model=model, output_dir="o", precision="bf16")
    moved = replace(kept, activation_offload=True)
    rows = {"gpu": True, "tokens_per_row": 10.0}
    before, after = (training_bytes(config, recipe, 10, **rows) for recipe in (kept, moved))
    assert before["activations"] == 3 * after["activations"] > 0
    linear, head = 64 * (4 * 64 + 3 * 128), 256 * 64
    assert before["weights in bf16"] == 2 * (3 * linear + head)
    assert after["weights in bf16"] == 2 * (linear + head)
    large = replace(kept, data=DataConfig(train=data(4000)), train=TrainOptions(minibatch=4000))
    said = "\n".join(check("sft", large))
    assert "offloaded" not in said
    where = "\n".join(check("sft", replace(large, activation_offload=True)))
    held = float(re.search(r"activations ([\d.]+)", said)[1])  # type: ignore[index]
    left = float(re.search(r"activations ([\d.]+)", where)[1])  # type: ignore[index]
    waiting = float(re.search(r"about ([\d.]+) GB of activations to the CPU", where)[1])  # type: ignore[index]
    assert waiting == pytest.approx(held - left, abs=0.011)
    assert waiting > 0


def test_on_a_cpu_holes_are_counted(model: str) -> None:
    recipe = SFTRecipe(
        model=model, output_dir="o", precision="fp32", data=DataConfig(train=data(40))
    )
    lines = "\n".join(check("sft", recipe))
    total = float(re.search(r"memory +about ([\d.]+) GB of the process", lines)[1])  # type: ignore[index]
    parts = re.search(r"by shapes: (.*)", lines)[1].split(", ")  # type: ignore[index]
    found = {name: float(size) for name, size in (part.rsplit(" ", 1) for part in parts)}
    assert found["holes"] == HOLES / 1e9
    assert total == pytest.approx(sum(found.values()), abs=0.03)


def test_a_small_minibatch_fills_no_microbatch() -> None:
    recipe = SFTRecipe(model="m", output_dir="o", train=TrainOptions(minibatch=4))
    assert largest_microbatch(recipe, None) == recipe.train.tokens_per_microbatch
    assert largest_microbatch(recipe, 25.0) == 100
    assert largest_microbatch(recipe, 1e6) == recipe.train.tokens_per_microbatch


def test_roles_on_the_actors_weights_are_counted_once(model: str) -> None:
    adapter = Path("runs/rm/model_adapter")
    adapter.mkdir(parents=True)
    save_config("runs/rm/model")
    text = json.dumps({"base_model_name_or_path": model, "task_type": "SEQ_CLS"})
    (adapter / "adapter_config.json").write_text(text)
    lora = LoraOptions(r=4, target_modules=("q_proj",))
    reward = (RewardTerm(model="runs/rm/model"),)
    recipe = PPORecipe(model=model, output_dir="o", reward=reward, lora=lora, precision="fp32")
    lines = lines_of("ppo", recipe)
    assert "shared with another role" in lines["critic"]
    assert "shared with another role" in lines["reward"]
    (adapter / "adapter_config.json").write_text(text.replace("SEQ_CLS", "CAUSAL_LM"))
    lines = lines_of("ppo", recipe)
    assert "shared with another role" not in lines["reward"]


def lines_of(command: str, recipe: object) -> dict[str, str]:
    return {line.split()[0]: line.split(maxsplit=1)[1] for line in check(command, recipe)}


def test_sft_counts_rows_and_steps(model: str) -> None:

    recipe = SFTRecipe(
        model=model,
        output_dir="o",
        data=DataConfig(train=data(100), test_fraction=0.2),
        train=TrainOptions(minibatch=16, epochs=2.0),
    )
    lines = lines_of("sft", recipe)
    assert lines["data.train"] == "rows.jsonl: 100 rows"
    # 80 rows x 2 epochs / 16
    assert lines["steps"].startswith("about 10 minibatches of 16")
    assert (
        lines["model"] == f"models/small: {TRUNK + 16384:,} parameters, {TRUNK + 16384:,} trained"
    )


def test_ppo_holds_four_models_and_with_lora_three(model: str) -> None:
    recipe = PPORecipe(model=model, output_dir="o", reward=(RewardTerm(model=model),))
    assert {"actor", "critic", "reference", "reward"} <= lines_of("ppo", recipe).keys()
    assert lines_of("ppo", recipe)["steps"].startswith("400 = 100 iterations x 4 epochs")
    lora = LoraOptions(target_modules=("q_proj",))
    shared = PPORecipe(model=model, output_dir="o", reward=(RewardTerm(metric="chrf"),), lora=lora)
    assert not {"reference", "reward"} & lines_of("ppo", shared).keys()


def test_dpo_holds_a_reference_only_online(model: str) -> None:
    online = DPORecipe(model=model, output_dir="o", dpo=DPOConfig(reference="online"))
    assert "reference" in lines_of("dpo", online)
    assert "reference" not in lines_of("dpo", DPORecipe(model=model, output_dir="o"))


def test_what_is_not_here_is_said_and_is_no_error(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "model: some-org/never-downloaded-8b\noutput_dir: o\ndata: some-org/some-data\n"
    Path("sft.yaml").write_text(text)
    assert cli.main(["check", "sft.yaml"]) == 0
    out, err = capsys.readouterr()
    assert "some-org/never-downloaded-8b is no folder here, nor in the hub's cache: the run" in out
    assert "some-org/some-data [train]: a hub data set; rows not counted" in out
    assert err == ""
    assert cli.main(["check", "sft.yaml", "model=runs/a/model", "data=runs/a/rowz.jsonl"]) == 0
    out = capsys.readouterr().out
    assert "runs/a/model is not there yet: a run makes it; sizes not estimated" in out
    assert "runs/a/rowz.jsonl: not there yet, nor is its folder" in out


GIVE = "give another model: a folder, a hub id (org/name) or a .gguf"


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("models/smal", "models/smal: no such folder; did you mean models/small?"),
        ("mistyped/local/path", f"mistyped/local/path: no such folder; {GIVE}"),
        ("./models/smal", "./models/smal: no such folder; did you mean models/small?"),
        ("model/small/x", "model/small/x: no such folder; did you mean models?"),
        ("small.gguf", f"small.gguf: no such file; {GIVE}"),
        # its run is done, and made no such folder
        ("models/small/model", f"models/small/model: no such folder; {GIVE}"),
    ],
)
def test_a_model_that_can_be_no_hub_id_has_to_be_there(
    model: str, capsys: pytest.CaptureFixture[str], name: str, line: str
) -> None:
    Path("sft.yaml").write_text(f"model: {name}\noutput_dir: o\ndata: some-org/some-data\n")
    assert cli.main(["check", "sft.yaml"]) == 2
    assert capsys.readouterr().err == f"align: model: {line}\n"


def test_a_model_that_its_run_has_yet_to_write_is_no_error(model: str) -> None:
    Path("runs/sft").mkdir(parents=True)
    Path("runs/sft/manifest.json").write_text("{}")
    recipe = SFTRecipe(model="runs/sft/model", output_dir="o")
    assert "is not there yet: a run makes it" in lines_of("sft", recipe)["model"]


def test_a_missing_file_in_a_folder_that_is_there_is_an_error(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    Path("sft.yaml").write_text(f"model: {model}\noutput_dir: o\ndata: rowz.jsonl\n")
    assert cli.main(["check", "sft.yaml"]) == 2
    err = capsys.readouterr().err
    assert err == "align: data: rowz.jsonl: no such file or folder; did you mean rows.jsonl?\n"


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("ppo", ["reward={function: math:sqrrt}"], "math has no function 'sqrrt'"),
        ("ppo", ["reward={function: math:sqrt}"], "math:sqrt': takes (x, /), "),
        ("ppo", ["output_dir=prompts.jsonl"], "output_dir: prompts.jsonl is a file"),
        ("dpo", ["dpo.loss_type=sigmiod"], "dpo.loss_type"),
        ("dpo", ["dpo.simpo_gamma=1"], "dpo.simpo_gamma: has an effect with loss_type=simpo"),
        ("dpo", ["dpo.loss_type=orpo", "dpo.reference=online"], "orpo has no reference"),
        ("dpo", ["dpo.loss_type=orpo", "dpo.beta=7"], "dpo.beta: orpo has no temperature"),
        ("dpo", ["data.loss_on=all"], "data.loss_on: is for sft only"),
        ("generate", ["gradient_checkpointing=true"], "gradient_checkpointing: has no effect"),
        ("generate", ["activation_offload=true"], "activation_offload: has no effect"),
        ("generate", ["trackers=[tensorboard]"], "trackers: has no effect in generate"),
        ("dpo", ["trackers=[foo]"], "trackers: 'foo': allowed are"),
        ("dpo", ["model=models/judge"], "models/judge is a reward model"),
        ("ppo", ["reward=models/judged"], "models/judged is a language model"),
        ("generate", ["reward={metric: chrf}"], "prompts.jsonl:1: references: missing"),
    ],
)
def test_what_the_run_would_refuse_is_refused(
    model: str,
    capsys: pytest.CaptureFixture[str],
    recipe: str,
    overrides: list[str],
    message: str,
) -> None:
    Path("prompts.jsonl").write_text('{"prompt": "a"}\n')
    Path("pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    data = "pairs.jsonl" if recipe == "dpo" else "prompts.jsonl"
    reward = "" if recipe == "dpo" else "reward: math:gcd\n"
    for name, kind in (("judge", "SequenceClassification"), ("judged", "CausalLM")):
        save_config(f"models/{name}", architectures=[f"LlamaFor{kind}"])
    text = f"model: {model}\noutput_dir: o\ndata: {data}\n{reward}"
    Path(f"{recipe}.yaml").write_text(text)
    assert cli.main(["check", f"{recipe}.yaml"]) == 0
    capsys.readouterr()
    assert cli.main(["check", f"{recipe}.yaml", *overrides]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_a_recipe_for_another_command_is_named(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"model: {model}\noutput_dir: o\ndata: x.jsonl\nkl: {{coef: 0.1}}\n"
    Path("mine.yaml").write_text(text)
    assert cli.main(["dpo", "mine.yaml"]) == 2
    assert capsys.readouterr().err == "align: mine.yaml: is a recipe for `align ppo`; run that\n"
    assert cli.main(["check", "dpo", "mine.yaml"]) == 2
    assert "run `align check mine.yaml --stage dpo`" in capsys.readouterr().err


def test_bad_rows_are_found_with_their_line(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    Path("sft.yaml").write_text(f"model: {model}\noutput_dir: o\ndata: bad.jsonl\n")
    assert cli.main(["check", "sft.yaml"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("align: bad.jsonl:2:")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "hub"),
    [
        ("gpt2", True),
        ("meta-llama/Llama-3.1-8B", True),
        ("runs/tiny/sft/model", False),
        ("runs/sft", False),
        ("./x", False),
        ("a.jsonl", False),
    ],
)
def test_hub_ids(name: str, hub: bool) -> None:
    assert looks_like_hub_id(name) is hub


STAGE_CLASSES = recipe_classes()
PLAIN = "model: m\noutput_dir: o\ndata: d.jsonl\noptim: {lr: 1.0e-5}\ntrain: {epochs: 1}\n"


@pytest.mark.parametrize(
    ("file", "text", "command"),
    [
        ("ppo.yaml", "", "ppo"),
        ("llama-8b_rm.yaml", "", "rm"),
        ("mine.yaml", "dpo: {beta: 1}", "dpo"),
        ("pairs.yaml", "pairs: {}", "generate"),
        ("mine.yaml", "models: {a: b}", "eval"),
        ("mine.yaml", PLAIN + "dpo: {beta: 1}", "dpo"),
        ("mine.yaml", PLAIN + "reward_model: {center_coef: 0.1}", "rm"),
        ("mine.yaml", PLAIN + "from_scratch: true", "sft"),
        ("mine.yaml", "model: m\noutput_dir: o\ndata: d\nreward: {metric: chrf}\nkl: {}", "ppo"),
        # a mistake leaves the stage that has all other keys: its own line then says what is wrong
        ("mine.yaml", PLAIN + "dpo: {bta: 1}", "dpo"),
        (
            "mine.yaml",
            "model: m\noutput_dir: o\ndata: d\nreward: {metric: chrf}\nkl: {cof: 1}",
            "ppo",
        ),
    ],
)
def test_the_stage_of_a_recipe(tmp_path: Path, file: str, text: str, command: str) -> None:
    path = tmp_path / file
    path.write_text(text if "output_dir" in text else f"output_dir: o\n{text}")
    assert stage_of(str(path), STAGE_CLASSES) == command


@pytest.mark.parametrize(
    ("text", "overrides", "said"),
    [
        (PLAIN, [], "its keys fit sft, rm and dpo; say --stage sft|rm|dpo"),
        (
            PLAIN + "optm: {lr: 1}",
            [],
            "optm: no such key; did you mean optim?; its other keys fit sft, rm and dpo: say "
            "--stage sft|rm|dpo",
        ),
        (PLAIN, ["train.epocs=2"], "train.epocs: no such key; did you mean train.epochs?; its o"),
        ("", [], "holds no key; a recipe has at least model, data and output_dir"),
        ("# nothing yet\n", [], "holds no key; a recipe has at least model, data and output_dir"),
    ],
)
def test_stages_that_cannot_be_told_apart_are_named(
    tmp_path: Path, text: str, overrides: list[str], said: str
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(AlignError) as caught:
        stage_of(str(path), STAGE_CLASSES, overrides)
    assert str(caught.value).startswith(f"{path}: {said}")


def test_an_override_may_tell_the_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(PLAIN)
    assert stage_of(str(path), STAGE_CLASSES, ["dpo.beta=0.2"]) == "dpo"
    assert cli.main(["check", str(path)]) == 2
    assert "its keys fit sft, rm and dpo; say --stage sft|rm|dpo" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"attention": "flash"}, "attention: flash needs a CUDA GPU"),
        ({"activation_offload": True}, "activation_offload: has no effect on a cpu"),
        ({}, None),
    ],
)
def test_what_this_machine_cannot_run_is_said(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], says: str | None
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = list(checking._only_elsewhere(SFTRecipe(model="m", output_dir="o", **change)))
    assert [line.startswith(says or "") for line in found] == ([True] if says else [])


def test_a_missing_engine_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    recipe = GenerateRecipe(model="m", output_dir="o", generation=GenerationOptions(engine="vllm"))
    (line,) = checking._only_elsewhere(recipe)
    assert line.startswith("generation.engine: vllm is not installed")
