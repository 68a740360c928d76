"""The Python API: objects in, a RunResult out, and the caller's process as it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import align
from align.config.keys import SFTRecipe
from align.stages import STAGES

ROOT = Path(__file__).parents[1]
Rows = list[dict[str, Any]]


def short(model: Path | str, folder: Path, **more: Any) -> dict[str, Any]:
    """Keys of a run of two steps."""
    keys = {"train": {"max_steps": 2, "minibatch": 8}, "optim": {"lr": 0.01}, "precision": "fp32"}
    return {"model": model, "output_dir": folder, "trackers": [], **keys, **more}


def brevity(prompts: Any, responses: list[str], references: Any) -> list[float]:
    return [-float(len(r)) for r in responses]


def test_import_is_fast() -> None:
    code = "import sys, align; sys.exit(bool({'torch', 'transformers', 'yaml'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_rows_and_a_file_of_them_train_the_same(
    tiny: Path,
    tmp_path: Path,
    demonstrations: Rows,
    write_rows: Callable[..., Path],
    assert_same_weights: Callable[[Path, Path], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    import datasets

    file = write_rows("d.jsonl", demonstrations)
    given = {"list": demonstrations, "set": datasets.Dataset.from_list(demonstrations)}
    # which rows are held out is decided by their prompts
    runs = {
        name: align.sft(short(tiny, tmp_path / name), data={"train": rows, "test_fraction": 0.2})
        for name, rows in {"file": file, **given}.items()
    }
    for name, run in runs.items():
        assert run.model == tmp_path / name / "model"
        assert run.held_out == runs["file"].held_out
        assert run.held_out["loss"] > 0
        assert [row["step"] for row in run.metrics if "loss" in row] == [1, 2]
        assert_same_weights(runs["file"].model, run.model)
    reports = [runs[name].manifest["data"]["train"][0] for name in given]
    assert [report["path"] for report in reports] == ["data.train"] * 2
    assert all(len(report["sha256"]) == 64 for report in reports)
    assert runs["list"].manifest["given"] == {"data.train": "list"}
    assert runs["list"].manifest["command"] == "align.sft() in Python"
    traced = (tmp_path / "list" / "train_rows.tsv").read_text().split("\t")[0]
    assert traced.startswith("data.train[")
    assert capsys.readouterr().err == ""
    with pytest.raises(FrozenInstanceError):
        runs["list"].model = None  # type: ignore[misc]


def test_a_model_object_trains_as_its_folder_does(
    tiny: Path,
    tmp_path: Path,
    demonstrations: Rows,
    assert_same_weights: Callable[[Path, Path], None],
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    named = align.sft(**short(tiny, tmp_path / "named"), data=demonstrations)
    keys = short(model, tmp_path / "object", data=demonstrations)
    run = align.sft(**keys, tokenizer=tokenizer)
    assert_same_weights(named.model, run.model)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    (saved,) = (tmp_path / "object" / "given").iterdir()
    assert run.manifest["recipe"]["model"] == str(saved)
    assert run.manifest["given"]["model"] == (
        f"LlamaForCausalLM, saved in given/{saved.name} and loaded from there"
    )
    # a run that is refused leaves nothing behind, and the folder's own model is kept
    with pytest.raises(align.AlignError, match="already holds a run"):
        align.sft(**{**keys, "model": AutoModelForCausalLM.from_pretrained(named.model)},
                  tokenizer=tokenizer)  # fmt: skip
    assert [*saved.parent.iterdir()] == [saved]
    other = align.sft(**{**keys, "model": AutoModelForCausalLM.from_pretrained(named.model)},
                      tokenizer=tokenizer, overwrite=True)  # fmt: skip
    assert [f"{path}" for path in saved.parent.iterdir()] == [other.manifest["recipe"]["model"]]


@pytest.mark.parametrize("name", ["given/mine/precious.txt", "given/notes.txt", "given"])
def test_what_the_user_has_put_there_is_never_removed(
    tiny: Path, tmp_path: Path, demonstrations: Rows, name: str
) -> None:
    mine = tmp_path / "run" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    keys = short(tiny, tmp_path / "run", data=demonstrations)
    held = "/".join(name.split("/")[:2])
    with pytest.raises(align.AlignError, match=rf"output_dir: .*run holds {held}, but no run"):
        align.sft(**keys)
    align.sft(**keys, overwrite=True)
    assert mine.read_text() == "mine"
    model, tokenizer = _objects(tiny)
    objects = {**keys, "model": model, "tokenizer": tokenizer, "overwrite": True}
    if name == "given":
        with pytest.raises(align.AlignError, match=r"^output_dir: .*given: File exists"):
            align.sft(**objects)
    else:
        align.sft(**objects)
        align.sft(**keys, overwrite=True)  # removes the model of the run that it replaces
        assert len([*(tmp_path / "run" / "given").iterdir()]) == 1
    assert mine.read_text() == "mine"


def test_a_model_that_the_recipe_names_is_kept(
    tiny: Path, tmp_path: Path, demonstrations: Rows
) -> None:
    model, tokenizer = _objects(tiny)
    folder = tmp_path / "run"
    first = align.sft(**short(model, folder, data=demonstrations), tokenizer=tokenizer)
    saved = Path(first.manifest["recipe"]["model"])
    alias = tmp_path / "alias"
    alias.symlink_to(saved)
    again = align.sft(folder / "config.yaml", data=demonstrations, overwrite=True)
    assert again.manifest["recipe"]["model"] == str(saved)
    assert again.manifest["given"]["model"] == first.manifest["given"]["model"]
    align.sft(**short(alias, folder, data=demonstrations, overwrite=True))
    assert (saved / "model.safetensors").is_file()
    align.sft(**short(tiny, folder, data=demonstrations, overwrite=True))
    assert not saved.parent.exists()


def test_a_model_is_saved_anew_when_anything_of_it_changes(tiny: Path) -> None:
    from align.stages.given import Given

    model, tokenizer = _objects(tiny)

    def key() -> str:
        with Given(tokenizer) as given:
            return str(dict(given.flat(SFTRecipe, {"model": model}))["model"])

    keys = [key()]
    tokenizer(["red", "red cat"], padding=True, truncation=True, max_length=4)
    assert key() == keys[0]  # nothing that is saved
    model.generation_config.eos_token_id = 5
    keys.append(key())
    tokenizer.eos_token = "."
    keys.append(key())
    tokenizer.padding_side = "left" if tokenizer.padding_side == "right" else "right"
    keys.append(key())
    tokenizer.add_special_tokens({"cls_token": "<s>"})
    keys.append(key())
    next(model.parameters()).data[0, 0] += 1
    keys.append(key())
    assert len(set(keys)) == len(keys)


def _objects(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


class _Odd:
    pass


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"trian": {}}, "arguments: trian: no such key; did you mean train?"),
        ({"train.max_stepz": 1}, "arguments: train.max_stepz: no such key; did you mean"),
        ({"optim": {"lr": "x"}}, "arguments: optim.lr: is 'x'; wanted a number"),
        ({"optim": {"lr": -1}}, "arguments: optim.lr: is -1.0; allowed: above 0"),
        ({"data": 3}, "data: is a int; wanted a path, a list of rows"),
        ({"data": []}, "data: is an empty list; wanted"),
        ({"data": np.zeros(2)}, "data: is a ndarray; wanted a path, a list of rows"),
        ({"data": {"train": _Odd()}}, "data.train: is a _Odd; wanted a path, a list"),
        ({"data": [{"prompt": "a", "completion": "b"}, 3]}, "data[1]: row: not a"),
        ({"data": [{"prompt": "a", "completion": ""}]}, "data[0]: completion: empty"),
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl: no such file or folder"),
        ({"optim": {"lr": np.ones(2)}}, "arguments: optim.lr: is [1.0, 1.0]; wanted"),
        ({"seed": _Odd()}, "seed: is a _Odd; wanted text, a number"),
        ({"model": "a\0b"}, "model: has a null character"),
        ({"data": {"train": {"path": "a\0b"}}}, "data.train.path: has a null character"),
        ({"tokenizer": object()}, "tokenizer: is for a model that is given as an object"),
        ({"model": "nowhere/at/all"}, "model: nowhere/at/all: no such folder"),
    ],
)
def test_what_is_wrong_is_an_exception_of_one_line(
    tiny: Path,
    tmp_path: Path,
    demonstrations: Rows,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    line: str,
) -> None:
    keys = {**short(tiny, tmp_path / "run", data=demonstrations), **change}
    with pytest.raises(align.AlignError) as caught:
        align.sft(None, **keys)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "run" / "given").exists()


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (lambda model: model.to("meta"), r"^model: the LlamaForCausalLM .* cannot be saved: "),
        (lambda model: _tie(model), r"^model: cannot be saved as .*/run/given/model-\w+: .*shared"),
        (lambda model: None, r"^model: the .* with its tokenizer \(object\) cannot be saved: "),
    ],
)
def test_a_model_that_cannot_be_saved_is_one_line(
    tiny: Path, tmp_path: Path, demonstrations: Rows, spoil: Callable[[Any], Any], line: str
) -> None:
    model, tokenizer = _objects(tiny)
    spoiled = spoil(model)
    keys = short(spoiled or model, tmp_path / "run", data=demonstrations)
    with pytest.raises(align.AlignError, match=line) as caught:
        align.sft(**keys, tokenizer=tokenizer if spoiled else object())
    assert "\n" not in str(caught.value)


def _tie(model: Any) -> Any:
    mlp = model.model.layers[0].mlp
    mlp.up_proj = mlp.gate_proj
    return model


def test_the_process_is_left_as_it_was(
    tiny: Path, tmp_path: Path, demonstrations: Rows, capsys: pytest.CaptureFixture[str]
) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from transformers.utils import logging

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGVTALRM)
    AcceleratorState._reset_state()
    Accelerator(mixed_precision="bf16")  # as another library of the same notebook has it
    logging.enable_progress_bar()

    def state() -> tuple[Any, ...]:
        return (
            [signal.getsignal(number) for number in numbers],
            threading.excepthook,
            os.environ.get("TOKENIZERS_PARALLELISM"),
            list(warnings.filters),
            AcceleratorState().mixed_precision,
            logging.is_progress_bar_enabled(),
            {thread.name for thread in threading.enumerate()} - {"tqdm_monitor"},
        )

    before = state()
    try:
        keys = short(tiny, tmp_path / "run", data=demonstrations, trackers=["tensorboard"])
        align.sft(**keys)
        assert state() == before
        with pytest.raises(align.AlignError):
            align.sft(**keys)
        assert state() == before
    finally:
        AcceleratorState._reset_state()
    events = (tmp_path / "run" / "tracking").rglob("events*")
    assert any(
        b"loss" in file.read_bytes() for file in events
    )  # written out, though the process goes on
    assert capsys.readouterr().err == ""


def test_a_reward_leaves_the_process_as_it_was(
    tiny_sft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from align.rewards.guard import EXITS
    from align.stages.api import VARIABLES

    monkeypatch.chdir(tmp_path)
    (tmp_path / "fixapi_rewards.py").write_text(
        "import os, sys, time\n"
        "seen = []\n"
        "def score(prompts, responses, references):\n"
        "    seen.append((os._exit, sys.path[-1], os.environ.get('THP_MEM_ALLOC_ENABLE')))\n"
        "    return [0.0] * len(responses)\n"
        "def hang(prompts, responses, references):\n"
        "    time.sleep(1)\n"
    )
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def state() -> tuple[Any, ...]:
        return [getattr(os, name) for name in EXITS], dict(os.environ), list(sys.path)

    from align.rewards.guard import put_back_exits

    put_back_exits()  # of other tests
    before = state()
    keys = {"model": tiny_sft, "data": [{"prompt": "red"}], "output_dir": tmp_path / "run"}
    keys |= {"generation": {"max_new_tokens": 2}, "precision": "fp32", "overwrite": True}
    align.generate(**keys, reward={"function": "fixapi_rewards:score"})
    assert state() == before
    (seen,) = sys.modules["fixapi_rewards"].seen
    assert seen[0] is not os._exit
    assert seen[1:] == (str(tmp_path), "1")
    hanging = {"function": "fixapi_rewards:hang", "timeout": 0.2}
    with pytest.raises(align.AlignError, match=r"no answer within 0.2 s"):
        align.generate(**keys, reward=hanging)
    assert os._exit is not before[0][0]  # the function might still exit
    assert state()[1:] == before[1:]
    time.sleep(1.2)
    put_back_exits()
    assert state() == before


def test_in_a_thread(tiny: Path, tmp_path: Path, demonstrations: Rows) -> None:
    found: list[align.RunResult] = []
    keys = short(tiny, tmp_path / "run", data=demonstrations)
    thread = threading.Thread(target=lambda: found.append(align.sft(**keys)))
    thread.start()
    thread.join()
    assert found[0].model is not None


def test_keys_change_a_recipe_as_the_command_line_does(tmp_path: Path) -> None:
    tree = {
        "model": "m",
        "output_dir": "o",
        "data": {"train": "a.jsonl", "test": "t.jsonl", "max_tokens": 64},
        "train": {"epochs": 3, "minibatch": 4},
    }
    path = tmp_path / "sft.yaml"
    path.write_text(json.dumps(tree))
    for recipe in (path, str(path), tree):
        for keys in ({"train": {"max_steps": 5}}, {"train.max_steps": 5}):
            got = align.load_recipe(recipe, stage="sft", lora={"r": 2}, **keys)
            assert (got.train.max_steps, got.train.minibatch, got.train.epochs) == (5, 4, 1.0)
            assert (got.lora.r, got.data.test[0].path) == (2, "t.jsonl")
    # a data set replaces the recipe's, its held-out rows with it
    got = align.load_recipe(path, data=[{"prompt": "a", "completion": "b"}])
    assert (got.data.train[0].path, got.data.test, got.data.max_tokens) == ("<data>", (), 64)
    assert align.load_recipe(got, stage="sft") == got
    sources = [
        path.parent / "x.jsonl",
        {"path": "y.jsonl", "weight": 0.5},
        {"path": [{"text": "z"}]},
    ]
    got = align.load_recipe(tree, stage="sft", data=sources)
    assert [s.path for s in got.data.train] == [
        f"{path.parent / 'x.jsonl'}",
        "y.jsonl",
        "<data[2]>",
    ]
    assert got.data.train[1].weight == 0.5
    assert isinstance(align.load_recipe("tiny/sft"), SFTRecipe)
    with pytest.raises(align.AlignError, match="is a SFTRecipe; `dpo` takes DPORecipe"):
        align.dpo(got)


def test_a_recipe_that_was_read_has_its_objects(
    tiny: Path,
    tmp_path: Path,
    demonstrations: Rows,
    assert_same_weights: Callable[[Path, Path], None],
) -> None:
    model, tokenizer = _objects(tiny)
    keys = short(model, tmp_path / "run", data=demonstrations)
    recipe = align.load_recipe(stage="sft", tokenizer=tokenizer, **keys)
    assert not (tmp_path / "run").exists()
    assert align.load_recipe(recipe, stage="sft") == recipe
    run = align.sft(recipe)
    assert run.manifest["recipe"]["model"] == recipe.model
    assert run.manifest["given"]["data"] == "list"
    changed = align.sft(recipe, data=demonstrations[:9], output_dir=tmp_path / "other")
    assert changed.manifest["data"]["train"][0]["rows_read"] == 9
    assert [*(tmp_path / "other" / "given").iterdir()]
    named = align.sft(recipe, model=tiny, output_dir=tmp_path / "named")
    assert_same_weights(run.model, named.model)
    assert not (tmp_path / "named" / "given").exists()
    assert changed.manifest["given"].keys() == {"model", "data (new)"}
    assert named.manifest["given"].keys() == {"data"}


def test_the_recipe_of_given_rows_says_so(
    tiny: Path, tmp_path: Path, demonstrations: Rows, capsys: pytest.CaptureFixture[str]
) -> None:
    from align.cli import main

    run = align.sft(**short(tiny, tmp_path / "run", data=demonstrations))
    (source,) = run.manifest["recipe"]["data.train"]
    assert source["path"] == "<data>"
    assert main(["sft", str(run.folder / "config.yaml"), "overwrite=true"]) == 2
    assert (
        "<data> names rows that a program held in memory; call it again with them"
        in capsys.readouterr().err
    )


def test_a_run_of_given_rows_is_resumed_with_the_same_rows_alone(
    tiny: Path, tmp_path: Path, demonstrations: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = short(tiny, tmp_path / "run", data=demonstrations, resume="auto")
    keys["train"] = {"max_steps": 4, "minibatch": 8, "save_every": 1}

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("align.stages.sft.save_policy", interrupt)
        with pytest.raises(KeyboardInterrupt):
            align.sft(**keys)
    with pytest.raises(align.AlignError, match=r"resume: .*run: a data file has changed"):
        align.sft(**{**keys, "data": demonstrations[::-1]})
    assert align.sft(**keys).manifest["status"] == "done"


def test_an_iterable_data_set_is_gone_through_once(
    tiny: Path, tmp_path: Path, demonstrations: Rows
) -> None:
    import datasets

    passes: list[int] = []

    def rows() -> Any:
        passes.append(1)
        yield from ({**row, "completion": "red" * len(passes)} for row in demonstrations)

    data = {"train": datasets.IterableDataset.from_generator(rows), "test_fraction": 0.2}
    run = align.sft(**short(tiny, tmp_path / "run", data=data))
    assert len(passes) == 1
    named = [{**row, "completion": "red"} for row in demonstrations]
    same = align.sft(**short(tiny, tmp_path / "same", data={"train": named, "test_fraction": 0.2}))
    assert run.held_out == same.held_out
    bad = datasets.IterableDataset.from_generator(_broken)
    with pytest.raises(align.AlignError, match=r"^data\[0\]: cannot be read: .*broken"):
        align.sft(**short(tiny, tmp_path / "bad", data=bad))


def _broken() -> Any:
    raise ValueError("broken\nsource")
    yield {}


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_rows_are_left_out_and_counted_by_reason(
    tiny: Path, tmp_path: Path, demonstrations: Rows, streaming: bool
) -> None:
    rows = [*demonstrations, {"prompt": "x", "completion": None}, {"prompt": "y", "completion": ""}]
    data = {"train": rows, "on_bad_row": "skip", "streaming": streaming}
    run = align.sft(**short(tiny, tmp_path / "run", data=data))
    report = run.manifest["stream" if streaming else "data"]["sources" if streaming else "train"][0]
    assert sum(report["dropped"].values()) == 2
    assert any("data.train[30]" in line for line in report["first_dropped"])


def test_rows_that_are_trained_on_are_not_held_out(
    tiny: Path, tmp_path: Path, demonstrations: Rows
) -> None:
    data = {"train": demonstrations, "test": [*demonstrations]}
    with pytest.raises(align.AlignError, match=r"data.test: .* training data too"):
        align.sft(**short(tiny, tmp_path / "run", data=data))


def test_every_stage_has_its_function(
    tiny: Path, tiny_sft: Path, tmp_path: Path, demonstrations: Rows, preferences: Rows
) -> None:
    rm = align.reward_model(**short(tiny, tmp_path / "rm", data=preferences))
    dpo = align.dpo(**short(tiny, tmp_path / "dpo", data=preferences))
    prompts = [{"prompt": r["prompt"], "references": [r["completion"]]} for r in demonstrations]
    sampled = {"model": tiny_sft, "data": prompts, "precision": "fp32"}
    generation = {"max_new_tokens": 6}
    ppo = align.ppo(
        **sampled,
        output_dir=tmp_path / "ppo",
        reward=[{"model": rm.model}, {"function": brevity, "weight": 0.1}, brevity],
        generation=generation,
        ppo={"iterations": 1, "rollout_batch": 4},
        trackers=(),
    )
    assert [term["function"] for term in ppo.manifest["recipe"]["reward"]] == (
        [None, f"{__name__}:brevity", f"{__name__}:brevity"]
    )
    assert len(ppo.samples) == 4
    made = align.generate(
        **sampled,
        output_dir=tmp_path / "pairs",
        reward={"metric": "chrf"},
        pairs={},
        generation={**generation, "samples_per_prompt": 3},
    )
    assert (len(made.samples), made.model) == (90, None)
    assert {"prompt", "chosen", "rejected"} <= made.pairs[0].keys()
    evaluated = align.evaluate(
        models={"dpo": dpo.model, "ppo": ppo.model},
        data=prompts[:5],
        output_dir=tmp_path / "eval",
        generation=generation,
        num_resamples=20,
        precision="fp32",
    )
    assert evaluated.held_out["ppo/chrf"] == evaluated.evaluation["models"][1]["chrf"]


def test_a_function_that_no_name_leads_to_is_refused(tiny: Path, tmp_path: Path) -> None:
    keys = {"model": tiny, "output_dir": tmp_path / "run", "data": [{"prompt": "a"}]}
    with pytest.raises(align.AlignError, match=r"reward: function <lambda> cannot be found again"):
        align.ppo(**keys, reward=lambda prompts, responses, references: [0.0])


def test_a_notebook_gets_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from align.base.progress import Progress

    assert Progress(3, "x")._bar.disable  # a log
    shell = SimpleNamespace(config={"IPKernelApp": {}})
    fake = SimpleNamespace(get_ipython=lambda: shell)
    monkeypatch.setitem(sys.modules, "IPython", fake)
    assert not Progress(3, "x")._bar.disable


def test_functions_and_stages_fit_each_other() -> None:
    from align.stages.api import FUNCTIONS

    functions = {FUNCTIONS.get(name, name) for name in STAGES}
    assert {name for name in functions if hasattr(align, name)} == functions - {"iterate"}
