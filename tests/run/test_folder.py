from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from align.base import locks
from align.base.progress import change, duration
from align.run import files as run_files
from align.run.files import close, status_of
from align.run.folder import Run
from align.types import AlignError, SourceReport

ReadJsonl = Callable[[Path], list[dict[str, Any]]]


def open_run(folder: Path, *, config_yaml: str = "seed: 3\n", **options: Any) -> Run:
    """A run that has loaded what it needs and begins."""
    run = Run("sft", str(folder), config_yaml=config_yaml, seed=3, **options)
    if options.get("resume") != "auto":
        run.begin()
    return run


@contextmanager
def other_process_in(folder: Path) -> Iterator[int]:
    """Another process holds the folder as a run does, and is killed in the end; its number."""
    code = f"""
import pathlib, sys, time
from align.base import locks
assert locks.take(pathlib.Path({str(folder)!r})) is None
print("held", flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process.pid
    finally:
        process.kill()
        process.communicate()


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def test_manifest_says_what_was_run(tmp_path: Path) -> None:
    run = open_run(tmp_path / "a" / "run")
    run.describe(start_weights="abc")
    report = SourceReport(
        path="x.jsonl", sha256="f00", rows_read=3, rows_kept=2, dropped={"prompt: empty": 1}
    )
    run.describe_data(train=(report,))
    found = manifest(run.folder)
    assert found["stage"] == "sft"
    assert found["status"] == "running"
    assert found["seed"] == 3
    assert found["start_weights"] == "abc"
    assert found["data"]["train"][0]["sha256"] == "f00"
    assert found["data"]["train"][0]["dropped"] == {"prompt: empty": 1}
    assert {"python", "torch", "transformers"} <= found["versions"].keys()
    assert found["hardware"]["threads"] >= 1
    assert (run.folder / "config.yaml").read_text() == "seed: 3\n"
    run.finish([["held out", "after"], ["loss", "1.0"]], held_out={"loss": 1.0})
    found = manifest(run.folder)
    assert found["status"] == "done"
    assert found["seconds"] >= 0
    assert found["held_out"] == {"loss": 1.0}
    assert not list(run.folder.glob("*.tmp"))


def test_a_run_is_never_written_over_unasked(tmp_path: Path) -> None:
    open_run(tmp_path).log(1, {"loss": 2.0})
    with pytest.raises(AlignError, match=r"already holds a run; add resume=auto .* overwrite=true"):
        open_run(tmp_path)
    assert open_run(tmp_path, resume="auto").folder == tmp_path


def test_a_run_that_fails_before_it_begins_changes_nothing(tmp_path: Path) -> None:
    open_run(tmp_path).log(1, {"loss": 2.0})
    before = sorted(p.name for p in tmp_path.iterdir())
    Run("sft", str(tmp_path), config_yaml="seed: 4\n", seed=4, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert manifest(tmp_path)["seed"] == 3


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_run_never_writes_over_what_it_reads(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "pairs.jsonl").write_text("{}")
    for text in (
        f"model: {tmp_path}/model",
        f"data: {{train: [{{path: {tmp_path}/pairs.jsonl}}]}}",
    ):
        with pytest.raises(AlignError, match="which this run reads and would write over"):
            open_run(tmp_path, config_yaml=f"{text}\n", overwrite=overwrite)
    elsewhere = tmp_path / "run"
    assert open_run(elsewhere, config_yaml=f"model: {tmp_path}/model\n").folder == elsewhere


def test_a_done_run_without_checkpoints_is_not_started_over(tmp_path: Path) -> None:
    open_run(tmp_path).finish([["held out", "after"]])
    with pytest.raises(AlignError, match=r"is done, so there is nothing.*overwrite=true"):
        open_run(tmp_path, resume="auto").begin()


def test_rows_with_strange_line_ends_survive_a_resume(
    tmp_path: Path, read_jsonl: ReadJsonl
) -> None:
    run = open_run(tmp_path)
    run.append("samples.jsonl", [{"iteration": 1, "response": "a\u2028b\x85c"}])
    marks = run.marks()
    run.append("samples.jsonl", [{"iteration": 2, "response": "again"}])
    run.rewind(marks)
    text = (tmp_path / "samples.jsonl").read_text(encoding="utf-8")
    assert json.loads(text)["response"] == "a\u2028b\x85c"


@pytest.mark.parametrize("name", ["samples.jsonl", "model"])
@pytest.mark.parametrize("resume", ["never", "auto"])
def test_what_no_run_wrote_is_not_written_over(tmp_path: Path, name: str, resume: str) -> None:
    mine = tmp_path / name / "mine.txt" if name == "model" else tmp_path / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine\n")
    with pytest.raises(AlignError, match=rf"holds {name}, but no run"):
        open_run(tmp_path, resume=resume)
    assert mine.read_text() == "mine\n"
    open_run(tmp_path, overwrite=True).log(1, {"loss": 2.0})
    assert not mine.exists()


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    with other_process_in(tmp_path) as number, pytest.raises(AlignError) as refused:
        open_run(tmp_path)
    assert f"process {number} is running in it; wait for it" in str(refused.value)
    # that process was killed: its record is still there, its lock is not
    assert (tmp_path / ".running").exists()
    open_run(tmp_path).finish([["held out", "after"]])
    assert not (tmp_path / ".running").exists()


def test_a_broken_manifest_is_one_line(tmp_path: Path) -> None:
    open_run(tmp_path).log(1, {"loss": 2.0})
    (tmp_path / "manifest.json").write_text('{"stage": ')
    with pytest.raises(AlignError, match=r"manifest.json: cannot be read: .* overwrite=true"):
        open_run(tmp_path, resume="auto")


def test_overwrite_removes_what_a_run_writes_and_nothing_else(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    run.log(1, {"loss": 2.0})
    run.append("samples.jsonl", [{"a": 1}])
    (tmp_path / "checkpoints" / "step-1").mkdir(parents=True)
    (tmp_path / "model").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    open_run(tmp_path, overwrite=True)
    found = sorted(p.name for p in tmp_path.glob("[!.]*"))
    assert found == ["config.yaml", "manifest.json", "notes.txt"]


def failed(folder: Path) -> None:
    close(folder, "failed", AlignError("reward: no such function"))


def test_a_run_that_is_replaced_stays_until_the_new_one_has_numbers(tmp_path: Path) -> None:
    open_run(tmp_path).log(1, {"loss": 2.0})
    (tmp_path / "model").mkdir()
    open_run(tmp_path, overwrite=True, config_yaml="seed: 4\n")
    assert not (tmp_path / "model").exists()
    failed(tmp_path)
    assert (tmp_path / "model").is_dir()
    assert (tmp_path / "metrics.jsonl").is_file()
    assert (tmp_path / "config.yaml").read_text() == "seed: 3\n"
    # the same, but killed: the next run that replaces it knows which of the two to keep
    open_run(tmp_path, overwrite=True)
    open_run(tmp_path, overwrite=True)
    failed(tmp_path)
    assert (tmp_path / "model").is_dir()
    run = open_run(tmp_path, overwrite=True)
    run.log(0, {"eval_loss": 2.0})
    failed(tmp_path)
    assert not (tmp_path / "model").exists()
    assert not (tmp_path / ".replaced").exists()
    assert manifest(tmp_path)["status"] == "failed"
    assert manifest(tmp_path)["error"] == "reward: no such function"


def test_a_checkpoint_is_never_given_up_for_the_run_before(tmp_path: Path) -> None:
    open_run(tmp_path).log(1, {"loss": 2.0})
    run = open_run(tmp_path, overwrite=True)
    (tmp_path / "checkpoints" / "step-3").mkdir(parents=True)
    run.keep()
    failed(tmp_path)
    assert (tmp_path / "checkpoints" / "step-3").is_dir()


def test_a_crash_while_the_old_run_is_set_aside_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_run(tmp_path).log(1, {"loss": 2.0})
    (tmp_path / "model").mkdir()
    before = sorted(p.name for p in tmp_path.glob("[!.]*"))
    moved: list[str] = []

    def replace(source: Path, place: Path) -> None:
        if len(moved) == 2:
            raise KeyboardInterrupt
        moved.append(source.name)
        Path(source).rename(place)

    with monkeypatch.context() as patch:
        patch.setattr(run_files.os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            open_run(tmp_path, overwrite=True)
    assert len(moved) == 2
    failed(tmp_path)
    assert sorted(p.name for p in tmp_path.glob("[!.]*")) == before


def test_a_run_that_failed_before_it_made_anything_is_no_hindrance(tmp_path: Path) -> None:
    run = Run("ppo", str(tmp_path), config_yaml="seed: 3\n", seed=3)
    run.trace_rows(lambda: [("a.jsonl:1", 3)])
    run.begin()
    failed(tmp_path)
    assert manifest(tmp_path)["status"] == "failed"
    open_run(tmp_path).log(1, {"loss": 2.0})
    failed(tmp_path)
    with pytest.raises(AlignError, match="already holds a run"):
        open_run(tmp_path)


def test_a_run_that_cannot_be_resumed_does_not_say_that_it_can(tmp_path: Path) -> None:
    open_run(tmp_path).log(1, {"loss": 2.0})
    with pytest.raises(AlignError, match="already holds a run; add overwrite=true"):
        open_run(tmp_path, resumable=False)


def test_a_failure_is_noted_by_the_process_that_runs_only(tmp_path: Path) -> None:
    open_run(tmp_path).log(1, {"loss": 2.0})
    locks.release(tmp_path)
    with other_process_in(tmp_path):
        failed(tmp_path)
        assert status_of(tmp_path, manifest(tmp_path)) == "running"
    assert status_of(tmp_path, manifest(tmp_path)) == "died"


def test_a_file_in_the_way_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AlignError, match="output_dir: "):
        open_run(tmp_path / "file" / "run")


def test_resume_forgets_the_steps_it_does_again(tmp_path: Path, read_jsonl: ReadJsonl) -> None:
    run = open_run(tmp_path)
    run.log(1, {"loss": 1.0})
    run.log(2, {"loss": 2.0})
    marks = run.marks()
    run.log(2, {"eval_loss": 2.0})  # of the same step, behind the checkpoint
    run.log(3, {"loss": 3.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "lo')  # killed in the middle of a line
    run.rewind(marks)
    found = read_jsonl(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in found] == [(1, 1.0), (2, 2.0)]
    run.rewind({})
    assert read_jsonl(tmp_path / "metrics.jsonl") == []


def report(sha256: str) -> SourceReport:
    return SourceReport(path="x.jsonl", sha256=sha256, rows_read=1, rows_kept=1, dropped={})


@pytest.mark.parametrize("changed", [None, "sha256", "another file"])
def test_a_run_of_an_older_align_goes_on_that_reported_less(
    tmp_path: Path, changed: str | None
) -> None:
    """The fields that it wrote have to be the same, and no others."""
    config = "optim: {lr: 0.1}"
    run = open_run(tmp_path, config_yaml=config)
    run.describe_data(train=(report("f00"),))
    run.log(1, {"loss": 2.0})
    tree = {k: v for k, v in manifest(tmp_path).items() if k not in ("checksum", "run")}
    for name in ("unread", "first_dropped"):
        del tree["data"]["train"][0][name]
    (tmp_path / "manifest.json").write_text(json.dumps(tree))
    run = open_run(tmp_path, config_yaml=config, resume="auto")
    reports = [report("bad" if changed == "sha256" else "f00")]
    run.describe_data(train=reports + reports[: changed == "another file"])
    if changed is None:
        run.resume()
    else:
        with pytest.raises(AlignError, match="a data file has changed"):
            run.resume()


@pytest.mark.parametrize(
    ("config", "sha256", "weights", "match"),
    [
        ("optim: {lr: 0.2}", "f00", "abc", r"optim.lr was 0.1 and is now 0.2; restore it"),
        ("optim: {lr: 0.1, eps: 1}", "f00", "abc", r"optim.eps was not set and is now 1; restore"),
        ("optim: {lr: null}", "f00", "abc", r"optim.lr was 0.1 and is now null; restore it"),
        ("optim: {lr: 1e-1x}", "f00", "abc", r'optim.lr was 0.1 and is now "1e-1x"; restore it'),
        ("optim: null", "f00", "abc", r"optim.lr was 0.1 and is now not set; restore it"),
        ("optim: {lr: {a: 1, b: x}}", "f00", "abc", r'was 0.1 and is now {a: 1, b: "x"}; restore'),
        ("optim: {lr: 0.1}", "bad", "abc", "a data file has changed"),
        ("optim: {lr: 0.1}", "f00", "def", "other weights than when the run began"),
        ("{optim: {lr: 0.1}, train: {save_every: 5}, resume: auto}", "f00", "abc", None),
    ],
)
def test_only_the_same_run_goes_on(
    tmp_path: Path, config: str, sha256: str, weights: str, match: str | None
) -> None:
    def opened(config_yaml: str, sha256: str, weights: str, resume: str) -> Run:
        run = open_run(tmp_path, config_yaml=config_yaml, resume=resume)
        run.describe_data(train=(report(sha256),))
        run.describe(start_weights=weights)
        return run

    opened("optim: {lr: 0.1}", "f00", "abc", "never").log(1, {"loss": 2.0})
    before = manifest(tmp_path)
    run = opened(config, sha256, weights, "auto")
    # until it is known to be the same run, what the folder says of itself stays
    assert manifest(tmp_path) == before
    if match is not None:
        with pytest.raises(AlignError, match=match):
            run.resume()
        assert manifest(tmp_path) == before
        return
    run.resume()
    assert (tmp_path / "config.yaml").read_text() == config
    # without a checkpoint it starts anew, but not as another run
    with pytest.raises(AlignError, match=r"optim.lr was 0.1 and is now 0.2"):
        opened("optim: {lr: 0.2}", "f00", "abc", "auto").begin()
    other = Run("rm", str(tmp_path), config_yaml=config, seed=3, resume="auto")
    with pytest.raises(AlignError, match="holds a run of sft, not of rm"):
        other.begin()
    opened("optim: {lr: 0.1}", "f00", "abc", "auto").begin()
    assert manifest(tmp_path)["start_weights"] == "abc"


def test_a_run_of_an_earlier_version_goes_on_under_todays_keys(tmp_path: Path) -> None:
    """Version 0.1 had these keys of PPO outside the section `train`."""
    began = open_run(tmp_path, config_yaml="{keep_best: score, tokens_per_microbatch: 64, seed: 3}")
    began.begin()
    config = "{train: {keep_best: score, tokens_per_microbatch: 64}, seed: 3}"
    open_run(tmp_path, config_yaml=config, resume="auto").begin()
    assert manifest(tmp_path)["recipe"]["train.keep_best"] == "score"
    other = open_run(tmp_path, config_yaml=config.replace("64", "65"), resume="auto")
    with pytest.raises(AlignError, match=r"train.tokens_per_microbatch was 64 and is now 65"):
        other.begin()


def test_appended_rows_are_utf8_jsonl(tmp_path: Path, read_jsonl: ReadJsonl) -> None:
    run = open_run(tmp_path)
    run.append("samples.jsonl", [{"response": "Ünï\ncode"}])
    run.append("samples.jsonl", [{"response": "b"}])
    assert "Ünï" in (tmp_path / "samples.jsonl").read_text("utf-8")
    assert [r["response"] for r in read_jsonl(tmp_path / "samples.jsonl")] == ["Ünï\ncode", "b"]


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run", is_main=False)
    run.log(1, {"loss": 1.0})
    run.append("samples.jsonl", [{}])
    run.describe(x=1)
    run.finish([["a"]])
    assert not (tmp_path / "run").exists()


def test_closing_table() -> None:
    rows = change({"loss": 1.23456, "accuracy": 0.5}, {"loss": 1.0, "accuracy": 0.75})
    assert rows == [
        ["held out", "before", "after"],
        ["loss", "1.235", "1"],
        ["accuracy", "0.5", "0.75"],
    ]
    assert duration(3.24) == "3.2 s"
    assert duration(61.4) == "1 min 01 s"
