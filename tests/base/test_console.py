"""No command sends a terminal what a file, a model or a message of an error wrote for it."""

from __future__ import annotations

import ast
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from align.base.console import one_line, printable, reason_in_line, say
from align.base.progress import table
from align.cli import main

PACKAGE = Path(__file__).parents[2] / "align"
# colour, title, hyperlink, bell, C1's CSI, right-to-left override, delete, backspace
HOSTILE = "\x1b[31mred\x1b]0;title\x07\x1b]8;;http://x\x1b\\link\x9b31m\u202egnp.exe\x7f\b"
OBEYED = {"\x1b", "\x07", "\x9b", "\u202e", "\x7f", "\b", "\r", "\x00"}


def test_what_a_terminal_obeys_is_shown_as_text() -> None:
    assert printable("a\x1b[31mb\x9bc\u202ed\x07\r\x7f") == (
        r"a\u001b[31mb\u009bc\u202ed\u0007\u000d\u007f"
    )
    assert printable("\ud800") == r"\ud800"  # no stream can encode it
    for kept in ("tab\tand\nnewline", "naïve 日本語 🙂 👩\u200d🚀", "\u200fעברית", "[bold]"):
        assert printable(kept) == kept
    assert one_line(" two\n\nlines\r\nof\x85it\u2028all ") == "two lines of it all"


def test_json_stays_json(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"place": HOSTILE, "name": "\x85"}
    say(json.dumps(row, ensure_ascii=False))
    told = capsys.readouterr().out
    assert not OBEYED & set(told)
    assert json.loads(told) == row


def test_a_stream_that_knows_no_utf8_gets_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    say("été 🙂")
    assert raw.getvalue() == b"\\xe9t\\xe9 \\U0001f642\n"


def test_cells_of_a_table_stay_on_their_line() -> None:
    assert table([["name", "n"], ["a\nb", "\x1b[2J"]], title="t").count("\n") == 2


def calls_of_print(source: str) -> list[int]:
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and (
            ast.unparse(node.func) == "print"
            or ast.unparse(node.func).startswith(("sys.stdout.", "sys.stderr.write", "traceback.p"))
        )
        and ast.unparse(node.func) != "sys.stdout.fileno"
    ]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.name)
def test_everything_is_printed_in_one_place(path: Path) -> None:
    if path.name != "console.py":
        assert calls_of_print(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("source", ["print(1)", "sys.stdout.write(x)", "traceback.print_exc()"])
def test_the_gate_rejects(source: str) -> None:
    assert calls_of_print(source)


@pytest.fixture
def hostile_file(tmp_path: Path) -> Path:
    rows = [{"prompt": HOSTILE, "completion": f"{HOSTILE} {n}", HOSTILE: "extra"} for n in range(3)]
    path = tmp_path / "rows\x1b[31m\u202e[b].jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "command",
    [
        ["data", "check", "FILE"],
        ["data", "check", "FILE", "--json"],
        ["data", "check", "FILE", "--model", "TINY"],
        ["data", "convert", "FILE", "--to", "nothing\x1b[2J"],
        ["data", "trace", "FOLDER\x1b[2J"],
        ["doctor", "FOLDER\x1b[2J"],
        ["report", "FOLDER\x1b[2J"],
        ["sft\x1b[31m", "x"],
        ["sft", "no\x1b[31mrecipe"],
        ["sft", "tiny/sft", "\x1b[31mkey=1"],
        ["sft", "tiny/sft", "seed=\x1b[31m\u202e"],
        ["ls", "\x1b[31m"],
        ["--debug", "ls", "\x1b[31m"],
        ["label", "FILE", "--answers", "FOLDER\x1b[2J/none/a.sqlite"],
        ["check", "tiny/sft", "data=FILE"],
    ],
    ids=lambda command: " ".join(map(ascii, command))[:60],
)
def test_no_command_passes_it_on(
    command: list[str], hostile_file: Path, tmp_path: Path, tiny: Path, capsys: Any
) -> None:
    names = {"FILE": str(hostile_file), "FOLDER": str(tmp_path / "none"), "TINY": str(tiny)}
    for short, name in names.items():
        command = [argument.replace(short, name) for argument in command]
    try:
        main(command)
    except SystemExit:
        pass
    told = capsys.readouterr()
    assert told.out or told.err
    assert not OBEYED & set(told.out + told.err)
    if told.err and "--debug" not in command:
        assert len(told.err.strip().split("\n")) == len(told.err.split("align: ")) - 1


def test_the_message_of_another_library_is_one_short_line() -> None:
    assert reason_in_line(ValueError("two\n lines, \x1b[31mred")) == "two lines, \\u001b[31mred"
    assert reason_in_line(KeyError()) == "KeyError"
    long = reason_in_line(ValueError("begins " + "x" * 900 + " ends"))
    assert (long[:6], long[-4:]) == ("begins", "ends")
    assert len(long) <= 200
