"""Folders that are replaced whole: failed renames, links, places that hold the user's files."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from align.base import files, folders
from align.base.folders import whole_folder
from align.models import gguf
from align.types import AlignError


def fill(folder: Path, content: str) -> None:
    with whole_folder(folder) as partial:
        (partial / "config.json").write_text(content)


@pytest.mark.parametrize("step", ["rename", "fsync"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_failed_rename_puts_back_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, number: int
) -> None:
    folder, calls = tmp_path / "model", []
    fill(folder, "1")
    fails = {"rename": os.replace, "fsync": files.fsync}[step]

    def failing(*args: Any) -> None:
        calls.append(args)
        if len(calls) == number:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fails(*args)

    with monkeypatch.context() as patch:
        patch.setattr(*((os, "replace") if step == "rename" else (files, "fsync")), failing)
        with pytest.raises(AlignError, match="Input/output error; what was there before is untou"):
            fill(folder, "2")
    assert (folder / "config.json").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_what_cannot_be_put_back_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, original = tmp_path / "model", os.replace
    fill(folder, "1")

    def failing(source: Path, place: Path) -> None:
        if Path(place) == folder:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        original(source, place)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(AlignError, match=r"what was there before is in .*\.model\.old: rename"):
            fill(folder, "2")
    assert (tmp_path / ".model.old" / "config.json").read_text() == "1"
    with pytest.raises(KeyError), whole_folder(folder):  # the next one begins with a restore
        raise KeyError
    assert (folder / "config.json").read_text() == "1"


def test_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    fill(tmp_path / "real", "1")
    (tmp_path / "link").symlink_to("real")
    fill(tmp_path / "link", "2")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "config.json").read_text() == "2"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]


class Saved:
    """Stands for a model or a tokenizer."""

    def save_pretrained(self, folder: str) -> None:
        (Path(folder) / "config.json").write_text("{}")


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "load_tokenizer", lambda *a: Saved())
    monkeypatch.setattr(gguf, "load_causal_lm", lambda *a: Saved())


@pytest.mark.parametrize("place", ["model", ".", "model/..", "model/m.gguf", "link"])
def test_a_conversion_deletes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    stubbed: None, place: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for name in ("m.gguf", "notes.txt"):
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / name).write_text("mine")
    (tmp_path / "link").symlink_to("model")
    monkeypatch.setattr("sys.argv", ["gguf", "model/m.gguf", place])
    assert gguf.main() == 2
    error = capsys.readouterr().err
    assert error.startswith(f"align: {place}: ")
    assert error.count("\n") == 1
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == [
        "link", "model", "model/m.gguf", "model/notes.txt",
    ]  # fmt: skip


def test_an_empty_working_folder_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AlignError, match="is the folder that you are in"):
        folders.require_no_folder(Path())


@pytest.mark.parametrize("there", [True, False])
def test_a_conversion_fills_a_new_or_an_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stubbed: None, there: bool
) -> None:
    if there:
        (tmp_path / "new").mkdir()
    monkeypatch.setattr("sys.argv", ["gguf", "m.gguf", str(tmp_path / "new")])
    assert gguf.main() == 0
    assert (tmp_path / "new" / "config.json").read_text() == "{}"
    assert [p.name for p in tmp_path.iterdir()] == ["new"]
