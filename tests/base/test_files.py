"""Files read through one guard and written whole; disks that are full."""

from __future__ import annotations

import ast
import errno
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from align.base.console import LONGEST_ERROR, bounded
from align.base.files import (
    read_json,
    read_logged,
    read_metrics,
    read_yaml,
    reading,
    require_writable,
    write_whole,
    writing,
)
from align.base.folders import whole_folder
from align.cli import main
from align.types import AlignError


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda p: None, "no such file"),
    "folder": (lambda p: p.mkdir(), "Is a directory"),
    "pipe": (make_fifo, "a pipe or a device, not a file"),
    "device": (lambda p: p.symlink_to("/dev/zero"), "a pipe or a device, not a file"),
    "broken link": (lambda p: p.symlink_to("nowhere"), "a link to a missing file"),
    "link to itself": (lambda p: p.symlink_to(p), "symbolic links"),
    "empty": (lambda p: p.write_text(""), "empty"),
    "blank": (lambda p: p.write_text(" \n\n"), "empty"),
    "not UTF-8": (lambda p: p.write_bytes(b'{"a": "caf\xe9"}'), "byte 10: not UTF-8"),
    "UTF-16": (lambda p: p.write_text('{"a": 1}', encoding="utf-16"), "byte 0: not UTF-8"),
    "zeros": (lambda p: p.write_bytes(bytes(64)), "not JSON"),
    "cut short": (lambda p: p.write_text('{"stage": '), "not JSON"),
    "list": (lambda p: p.write_text("[1]"), "wanted a JSON object {...}, got a list"),
    "null": (lambda p: p.write_text("null"), "got null"),
    "NaN": (lambda p: p.write_text("NaN"), "got a number"),
    "text": (lambda p: p.write_text('"run"'), "got text"),
    "true": (lambda p: p.write_text("true"), "got a boolean"),
    "deep": (lambda p: p.write_text("[" * 100_000), "nested too deeply"),
    "digits": (lambda p: p.write_text(f'{{"a": {"9" * 5000}}}'), "not JSON"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_no_json_object_is_one_line_with_the_files_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "manifest.json"
    make, said = DAMAGE[kind]
    make(path)
    with pytest.raises(AlignError) as caught:
        read_json(path, "restore it")
    line = str(caught.value)
    assert line.startswith(f"{path}: cannot be read: ")
    assert said in line
    assert line.endswith("; restore it")


def test_a_forbidden_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_text("{}")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("the superuser may read everything")
    with pytest.raises(AlignError, match=r"manifest.json: cannot be read: Permission denied"):
        read_json(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a\n", "wanted a mapping `key: value`, got a list"),
        ("", "got null"),
        ("a: [1, 2\n", "not YAML: line 2: "),
        ("a: 2026-13-45\n", "month must be in"),
        ("[" * 5000, "nested too deeply"),
    ],
)
def test_what_is_no_yaml_mapping_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(AlignError) as caught:
        read_yaml(tmp_path / "config.yaml")
    assert said in str(caught.value)


def test_a_byte_order_mark_is_no_damage(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": 1}', encoding="utf-8-sig")
    assert read_json(tmp_path / "a.json") == {"a": 1}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[1, 2]", r"metrics.jsonl:2: wanted a JSON object {...}, got a list"),
        ("{", r"metrics.jsonl:2: not JSON"),
        ('{"step": 2, "loss": "low"}', r"row 2: loss: wanted a number, got text"),
        ('{"step": 2, "loss": null}', r"row 2: loss: wanted a number, got null"),
        ('{"loss": 1.0}', r"row 2: step: wanted a number, got nothing"),
        ('{"step": 2, "loss": ' + "9" * 400 + "}", r"row 2: loss: wanted a number"),
    ],
)
def test_a_damaged_row_of_metrics_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "loss": NaN}}\n{line}\n')
    with pytest.raises(AlignError) as caught:
        read_metrics(path)
    assert said in str(caught.value)


def test_rows_that_are_missing_or_cut_short_are_no_damage(tmp_path: Path) -> None:
    assert read_logged(tmp_path / "none.jsonl") == []
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": ')
    assert read_logged(tmp_path / "rows.jsonl") == [{"a": 1}]


def test_what_broken_content_raises_where_it_is_used_names_the_file() -> None:
    for use in (lambda: {}["models"], lambda: [][0], lambda: None.get("a"), lambda: 1 / 0):
        with pytest.raises(AlignError) as caught, reading("eval.json", "remove it"):
            use()
        assert str(caught.value).startswith("eval.json: cannot be read: ")
        assert str(caught.value).endswith("; remove it")


# ---------------------------------------------------------------- writing


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system refuses to make any file larger: what a full disk does, without filling one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    with files_of_at_most(1000), pytest.raises(AlignError) as caught:
        write_whole(path, ("x" * 100 for _ in range(100)))
    assert f"{path}: cannot be written: File too large; what was there before is untouched" in str(
        caught.value
    )
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_what_makes_the_pieces_may_fail_too(tmp_path: Path) -> None:
    def pieces() -> Iterator[str]:
        yield "half"
        raise KeyError("row")

    with pytest.raises(KeyError):
        write_whole(tmp_path / "pairs.jsonl", pieces())
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_says_what_is_needed_and_what_is_free(tmp_path: Path) -> None:
    with pytest.raises(AlignError) as caught, writing(tmp_path / "a" / "step-3", needs=3 * 10**9):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    line = str(caught.value)
    assert f"{tmp_path / 'a' / 'step-3'}: cannot be written: No space left on device" in line
    assert "(about 3 GB needed, " in line
    assert f"free in {tmp_path})" in line


def test_a_link_is_followed_and_the_mode_is_kept(tmp_path: Path) -> None:
    place = tmp_path / "real.txt"
    place.write_text("old")
    place.chmod(0o640)
    (tmp_path / "link.txt").symlink_to(place)
    write_whole(tmp_path / "link.txt", "new \ud800")
    assert (tmp_path / "link.txt").is_symlink()
    assert place.read_text() == "new \\ud800"
    assert place.stat().st_mode & 0o777 == 0o640


def test_a_file_of_the_same_stem_is_not_lost(tmp_path: Path) -> None:
    (tmp_path / "report.tmp").write_text("mine")
    write_whole(tmp_path / "report.html", "page")
    assert (tmp_path / "report.tmp").read_text() == "mine"


def test_a_new_file_replaces_none(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("mine")
    with pytest.raises(AlignError, match="exists already"):
        write_whole(path, "other", new=True)
    with pytest.raises(AlignError, match="exists already"):
        require_writable(path, new=True)
    assert path.read_text() == "mine"


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, said in (
        (tmp_path, "--output .*: is a folder; name a file in it"),
        (tmp_path / "none" / "a", "the folder .*none does not exist; make it first"),
        (tmp_path / "file" / "a", "the folder .*file is a file"),
        (Path("/proc/align/a"), "the folder /proc/align does not exist"),
        (tmp_path / ("n" * 300), "File name too long"),
    ):
        with pytest.raises(AlignError, match=said):
            require_writable(path, "--output")
    require_writable(Path("/dev/stdout"), "--output")
    require_writable(tmp_path / "file", "--output")


def test_a_folder_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with whole_folder(folder) as partial:
        (partial / "config.json").write_text("1")
    with files_of_at_most(1000), pytest.raises(AlignError) as caught, whole_folder(folder) as new:
        (new / "config.json").write_text("2" * 2000)
    assert f"{folder}: cannot be written: File too large" in str(caught.value)
    assert (folder / "config.json").read_text() == "1"
    with whole_folder(folder) as partial:
        (partial / "weights").write_text("3")
    assert [p.name for p in folder.iterdir()] == ["weights"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_device_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    (tmp_path / "out.jsonl").symlink_to("/dev/full")
    code = main(["data", "convert", str(rows), "--to", "messages", "-o", f"{tmp_path}/out.jsonl"])
    assert code == 2
    assert "out.jsonl: cannot be written: No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["data", "convert", "ROWS", "--to", "strings", "-o", "none/a.jsonl"], "-o none/a.jsonl"),
        (["data", "rank", "ROWS", "--pairs", "none/a.jsonl"], "--pairs none/a.jsonl"),
        (["label", "ROWS", "--answers", "a.db", "--export", "none/a.jsonl"], "--export none/a"),
        (["cp", "tiny/sft", "none/a.yaml"], "none/a.yaml"),
    ],
)
def test_commands_refuse_a_place_in_a_missing_folder_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    argv: list[str], said: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("no JSON\n")  # never read: the place is looked at first
    assert main([a.replace("ROWS", "rows.jsonl") for a in argv]) == 2
    error = capsys.readouterr().err
    assert error == f"align: {said}".rstrip() + error[len(f"align: {said}") :]
    assert "the folder none does not exist; make it first" in error


# ---------------------------------------------------------------- lines


def test_an_error_line_is_bounded_and_keeps_both_ends(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from align import cli

    def fail(args: object) -> None:
        raise AlignError("first.jsonl: " + "x\n\x1b[2J" * 50_000 + " restore it")

    monkeypatch.setattr(cli, "run_ls", fail)
    assert main(["ls"]) == 2
    error = capsys.readouterr().err
    assert len(error) <= LONGEST_ERROR + len("align: \n")
    assert error.startswith("align: first.jsonl: x ")
    assert error.endswith(" restore it\n")
    assert "\x1b" not in error
    assert error.count("\n") == 1
    assert bounded("a short line") == "a short line"
    assert len(bounded("y" * 601)) <= 600


def test_a_terminal_that_is_gone_does_not_end_a_run() -> None:
    """EIO is what a terminal gives that was closed."""
    code = """
import os, pty, sys
from align.base.console import say
from align.base.progress import warn
parent, child = pty.openpty()
os.dup2(child, 1); os.dup2(child, 2); os.close(child); os.close(parent)
say("a"); warn("b")
os._exit(7)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 7


def test_a_report_is_not_half_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "manifest.json").write_text(json.dumps({"stage": "sft", "status": "done"}))
    page = tmp_path / "report.html"
    page.write_text("old")
    with files_of_at_most(1000):
        assert main(["report", str(run), "--output", str(page)]) == 2
    assert "report.html: cannot be written: File too large" in capsys.readouterr().err
    assert page.read_text() == "old"


# ---------------------------------------------------------------- one place for both

PACKAGE = Path(__file__).parents[2] / "align"
ELSEWHERE = {
    # inside a folder that is renamed into its place as a whole
    "base/checksums.py": {"write_text"},
    "training/checkpoint.py": {"write_text"},
    "models/policy.py": {"write_text"},
    "models/lora.py": {"write_text"},
    "data/tokens/cache.py": {"write_text"},
    # the content of a locked file: another file would be another lock
    "base/locks.py": {"write_text"},
    # a stream of a number, and a temporary folder
    "data/readers/objects.py": {"open"},
    "rewards/guard.py": {"open"},
    "rollout/vllm.py": {"open"},
    # the helper itself, and rows at the end of a file
    "base/files.py": {"open"},
    "base/growing.py": {"open"},
}


def written(source: str) -> Iterator[str]:
    """Names of calls that write a file: a mode with w, a, x or +, `write_text`, `write_bytes`."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or "devnull" in ast.unparse(node):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
        given = [*node.args, *(keyword.value for keyword in node.keywords)]
        modes = [a.value for a in given if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        writes = any(re.fullmatch(r"[wax]b?\+?t?|rb?\+b?", mode) for mode in modes)
        if name in ("write_text", "write_bytes", "copyfile") or (name == "open" and writes):
            yield name


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.name)
def test_files_are_written_by_one_helper(path: Path) -> None:
    name = str(path.relative_to(PACKAGE))
    assert set(written(path.read_text(encoding="utf-8"))) <= ELSEWHERE.get(name, set())


def test_the_gate_rejects() -> None:
    for source in ("p.write_text('')", "open(p, 'w')", "p.open('ab')", "p.open(mode='x')"):
        assert list(written(source)), source
    assert not list(written("open(p); p.open('rb'); p.open(encoding='utf-8')"))
