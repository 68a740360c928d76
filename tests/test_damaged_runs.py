"""Run folders that were damaged: what is wrong is named, and the newest whole checkpoint taken."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align.cli import main
from tools.trust import Trust

Align = Callable[..., str]


@pytest.fixture(scope="module")
def whole_run(
    tiny: Path, tmp_path_factory: pytest.TempPathFactory, demonstrations: list[dict[str, Any]]
) -> Path:
    """A run of four steps with a checkpoint of each, made as if it had been killed at the end."""
    folder = tmp_path_factory.mktemp("damaged")
    rows = folder / "sft.jsonl"
    rows.write_text("".join(json.dumps(r) + "\n" for r in demonstrations), encoding="utf-8")
    tree = {
        "model": str(tiny),
        "output_dir": str(folder / "run"),
        "precision": "fp32",
        "data": {"train": str(rows), "test_fraction": 0.2},
        "train": {"max_steps": 4, "minibatch": 8, "save_every": 1, "keep_checkpoints": 4},
        "optim": {"lr": 0.01},
    }
    (folder / "sft.yaml").write_text(json.dumps(tree), encoding="utf-8")
    assert main(["sft", str(folder / "sft.yaml")]) == 0
    manifest = json.loads((folder / "run" / "manifest.json").read_text())
    text = json.dumps({**manifest, "status": "running"})
    (folder / "run" / "manifest.json").write_text(text, encoding="utf-8")
    return folder / "run"


@pytest.fixture
def run(whole_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole_run / "model", tmp_path / "whole")
    folder = Path(shutil.copytree(whole_run, tmp_path / "run"))
    shutil.rmtree(folder / "model")
    return folder


@pytest.fixture
def resume(whole_run: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> Align:
    """Go on with the copy; what it said on stderr where it ends with ``code``."""

    def call(*, code: int = 0, other: Path | None = None) -> str:
        recipe = str(whole_run.parent / "sft.yaml")
        found = main(["sft", recipe, "resume=auto", f"output_dir={other or run}"])
        error = capsys.readouterr().err.strip()
        assert found == code, error
        assert "Traceback" not in error
        return error

    return call


def flip(path: Path, at: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    "file", ["model.safetensors", "model.optimizer.safetensors", "state.json", "SHA256SUMS"]
)
def test_a_flipped_bit_of_a_checkpoint(
    run: Path, resume: Align, file: str, assert_same_weights: Any, trust: Trust
) -> None:
    newest = run / "checkpoints" / "step-4"
    flip(newest / file, 0.9)
    error = resume()
    assert f"align: warning: resume: checkpoint {newest}: cannot be read: " in error
    assert "; kept as damaged-step-4, going on from step-3" in error
    assert error.count("\n") == 0
    assert_same_weights(run.parent / "whole", run / "model")
    trust.row(
        "faults", f"a flipped bit in a checkpoint's {file}",
        found="named; the one before goes on, equal bit for bit", wanted="no loss",
    )  # fmt: skip


def test_a_checkpoint_of_another_run(
    run: Path, resume: Align, tmp_path: Path, assert_same_weights: Any
) -> None:
    other = tmp_path / "other"
    resume(other=other)
    shutil.rmtree(run / "checkpoints" / "step-4")
    shutil.copytree(other / "checkpoints" / "step-4", run / "checkpoints" / "step-4")
    error = resume()
    assert f"checkpoint {run / 'checkpoints' / 'step-4'}: is of another run" in error
    assert "going on from step-3" in error
    assert_same_weights(tmp_path / "whole", run / "model")


@pytest.mark.parametrize("harm", ["shorter", "gone", "flipped"])
def test_metrics_that_are_not_what_they_were(run: Path, resume: Align, harm: str) -> None:
    path = run / "metrics.jsonl"
    if harm == "gone":
        path.unlink()
    elif harm == "shorter":
        os.truncate(path, 20)
    else:
        flip(path, 0.1)
    before = sorted(p.name for p in run.iterdir() if p.name != ".running")
    error = resume(code=2)
    assert error.startswith(f"align: resume: {path}: ")
    assert error.count("\n") == 0
    assert "restore it" in error
    assert sorted(p.name for p in run.iterdir() if p.name != ".running") == before
    assert (run / "checkpoints" / "step-4").is_dir(), "a whole checkpoint is not set aside for it"


def test_rows_behind_the_checkpoint_may_be_anything(
    run: Path, resume: Align, assert_same_weights: Any, read_jsonl: Any
) -> None:
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\xfe{"step": 1, "lo')
    assert resume() == ""
    assert [r["step"] for r in read_jsonl(run / "metrics.jsonl") if "loss" in r] == [1, 2, 3, 4]
    assert_same_weights(run.parent / "whole", run / "model")


def test_tensorboard_has_every_step_once(run: Path, resume: Align) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shutil.rmtree(run / "checkpoints" / "step-4")
    resume()
    (folder,) = {path.parent for path in (run / "tracking" / "align-sft").glob("events*")}
    found = EventAccumulator(str(folder))
    found.Reload()
    assert [event.step for event in found.Scalars("loss")] == [1, 2, 3, 4]
    starts = [e.step for p in sorted(folder.glob("events*")) for e in first_events(p)]
    assert starts == [0, 4], "each session says from which step on it replaces the one before"


def first_events(path: Path) -> list[Any]:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    return [e for e in EventFileLoader(str(path)).Load() if e.HasField("session_log")]


def flipped_seed(path: Path) -> None:
    text = path.read_text()
    assert '"seed": 0' in text
    path.write_text(text.replace('"seed": 0', '"seed": 1', 1))


MANIFESTS: dict[str, Callable[[Path], object]] = {
    "list": lambda p: p.write_text("[]"),
    "null": lambda p: p.write_text("null"),
    "not UTF-8": lambda p: p.write_bytes(b'{"stage": "\xff"}'),
    "empty": lambda p: p.write_text(""),
    "deep": lambda p: p.write_text("[" * 100_000),
    "cut": lambda p: p.write_text(p.read_text()[:-30]),
    "a changed digit": flipped_seed,
    "a folder": lambda p: (p.unlink(), p.mkdir()),
    "a broken link": lambda p: (p.unlink(), p.symlink_to("nowhere")),
    "a pipe": lambda p: (p.unlink(), os.mkfifo(p)),
    "recipe is a list": lambda p: p.write_text('{"stage": "sft", "recipe": []}'),
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_damaged_manifest_is_one_line_in_every_command(
    run: Path, resume: Align, kind: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = run / "manifest.json"
    MANIFESTS[kind](path)
    error = resume(code=2)
    assert f"{path}: " in error
    assert "start anew with overwrite=true" in error
    for argv in (
        ["report", str(run), "--output", str(tmp_path / "a.html")],
        ["report", str(run), "--follow"],
        ["doctor", str(run)],
        ["data", "trace", str(run), "--step", "1"],
    ):
        assert main(argv) == 2, argv
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        assert f"{path}" in error, argv
        assert "internal error" not in error
    assert not (tmp_path / "a.html").exists()


@pytest.mark.parametrize("kind", [k for k in MANIFESTS if k not in ("empty", "a changed digit")])
def test_damaged_metrics_are_one_line_in_report_and_doctor(
    run: Path, kind: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = run / "metrics.jsonl"
    if kind in ("cut", "recipe is a list"):
        path.write_text('{"step": "one"}\n')
    elif kind in ("list", "null", "deep"):
        path.write_text({"list": "[]\n", "null": "null\n", "deep": "[" * 100_000 + "\n"}[kind])
    else:
        MANIFESTS[kind](path)
    for argv in (["report", str(run), "--output", str(tmp_path / "a.html")], ["doctor", str(run)]):
        assert main(argv) == 2, argv
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        assert str(path) in error
        assert len(error) < 620
        assert "internal error" not in error


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("eval.json", '{"models": null}'),
        ("eval.json", '{"models": [{"name": 3}]}'),
        ("eval.json", '{"models": [{"name": "a", "kl": "far", "reward_mean": {}}]}'),
        ("eval.json", "NaN"),
        ("config.yaml", "- 1\n"),
        ("config.yaml", "a: [\n"),
        ("outputs/a.jsonl", "[]\n"),
        ("samples.jsonl", "7\n"),
    ],
)
def test_other_damaged_files_of_a_run_are_one_line_in_a_report(
    run: Path, name: str, text: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (run / "outputs").mkdir()
    (run / name).write_text(text)
    assert main(["report", str(run), "--output", str(tmp_path / "a.html")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(run) in error
    assert "internal error" not in error


def as_before(run: Path) -> None:
    """What an align left that knew no sums and no run ids."""
    for place in (run / "checkpoints").iterdir():
        (place / "SHA256SUMS").unlink()
        state = json.loads((place / "state.json").read_text())
        del state["run"], state["sha256"]
        (place / "state.json").write_text(json.dumps(state))
    manifest = json.loads((run / "manifest.json").read_text())
    del manifest["run"], manifest["checksum"]
    (run / "manifest.json").write_text(json.dumps(manifest))


def test_an_older_run_goes_on_and_says_that_it_could_not_be_verified(
    run: Path, resume: Align, assert_same_weights: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    as_before(run)
    shutil.rmtree(run / "checkpoints" / "step-4")
    assert main(["doctor", str(run)]) == 1  # it died
    capsys.readouterr()
    error = resume()
    assert "step-3: an older align saved it without checksums: not verified" in error
    assert error.count("\n") == 0
    assert_same_weights(run.parent / "whole", run / "model")
    state = json.loads((run / "checkpoints" / "step-4" / "state.json").read_text())
    assert state["run"] == json.loads((run / "manifest.json").read_text())["run"]


def test_a_checkpoint_with_a_flipped_bit_is_not_evaluated(
    run: Path, tmp_path: Path, write_rows: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    place = run / "checkpoints" / "step-2"
    prompts = write_rows("prompts.jsonl", [{"prompt": "one two: ", "references": ["red"]}])
    recipe = tmp_path / "eval.yaml"
    tree = {
        "models": {"two": str(place)},
        "output_dir": str(tmp_path / "eval"),
        "data": {"test": str(prompts)},
        "generation": {"max_new_tokens": 2},
    }
    recipe.write_text(json.dumps(tree))
    assert main(["eval", str(recipe)]) == 0, capsys.readouterr().err
    flip(place / "model.safetensors")
    assert main(["eval", str(recipe), "overwrite=true"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"models: {place / 'model.safetensors'}: cannot be read: " in error
    assert "its content has changed since it was saved (sha256)" in error
    (run / "config.yaml").write_text("- 1\n")
    assert main(["eval", str(recipe), "overwrite=true"]) == 2
    assert "wanted a mapping" in capsys.readouterr().err
