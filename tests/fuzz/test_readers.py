"""Whatever a file holds, reading it gives the right rows or one line: no traceback, no wrong row.

``ALIGN_FUZZ=20000`` tries that many inputs on each reader (`make fuzz`); `make test` tries few.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from align.config import keys as config
from align.config.load import load_recipe, to_yaml
from align.config.sections import DataSource
from align.data.examples import load_examples
from align.types import AlignError
from tools.trust import Trust

INPUTS = int(os.environ.get("ALIGN_FUZZ", "100"))
KINDS = ("sft", "preference", "prompt")
fuzz = settings(
    max_examples=INPUTS,
    deadline=None,
    database=None,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)

words = st.text(st.characters(codec="utf-8"), max_size=20)
said = words.filter(lambda text: bool(text.strip()))
scalars = st.none() | st.booleans() | st.integers() | st.floats() | words
roles = st.sampled_from(("user", "assistant", "tool", "function_call", "observation"))
turns = st.fixed_dictionaries({"role": words | roles, "content": scalars})
values = st.recursive(
    scalars | turns,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)
COLUMNS = (
    "prompt", "chosen", "rejected", "completion", "messages", "conversations", "text", "system",
    "references", "margin", "instruction", "input", "output", "history", "labels", "human_ref_A",
    "human_ref_B", "choice", "summaries", "info", "tools", "score_A", "score_B", "response_a",
    "response_b", "winner", "chosen_score", "rejected_score",
)  # fmt: skip
rows_of_anything = st.dictionaries(st.sampled_from(COLUMNS) | words, values, max_size=6)
GOOD = [{"prompt": f"say {i}", "chosen": "yes " * i + "good", "rejected": "no"} for i in range(9)]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def tried(trust: Trust, reader: str) -> None:
    trust.row(
        "fuzz",
        reader,
        found=f"{INPUTS} inputs: right rows or one line, each of them",
        wanted="no traceback, no wrong row",
    )


def outcome(call: Callable[[], Any]) -> Any:
    """What the call returns, or the one line that it was refused with; anything else fails."""
    try:
        return call()
    except AlignError as error:
        line = str(error)
    assert line.strip()
    return line


def read(path: Path, kind: Any, on_bad_row: Any = "skip") -> list[Any] | None:
    """Examples, or None where the file was refused in one line; anything else fails the test."""
    source = DataSource(path=str(path))
    loaded = outcome(lambda: load_examples([source], kind=kind, on_bad_row=on_bad_row))
    return None if isinstance(loaded, str) else list(loaded.examples)


# ---------------------------------------------------------------- data


@fuzz
@given(data=st.data())
def test_bytes_of_any_kind(folder: Path, data: st.DataObject) -> None:
    suffix = data.draw(st.sampled_from(["jsonl", "json", "csv", "parquet", "arrow", "jsonl.gz"]))
    raw = data.draw(st.binary(max_size=200))
    path = folder / f"bytes.{suffix}"
    path.write_bytes(raw)
    for kind in KINDS:
        read(path, kind)


@fuzz
@given(rows=st.lists(rows_of_anything, min_size=1, max_size=4), kind=st.sampled_from(KINDS))
def test_objects_of_any_kind(folder: Path, rows: list[dict[str, Any]], kind: str) -> None:
    path = folder / "objects.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    read(path, kind, "stop")
    read(path, kind, "skip")


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_bytes("".join(lines).encode())


def write_json(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text(json.dumps(rows), encoding="utf-8")


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: list[dict[str, str]]) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write_arrow(path: Path, rows: list[dict[str, str]]) -> None:
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as out:
        out.write_table(table)


def write_gz(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


WRITERS: dict[str, Callable[[Path, list[dict[str, str]]], None]] = {
    "jsonl": write_jsonl,
    "json": write_json,
    "csv": write_csv,
    "parquet": write_parquet,
    "arrow": write_arrow,
    "jsonl.gz": write_gz,
}
pairs = st.lists(
    st.fixed_dictionaries({"prompt": said, "completion": said}), min_size=1, max_size=4
)


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_text_comes_back_as_it_was(folder: Path, suffix: str, trust: Trust) -> None:
    @fuzz
    @given(rows=pairs)
    def check(rows: list[dict[str, str]]) -> None:
        # a CSV cell cannot hold NUL, and csv itself makes one line end of two in none of the cells
        if suffix == "csv":
            rows = [{k: v.replace("\0", "0") for k, v in row.items()} for row in rows]
        path = folder / f"rows.{suffix}"
        WRITERS[suffix](path, rows)
        examples = read(path, "sft", "stop")
        assert examples is not None
        found = [{"prompt": e.prompt, "completion": e.completion} for e in examples]
        assert found == rows

    check()
    tried(trust, f"{suffix}: rows of any text")


@pytest.mark.parametrize("suffix", WRITERS)
def test_half_a_file_is_no_whole_one(folder: Path, suffix: str, trust: Trust) -> None:
    """Cut anywhere: the rows in front of the cut, or one line; never other rows."""
    path = folder / f"cut.{suffix}"
    WRITERS[suffix](path, GOOD)
    whole, raw = read(path, "preference"), path.read_bytes()
    assert whole is not None
    assert len(whole) == len(GOOD)

    @fuzz
    @given(size=st.integers(0, len(raw) - 1))
    def check(size: int) -> None:
        path.write_bytes(raw[:size])
        found = read(path, "preference")
        if suffix == "csv":  # nothing says where a last cell ends
            found = (found or [])[:-1]
        assert found in (None, whole[: len(found or [])])

    check()
    tried(trust, f"{suffix}: cut anywhere")


@pytest.mark.parametrize("suffix", WRITERS)
def test_spoilt_bytes_are_no_traceback(folder: Path, suffix: str, trust: Trust) -> None:
    path = folder / f"spoilt.{suffix}"
    WRITERS[suffix](path, GOOD)
    raw = path.read_bytes()

    @fuzz
    @given(at=st.integers(0, len(raw) - 1), new=st.binary(min_size=1, max_size=4))
    def check(at: int, new: bytes) -> None:
        path.write_bytes(raw[:at] + new + raw[at + len(new) :])
        read(path, "preference")

    check()
    tried(trust, f"{suffix}: one to four bytes overwritten")


# ---------------------------------------------------------------- recipes

RECIPES = [getattr(config, n) for n in dir(config) if n.endswith("Recipe") and n != "CommonRecipe"]
KEYS = (
    "model", "output_dir", "data", "data.train", "data.columns", "seed", "train", "train.epochs",
    "optim", "optim.lr", "lora", "lora.r", "reward", "ppo", "kl", "generation", "models", "resume",
)  # fmt: skip
yaml_values = st.recursive(
    scalars
    | st.sampled_from(["1e-5", "~", "[", "{a: b", "2020-13-45", "${seed}", "${", "*x", "!!int a"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)


def load(cls: type, path: Path, overrides: list[str]) -> None:
    """The recipe reads back as it was written, or was refused in one line."""
    recipe = outcome(lambda: load_recipe(cls, str(path), overrides))
    if isinstance(recipe, str):
        return
    path.write_text(to_yaml(recipe), encoding="utf-8")
    assert load_recipe(cls, str(path)) == recipe


def test_recipes_of_any_text(folder: Path, trust: Trust) -> None:
    @fuzz
    @given(text=st.text(max_size=80), cls=st.sampled_from(RECIPES))
    def check(text: str, cls: type) -> None:
        path = folder / "recipe.yaml"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        load(cls, path, [])

    check()
    tried(trust, "recipe: a file of any text")


def test_recipes_of_any_value_under_any_key(folder: Path, trust: Trust) -> None:
    @fuzz
    @given(
        tree=st.dictionaries(st.sampled_from(KEYS), yaml_values, max_size=5),
        overrides=st.lists(
            st.builds("{}={}".format, st.sampled_from(KEYS), st.text(max_size=12) | yaml_values),
            max_size=3,
        ),
        cls=st.sampled_from(RECIPES),
    )
    def check(tree: dict[str, Any], overrides: list[str], cls: type) -> None:
        path = folder / "recipe.yaml"
        tree = {"model": "m", "output_dir": "o", **{k: v for k, v in tree.items() if "." not in k}}
        path.write_text(json.dumps(tree), encoding="utf-8")
        load(cls, path, overrides)

    check()
    tried(trust, "recipe: any value under any key, and overrides")
