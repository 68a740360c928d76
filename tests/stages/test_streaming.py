"""Runs on streamed rows: the same as on rows that are all there, and as the run never cut short."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align.cli import main
from align.commands.check import check
from align.config.keys import DPORecipe, RewardRecipe, SFTRecipe
from align.data.readers.source_rows import SourceRows
from align.data.stream import RECENT, TokenStream, WindowReader
from align.stages import dpo, reward_model, sft
from align.training import loop
from align.types import AlignError

ReadJsonl = Callable[[Path], list[dict[str, Any]]]
Row = dict[str, Any]
RunStage = Callable[..., Path]
STAGES = {
    "sft": (sft, SFTRecipe),
    "rm": (reward_model, RewardRecipe),
    "dpo": (dpo, DPORecipe),
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def run_stage(
    tiny: Path,
    tmp_path: Path,
    make_recipe: Any,
    write_rows: Callable[..., Path],
    preferences: list[Row],
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> RunStage:
    """``run_stage("rm", "name", "key=value", ...)``: ten steps of 4 rows, in windows of 7."""
    monkeypatch.setattr(reward_model, "_plot_margins", lambda *_: None)
    path = write_rows("pairs.jsonl", preferences)
    data = {"train": str(path), "test_fraction": 0.2, "streaming": True, "streaming_window": 7}
    tree = {
        "model": str(tiny),
        "precision": "fp32",
        "train": {"max_steps": 10, "minibatch": 4},
        "optim": {"lr": 0.01},
        "trackers": [],
    }

    def run(stage: str, name: str, *overrides: str) -> Path:
        module, recipe = STAGES[stage]
        more = {"columns": {"completion": "chosen"}} if stage == "sft" else {}
        whole = {**tree, "data": {**data, **more}}
        whole |= {"dpo": {"reference": "online"}} if stage == "dpo" else {}
        folder = tmp_path / name
        module.run(make_recipe(recipe, whole, f"output_dir={folder}", *overrides))
        return folder

    return run


def manifest(folder: Path) -> Row:
    return json.loads((folder / "manifest.json").read_text())


def timeless(rows: list[Row]) -> list[Row]:
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo"])
def test_one_pass_as_given_is_the_run_that_reads_all(
    stage: str,
    run_stage: RunStage,
    assert_same_weights: Callable[..., None],
    read_jsonl: ReadJsonl,
    cache: Path,
) -> None:
    options = ("data.order=given", "train.max_steps=5", "data.max_test_rows=100")
    streamed = run_stage(stage, "streamed", *options, "data.streaming_window=1000")
    assert not cache.exists()  # nothing of it is on the disk
    assert not (streamed / "train_rows.tsv").exists()
    plain = ("data.streaming=false", "data.streaming_window=10000")
    whole = run_stage(stage, "whole", *options, *plain)
    if stage != "rm":  # whose head is scaled by scores on other pairs
        assert_same_weights(streamed / "model", whole / "model")
    first, second = (timeless(read_jsonl(f / "metrics.jsonl")) for f in (streamed, whole))
    for row in (*first, *second):
        row.pop("epoch", None)
    assert first == second
    assert manifest(streamed)["held_out"] == manifest(whole)["held_out"]
    for fact in ("train_rows", "train_tokens", "test_rows", "dropped_when_tokenised"):
        assert manifest(streamed)[fact] == manifest(whole)[fact]


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo"])
def test_a_resumed_run_is_the_whole_run(
    stage: str,
    run_stage: RunStage,
    stop_at: Callable[..., Any],
    assert_same_weights: Callable[..., None],
    read_jsonl: ReadJsonl,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The checkpoint lies in the second pass, in the middle of a window."""
    monkeypatch.setattr("align.data.stream.RECENT", 4)
    monkeypatch.setattr(reward_model, "REFERENCE_PAIRS", 4)
    options = ("train.save_every=4", "train.eval_every=4")
    whole = run_stage(stage, "whole", *options)
    with stop_at(loop.Trainer, "take_step", 10):
        run_stage(stage, "cut", *options)
    read: list[int] = []
    original = WindowReader.read
    monkeypatch.setattr(
        WindowReader,
        "read",
        lambda self, **options: (
            read.append(self.state_dict()["number"]) or original(self, **options)
        ),
    )
    resumed = run_stage(stage, "cut", *options, "resume=auto")
    assert 0 < len(read) < manifest(whole)["stream"]["windows"]
    assert_same_weights(whole / "model", resumed / "model")
    first, second = (timeless(read_jsonl(f / "metrics.jsonl")) for f in (whole, resumed))
    assert first == second
    assert [row["epoch"] for row in first if "epoch" in row][4:8] == [0, 1, 1, 1]
    for fact in ("held_out", "stream", "train_rows", "train_tokens", "data"):
        assert manifest(whole)[fact] == manifest(resumed)[fact]
    if stage == "rm":
        stats = [(f / "model" / "reward_stats.json").read_text() for f in (whole, resumed)]
        assert stats[0] == stats[1]


def test_the_manifest_says_what_was_read_and_dropped(
    run_stage: RunStage,
    write_rows: Callable[..., Path],
    preferences: list[Row],
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad = {"prompt": "x", "chosen": "", "rejected": "y"}
    long = {"prompt": "cat: ", "chosen": "sun " * 300, "rejected": "x"}
    path = write_rows("mixed.jsonl", [*preferences, bad, long])
    options = (f"data.train={path}", "data.test_fraction=0", "data.max_tokens=64")
    begun = run_stage("rm", "begun", *options, "train.max_steps=2", "data.on_bad_row=skip")
    found = manifest(begun)
    assert found["data"]["train"] == [{"path": str(path), "bytes": path.stat().st_size}]
    assert found["train_rows"] == 14  # two windows of 7
    assert found["stream"]["sources"][0]["rows_read"] == 14
    assert "begin again" not in capsys.readouterr().out
    twice = run_stage("rm", "twice", *options, "train.max_steps=16", "data.on_bad_row=skip")
    found = manifest(twice)
    assert found["train_rows"] == 30
    (source,) = found["stream"]["sources"]
    assert (source["rows_read"], source["rows_kept"]) == (32, 31)
    assert source["dropped"] == {"chosen: empty": 1}
    assert found["dropped_when_tokenised"]["train"] == {"longer than data.max_tokens": 1}
    # 7, 7, 7, 7, 2 rows, the same again, and 4 of 7 rows
    assert (found["stream"]["whole_passes"], found["stream"]["windows"]) == (2, 11)
    out = capsys.readouterr().out
    assert out.count("begin again") == 1
    assert "dropped 1 rows: chosen: empty" in out
    card = (twice / "model" / "README.md").read_text()
    assert f"| train | `{path}` | streamed |" in card
    with pytest.raises(AlignError, match=r"mixed.jsonl:31: chosen: empty"):
        run_stage("rm", "stopped", *options, "train.max_steps=16")


def test_rows_of_a_test_file_are_read_as_ever(
    run_stage: RunStage, write_rows: Callable[..., Path], preferences: list[Row], cache: Path
) -> None:
    path = write_rows("test.jsonl", preferences[:6])
    for name in ("first", "second"):
        found = manifest(run_stage("dpo", name, f"data.test={path}", "train.max_steps=9"))
        assert found["test_rows"] == found["data"]["test"][0]["rows_kept"] == 6
        assert len(found["data"]["test"][0]["sha256"]) == 64
        assert found["stream"]["held_out"] == 0
        assert found["train_rows"] == 30
    assert len(list((cache / "tokens").iterdir())) == 1


def test_a_margin_is_looked_for_in_the_first_window(
    run_stage: RunStage, write_rows: Callable[..., Path], preferences: list[Row]
) -> None:
    margins = "reward_model.use_margin=true"
    assert manifest(run_stage("rm", "with", margins))["status"] == "done"
    bare = [{k: v for k, v in row.items() if k != "margin"} for row in preferences]
    path = write_rows("bare.jsonl", bare)
    with pytest.raises(AlignError, match="no training pair has a margin"):
        run_stage("rm", "without", margins, f"data.train={path}")


def test_a_reward_is_normalised_on_the_newest_pairs(
    run_stage: RunStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest ones would have to be read again."""
    assert reward_model.REFERENCE_PAIRS <= RECENT
    scored: list[list[str]] = []
    trained: list[str] = []
    original, following = reward_model.scores_of, TokenStream.__next__

    def spying(scalar: Any, groups: Any, budget: int) -> Any:
        scored.append([group.id for group in groups])
        return original(scalar, groups, budget)

    def noting(self: TokenStream) -> Any:
        groups = following(self)
        trained.extend(group.id for group in groups)
        return groups

    monkeypatch.setattr(reward_model, "scores_of", spying)
    monkeypatch.setattr(reward_model, "REFERENCE_PAIRS", 6)
    monkeypatch.setattr(TokenStream, "__next__", noting)
    run_stage("rm", "run")
    assert len(trained) == 40
    assert scored[0] == trained[-6:]


def test_a_row_that_the_model_is_too_short_for_ends_the_run_at_its_window(
    run_stage: RunStage, write_rows: Callable[..., Path], preferences: list[Row], tmp_path: Path
) -> None:
    long = {"prompt": "cat: ", "chosen": "sun " * 300, "rejected": "x"}  # 256 positions
    path = write_rows("long.jsonl", [*preferences, long])
    options = (f"data.train={path}", "data.test_fraction=0")
    assert manifest(run_stage("rm", "short", *options, "train.max_steps=2"))["status"] == "done"
    with pytest.raises(AlignError, match="a training row has"):
        run_stage("rm", "long", *options)


@pytest.mark.parametrize(
    ("stage", "overrides", "message"),
    [
        ("sft", ["train.max_steps=null"], "train.max_steps: is missing"),
        ("sft", ["data.order=shortest_first"], "data.order: is shortest_first"),
        ("sft", ["data.max_train_rows=5"], "data.max_train_rows: cannot be picked"),
        ("sft", ["data.streaming=false"], "data.streaming_window: has an effect with"),
        ("dpo", ["dpo.reference=cached"], "dpo.reference: is cached, which needs all rows"),
    ],
)
def test_what_a_stream_cannot_do_is_one_line(
    stage: str, overrides: list[str], message: str, run_stage: RunStage, tmp_path: Path
) -> None:
    with pytest.raises(AlignError, match=message):
        run_stage(stage, "run", *overrides)
    assert not (tmp_path / "run").exists()


def test_a_loss_without_reference_needs_no_other_key(run_stage: RunStage) -> None:
    options = ("dpo.loss_type=orpo", "dpo.reference=cached", "train.max_steps=2")
    assert manifest(run_stage("dpo", "run", *options))["status"] == "done"


@pytest.mark.parametrize("command", ["ppo", "generate", "eval"])
def test_other_stages_refuse_it(
    command: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    recipe = tmp_path / "my.yaml"
    tree = {"model": str(tiny), "output_dir": str(tmp_path / "run"), "data": f"{tmp_path}/p.jsonl"}
    tree |= {"reward": {"metric": "chrf"}} if command == "ppo" else {}
    recipe.write_text(json.dumps(tree))
    assert main([command, str(recipe), "data.streaming=true"]) == 2
    error = capsys.readouterr().err
    assert "data.streaming: " in error
    assert error.count("\n") == 1


def test_check_reads_the_beginning_only(
    tiny: Path, write_rows: Callable[..., Path], make_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"prompt": "red ", "completion": "cat"}
    path = write_rows("many.jsonl", [row] * 2500)
    read: list[int] = []
    original = SourceRows.__next__
    monkeypatch.setattr(SourceRows, "__next__", lambda self: read.append(1) or original(self))
    tree = {"model": str(tiny), "output_dir": "o", "data": {"train": str(path), "streaming": True}}
    recipe = make_recipe(SFTRecipe, {**tree, "train": {"max_steps": 7}})
    lines = list(check("sft", recipe))
    assert len(read) == 2000
    (line,) = (line for line in lines if line.startswith("data.train"))
    assert "streamed; read here: 2,000 rows; what is behind them" in line
    assert any(line.split()[:2] == ["steps", "7"] for line in lines)


def test_a_streamed_run_is_reported_and_cannot_be_traced(
    run_stage: RunStage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_stage("sft", "run", "train.max_steps=2")
    assert main(["report", str(folder), "--output", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "pairs.jsonl</code> streamed" in page
    assert "rows streamed so far" in page
    capsys.readouterr()
    assert main(["data", "trace", str(folder)]) == 2
    assert "its rows were streamed (data.streaming=true)" in capsys.readouterr().err


def test_a_run_that_a_bad_row_ended_goes_on_without_it(
    run_stage: RunStage, write_rows: Callable[..., Path], preferences: list[Row]
) -> None:
    """What came before was trained on already, and is the same with bad rows left out."""
    path = write_rows("late.jsonl", preferences[:20])
    with path.open("a") as file:
        file.write("{\n" + "".join(json.dumps(row) + "\n" for row in preferences[20:]))
    common = (f"data.train={path}", "data.test_fraction=0", "train.save_every=1")
    with pytest.raises(AlignError, match=r"late.jsonl:21: "):
        run_stage("rm", "ended", *common, "data.on_bad_row=stop")
    with pytest.raises(AlignError, match="start anew"):
        run_stage("rm", "ended", *common, "data.on_bad_row=skip", "data.order=given", "resume=auto")
    ended = run_stage("rm", "ended", *common, "data.on_bad_row=skip", "resume=auto")
    whole = run_stage("rm", "whole", *common, "data.on_bad_row=skip")
    steps = [json.loads(line)["step"] for line in (ended / "metrics.jsonl").open()]
    assert steps == sorted(steps)
    files = [folder / "model" / "model.safetensors" for folder in (ended, whole)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert manifest(ended)["recipe"]["data.on_bad_row"] == "skip"
