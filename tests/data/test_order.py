"""Orders of rows: every row once an epoch, and what a step trained on can be found again."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import pytest

from align.cli import main
from align.data.order import Order, epoch_order, minibatches, prompt_batch

LENGTHS = [5, 3, 9, 3, 1, 7, 2, 8, 6, 4]


@pytest.mark.parametrize("order", ["shuffled", "given", "shortest_first"])
def test_every_row_once_an_epoch(order: Order) -> None:
    rows = epoch_order(order, LENGTHS, seed=3)
    steps = list(minibatches(10, 4, rows, start=0, stop=6))
    assert [len(members) for members in steps] == [4, 4, 2, 4, 4, 2]
    first, second = list(chain(*steps[:3])), list(chain(*steps[3:]))
    assert sorted(first) == sorted(second) == list(range(10))
    assert (first != second) == (order == "shuffled")


def test_orders() -> None:
    assert epoch_order("given", LENGTHS, 0)(1).tolist() == list(range(10))
    assert epoch_order("shortest_first", LENGTHS, 0)(0).tolist() == [4, 6, 1, 3, 9, 0, 8, 5, 7, 2]
    assert epoch_order("shuffled", LENGTHS, 0)(0).tolist() != list(range(10))


def test_minibatches_are_a_function_of_seed_and_step() -> None:
    three, four = (epoch_order("shuffled", LENGTHS, seed) for seed in (3, 4))
    whole = list(minibatches(10, 4, three, start=0, stop=7))
    assert list(minibatches(10, 4, three, start=5, stop=7)) == whole[5:]
    assert list(minibatches(10, 4, four, start=0, stop=7)) != whole


def test_prompts_are_gone_through_in_passes() -> None:
    order = epoch_order("shuffled", LENGTHS, 0)
    seen = [i for iteration in range(5) for i in prompt_batch(10, 4, order, iteration)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    few = epoch_order("shuffled", [1, 1, 1], 0)
    assert prompt_batch(3, 8, few, 0).count(0) >= 2  # more prompts wanted than there are


def trace(capsys: pytest.CaptureFixture[str], folder: Path, *options: str) -> list[str]:
    capsys.readouterr()
    assert main(["data", "trace", str(folder), *options]) == 0
    return capsys.readouterr().out.splitlines()


def test_a_step_is_traced_to_its_lines(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of one length each, so that the tokens that a step logged say which row it had."""
    monkeypatch.chdir(tmp_path)
    for name, start in (("a", 0), ("b", 3)):
        rows = [{"prompt": "one", "completion": "cat " * (i + 1)} for i in range(start, start + 3)]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("my.yaml").write_text(
        json.dumps(
            {
                "model": str(tiny),
                "output_dir": "run",
                "data": {
                    "train": ["b.jsonl", {"path": "a.jsonl", "weight": 2}],
                    "test_fraction": 0,
                },
                "train": {"minibatch": 1, "epochs": 1, "log_every": 1},
            }
        )
    )
    assert main(["sft", "my.yaml"]) == 0
    copies = [f"a.jsonl:{n}{copy}" for copy in ("", "#2") for n in (1, 2, 3)]
    every = trace(capsys, Path("run"))
    assert every == [f"b.jsonl:{n}" for n in (1, 2, 3)] + copies
    tokens = {
        line.split("\t")[0]: int(line.split("\t")[1])
        for line in Path("run/train_rows.tsv").read_text().splitlines()
    }
    logged = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    steps = [row["tokens"] for row in logged if "tokens" in row]
    assert len(steps) == 9
    traced = [trace(capsys, Path("run"), "--step", str(n))[0] for n in range(1, 10)]
    assert [tokens[name] for name in traced] == steps
    assert sorted(traced) == sorted(every)
    assert traced != every
    assert main(["sft", "my.yaml", "data.order=given", "output_dir=given"]) == 0
    assert [trace(capsys, Path("given"), "--step", str(n))[0] for n in range(1, 10)] == every


def test_what_cannot_be_traced_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "trace", str(tmp_path)]) == 2
    assert "holds no run whose rows can be traced" in capsys.readouterr().err
    (tmp_path / "manifest.json").write_text('{"stage": "sft", "seed": 0, "recipe": {}}')
    (tmp_path / "train_rows.tsv").write_text("a.jsonl:1\t3\n")
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "loss": 1.0}\n')
    for step in ("0", "3"):
        assert main(["data", "trace", str(tmp_path), "--step", step]) == 2
        assert "the run has logged steps 1 to 2" in capsys.readouterr().err
    (tmp_path / "manifest.json").write_text('{"stage": "generate", "seed": 0, "recipe": {}}')
    assert main(["data", "trace", str(tmp_path), "--step", "1"]) == 2
    assert "a run of generate has no steps" in capsys.readouterr().err
