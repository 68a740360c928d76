"""Bad input through the command line: one clear line, exit code 2, no traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from align.cli import main

GOOD = {"prompt": "one two", "chosen": "red cat", "rejected": "blue dog"}

Refused = Callable[..., str]


@pytest.fixture
def refused(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run ``align dpo`` (or another stage) and return the one line that it ends with."""

    def run(*overrides: str, stage: str = "dpo") -> str:
        recipe = tmp_path / "my.yaml"
        keys = {"model": str(tiny), "output_dir": str(tmp_path / "run")}
        recipe.write_text(json.dumps(keys), encoding="utf-8")
        code = main([stage, str(recipe), *overrides])
        error = capsys.readouterr().err.strip()
        assert code == 2, error
        assert "Traceback" not in error
        assert error.count("\n") == 0, f"more than one line: {error}"
        assert error.startswith("align: ")
        return error

    return run


def write(path: Path, lines: list[str]) -> str:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"data={path}"


def test_misspelt_key_names_the_right_one(refused: Refused) -> None:
    line = refused("dpo.betta=0.1")
    assert "dpo.betta" in line
    assert "dpo.beta" in line


def test_wrong_type(refused: Refused) -> None:
    assert "train.minibatch" in refused("train.minibatch=many")


def test_missing_file_names_the_nearest(refused: Refused, tmp_path: Path) -> None:
    write(tmp_path / "pairs.jsonl", [json.dumps(GOOD)])
    line = refused(f"data={tmp_path / 'pair.jsonl'}")
    assert "pair.jsonl" in line
    assert "pairs.jsonl" in line


def test_malformed_json_names_its_line(refused: Refused, tmp_path: Path) -> None:
    lines = [json.dumps(GOOD)] * 6 + ['{"prompt": "one", "chosen": '] + [json.dumps(GOOD)]
    assert "rows.jsonl:7" in refused(write(tmp_path / "rows.jsonl", lines))


def test_row_without_rejected(refused: Refused, tmp_path: Path) -> None:
    lines = [json.dumps(GOOD), json.dumps({"prompt": "one", "chosen": "two"})]
    line = refused(write(tmp_path / "rows.jsonl", lines))
    assert "rows.jsonl:2" in line
    assert "rejected" in line


@pytest.mark.parametrize("empty", ["", "  "])
def test_empty_response(refused: Refused, tmp_path: Path, empty: str) -> None:
    lines = [json.dumps(GOOD | {"chosen": empty})]
    line = refused(write(tmp_path / "rows.jsonl", lines))
    assert "rows.jsonl:1" in line
    assert "chosen" in line


def test_prompt_of_ten_thousand_tokens(refused: Refused, tmp_path: Path) -> None:
    lines = [json.dumps(GOOD), json.dumps(GOOD | {"prompt": "one " * 10_000})]
    line = refused(write(tmp_path / "rows.jsonl", lines))
    assert "rows.jsonl:2" in line
    assert "data.max_tokens" in line


def test_identical_answers(refused: Refused, tmp_path: Path) -> None:
    lines = [json.dumps(GOOD | {"rejected": GOOD["chosen"]})]
    assert "rows.jsonl:1" in refused(write(tmp_path / "rows.jsonl", lines))


def test_file_that_is_not_utf8(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"prompt": "caf\xe9"}\n')
    line = refused(f"data={path}")
    assert "rows.jsonl:2" in line
    assert "UTF-8" in line


def test_unknown_model_names_the_nearest(refused: Refused, tiny: Path) -> None:
    line = refused(f"model={tiny}y")
    assert f"{tiny}y" in line
    assert str(tiny) in line.replace(f"{tiny}y", "")


def test_folder_that_holds_a_run(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text("{}")
    assert "overwrite=true" in refused()


def test_no_data(refused: Refused) -> None:
    assert "data" in refused(stage="sft")


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["dpo.loss_type=sigmiod"], "dpo.loss_type"),
        (["dpo.loss_type=hinge", "dpo.label_smoothing=0.1"], "label_smoothing"),
        (["dpo.reference=adapter_off"], "lora"),
        (["dpo.beta=-1"], "beta"),
        (["lora.r=2", "lora.top_layers=9"], "lora.top_layers"),
    ],
)
def test_settings_that_contradict(
    refused: Refused, tmp_path: Path, overrides: list[str], named: str
) -> None:
    rows = write(tmp_path / "rows.jsonl", [json.dumps(GOOD)] * 4)
    assert named in refused(rows, "data.test_fraction=0", *overrides)


def test_bad_rows_are_skipped_and_counted_when_asked(tiny: Path, tmp_path: Path) -> None:
    lines = [json.dumps(GOOD | {"prompt": word}) for word in ("one", "two", "red", "sea")]
    lines += ["{", json.dumps({"prompt": "one", "chosen": "two"})]
    rows = write(tmp_path / "rows.jsonl", lines)
    recipe = tmp_path / "my.yaml"
    keys = {"model": str(tiny), "output_dir": str(tmp_path / "run")}
    recipe.write_text(json.dumps(keys), encoding="utf-8")
    options = ["data.on_bad_row=skip", "data.test_fraction=0", "train.max_steps=1"]
    assert main(["dpo", str(recipe), rows, *options]) == 0
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    report = manifest["data"]["train"][0]
    assert (report["rows_read"], report["rows_kept"]) == (6, 4)
    assert sum(report["dropped"].values()) == 2


def test_a_data_file_as_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "pairs.jsonl"
    write(path, [json.dumps(GOOD)])
    assert main(["dpo", str(path)]) == 2
    line = capsys.readouterr().err
    assert f"{path}: a data file, not a recipe; wanted RECIPE data={path}" in line


def test_a_command_like_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "tiny/sft"])
    assert "train: no such command; there are sft, rm, ppo, dpo, eval" in capsys.readouterr().err
