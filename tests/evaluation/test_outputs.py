"""Somebody else's outputs: a file that cannot be read is one line that says what to give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.evaluation.outputs import read_outputs
from align.types import AlignError, PromptExample


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "theirs.jsonl"


def refusal(path: Path) -> str:
    with pytest.raises(AlignError) as caught:
        read_outputs(str(path), [])
    assert "Errno" not in str(caught.value)
    return str(caught.value)


def test_a_missing_file(path: Path) -> None:
    line = f"models: {path}: no such file; give JSONL rows " + '{"prompt": ..., "response": "..."}'
    assert refusal(path).startswith(line)
    path.with_name("their.jsonl").touch()
    assert f"no such file; did you mean {path.with_name('their.jsonl')}?; give" in refusal(path)


def test_a_file_in_another_encoding(path: Path) -> None:
    path.write_bytes(b'{"response": "\xff"}')
    assert refusal(path).endswith("not UTF-8 (invalid start byte); save it as UTF-8")


def test_responses_to_other_prompts_are_counted(path: Path, capsys: Any) -> None:
    rows = [{"prompt": p, "response": p.upper()} for p in ("a", "b", "c")]
    path.write_text("\n".join(map(json.dumps, rows)))
    examples = [PromptExample(id="1", prompt="b")]
    assert read_outputs(str(path), examples).responses == ["B"]
    assert "2 of 3 responses are to prompts that are not evaluated" in capsys.readouterr().err
    read_outputs(str(path), [PromptExample(id=p, prompt=p) for p in "abc"])
    assert not capsys.readouterr().err


def test_a_folder(path: Path) -> None:
    path.mkdir()
    assert refusal(path) == f"models: {path}: cannot be read: Is a directory"
