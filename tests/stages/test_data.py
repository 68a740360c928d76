"""Tokenised once: what a second run takes from the cache, and when it does not."""

from __future__ import annotations

import errno
import json
import weakref
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from transformers import AutoTokenizer

from align.config.keys import PPORecipe, RewardRecipe, SFTRecipe
from align.config.sections import DataSource
from align.data import examples, loader, records, sources
from align.data.examples import load_examples, split_by_prompt
from align.data.formats import fields
from align.data.subset import pick
from align.data.tokens import chat, tokenise
from align.data.tokens.chat import encode_examples
from align.stages.common import open_session
from align.stages.data import load_data
from align.types import AlignError, SFTExample, TokenGroup
from tests.data.ragged import write_ragged

Row = dict[str, Any]
KINDS = {"sft": SFTRecipe, "preference": RewardRecipe, "prompt": PPORecipe}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Sources that were read, one entry for each time."""
    found: list[str] = []
    original = loader.load_examples

    def spying(sources: Any, **options: Any) -> Any:
        found.extend(source.path for source in sources)
        return original(sources, **options)

    monkeypatch.setattr(loader, "load_examples", spying)
    return found


@pytest.fixture
def load(tiny: Path, tmp_path: Path, make_recipe: Any, cache: Path) -> Callable[..., Any]:
    """``load("preference", rows_file, "key=value", ...)`` -> (train, test, manifest)."""

    def load(kind: str, rows: Path | str | list[Any], *overrides: str) -> Any:
        tree = {"model": str(tiny), "output_dir": str(tmp_path / "run"), "overwrite": True}
        train = rows if isinstance(rows, list) else str(rows)
        tree |= {"data": {"train": train, "test_fraction": 0.2}}
        tree |= {"reward": {"metric": "chrf"}} if kind == "prompt" else {}
        recipe = make_recipe(KINDS[kind], tree, *overrides)
        session = open_session(recipe, "sft")
        train, test = load_data(session, recipe.data, kind, seed=recipe.seed)  # type: ignore[arg-type]
        session.run.begin()
        return train, test, json.loads((session.run.folder / "manifest.json").read_text())

    return load


@pytest.fixture
def pairs(write_rows: Callable[..., Path], preferences: list[Row]) -> Path:
    broken = {"prompt": "x", "chosen": "", "rejected": "y"}
    long = {"prompt": "cat: ", "chosen": "sun " * 300, "rejected": "x"}
    return write_rows("pairs.jsonl", [*preferences, broken, long])


SKIP = "data.on_bad_row=skip"


def test_the_line_about_the_data_names_columns_that_are_not_read(
    load: Callable[..., Any], write_rows: Callable[..., Path], preferences: list[Row], capsys: Any
) -> None:
    rows = write_rows("p.jsonl", [{**row, "topic": "ice", "id": 3} for row in preferences])
    for _ in range(2):  # the second time from the cache
        _, _, manifest = load("preference", rows)
        line = next(t for t in capsys.readouterr().out.splitlines() if t.startswith("  data: "))
        assert line.endswith(" more held out; columns not read: topic, id")
        assert manifest["data"]["train"][0]["unread"] == ["topic", "id"]


def test_the_line_about_the_data_counts_pairs_whose_scores_contradict_them(
    load: Callable[..., Any], write_rows: Callable[..., Path], preferences: list[Row], capsys: Any
) -> None:
    scores = [{"chosen_score": n % 3, "rejected_score": 1} for n in range(len(preferences))]
    rows = write_rows("p.jsonl", [{**a, **b} for a, b in zip(preferences, scores, strict=True)])
    for _ in range(2):  # the second time from the cache
        _, _, manifest = load("preference", rows)
        line = next(t for t in capsys.readouterr().out.splitlines() if t.startswith("  data: "))
        assert f" more held out; {len(scores) // 3} rows: chosen_score: below rejected_" in line
        found = manifest["data"]["train"][0]
        assert found["noted"] == {"chosen_score: below rejected_score": len(scores) // 3}


def test_a_second_run_reads_nothing_and_is_the_same(
    load: Callable[..., Any], pairs: Path, reads: list[str], cache: Path
) -> None:
    first, first_test, before = load("preference", pairs, SKIP, "data.max_tokens=64")
    assert reads == [str(pairs)]
    again, again_test, after = load("preference", pairs, SKIP, "data.max_tokens=64")
    assert reads == [str(pairs)]
    assert len(list(cache.iterdir())) == 1
    assert len(first.groups) + len(first_test.groups) == 30
    for one, other in ((first, again), (first_test, again_test)):
        assert [g.id for g in one.groups] == [g.id for g in other.groups]
        assert [g.margin for g in one.groups] == [g.margin for g in other.groups]
    facts = ("data", "train_rows", "test_rows", "train_tokens", "dropped_when_tokenised")
    assert [before[f] for f in facts] == [after[f] for f in facts]
    dropped = before["data"]["train"][0]["dropped"]
    assert dropped == {"chosen: empty": 1}
    assert f"{pairs}:31" in before["data"]["train"][0]["first_dropped"][0]
    late = before["dropped_when_tokenised"]
    assert late["train"] | late["test"] == {"longer than data.max_tokens": 1}


@pytest.mark.parametrize(
    "change", ["data.max_tokens=63", "seed=1", "data.test_fraction=0.5", "data.max_train_rows=9"]
)
def test_other_options_are_another_entry(
    change: str, load: Callable[..., Any], pairs: Path, reads: list[str]
) -> None:
    load("preference", pairs, SKIP, "data.max_tokens=64")
    load("preference", pairs, SKIP, "data.max_tokens=64", change)
    assert len(reads) == 2


def test_other_content_model_or_code_is_another_entry(
    load: Callable[..., Any],
    pairs: Path,
    reads: list[str],
    tiny_chat: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load("preference", pairs, SKIP)
    load("preference", pairs, SKIP, f"model={tiny_chat}")
    assert len(reads) == 2
    load("sft", pairs.with_name("pairs.jsonl"), SKIP, "data.columns={completion: chosen}")
    assert len(reads) == 3
    with monkeypatch.context() as other:
        other.setattr(loader, "code_hash", lambda *_: "another")
        load("preference", pairs, SKIP)
    assert len(reads) == 4
    load("preference", pairs, SKIP)
    assert len(reads) == 4
    with pairs.open("a") as file:
        file.write("\n")  # what counts is the content, not whether it means the same
    load("preference", pairs, SKIP)
    assert len(reads) == 5


def test_a_bad_row_stops_every_time(
    load: Callable[..., Any], pairs: Path, reads: list[str], cache: Path
) -> None:
    for _ in range(2):
        with pytest.raises(AlignError, match=r"pairs.jsonl:31: chosen: empty"):
            load("preference", pairs)
    assert len(reads) == 2
    assert not list(cache.glob("*"))


@pytest.mark.parametrize("damage", ["cut", "bit"])
def test_a_damaged_entry_is_made_again_and_said(
    damage: str, load: Callable[..., Any], pairs: Path, reads: list[str], cache: Path, capsys: Any
) -> None:
    want = [g.id for g in load("preference", pairs, SKIP)[0].groups]
    (entry,) = cache.iterdir()
    file = entry / "train.arrow"
    whole = file.read_bytes()
    middle = len(whole) // 2
    changed = bytes([*whole[:middle], whole[middle] ^ 1, *whole[middle + 1 :]])
    file.write_bytes(whole[:100] if damage == "cut" else changed)
    capsys.readouterr()
    assert [g.id for g in load("preference", pairs, SKIP)[0].groups] == want
    assert len(reads) == 2
    said = [line for line in capsys.readouterr().out.splitlines() if "so it is made again" in line]
    assert len(said) == 1
    assert file.read_bytes() == whole
    load("preference", pairs, SKIP)
    assert len(reads) == 2


@pytest.mark.parametrize("text", ["[]", "{}", "null", "", "[" * 100_000, '{"groups": {}}'])
def test_an_entry_whose_facts_are_damaged_is_made_again(
    load: Callable[..., Any], pairs: Path, cache: Path, capsys: Any, text: str
) -> None:
    want = [g.id for g in load("preference", pairs, SKIP)[0].groups]
    (entry,) = cache.iterdir()
    facts = json.loads((entry / "facts.json").read_text())
    if "groups" in text:  # as an entry that says nothing of what was read
        text = json.dumps({"groups": facts["groups"]})
    (entry / "facts.json").write_text(text)
    capsys.readouterr()
    assert [g.id for g in load("preference", pairs, SKIP)[0].groups] == want
    assert "so it is made again" in capsys.readouterr().out
    assert json.loads((entry / "facts.json").read_text()) == facts


def test_prompts_bring_their_references(
    load: Callable[..., Any], write_rows: Callable[..., Path], demonstrations: list[Row]
) -> None:
    rows = [{"prompt": r["prompt"], "references": [r["completion"]]} for r in demonstrations]
    path = write_rows("prompts.jsonl", rows)
    for _ in range(2):
        train, test, _ = load("prompt", path)
        found = {e.prompt: e.references for split in (train, test) for e in split.examples}
        assert found == {r["prompt"]: (r["completion"],) for r in demonstrations}
        assert [e.id for e in train.examples] == [g.id for g in train.groups]


def test_a_hub_set_is_keyed_by_its_fingerprint(
    load: Callable[..., Any],
    preferences: list[Row],
    reads: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sets = [datasets.Dataset.from_list(rows) for rows in (preferences, preferences[:20])]
    monkeypatch.setattr("align.data.sources.require_on_the_hub", lambda *_: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: sets[0])
    for _ in range(2):
        load("preference", "org/pairs")
    assert reads == ["org/pairs"]
    sets.pop(0)
    load("preference", "org/pairs")
    assert reads == ["org/pairs"] * 2


def test_a_cache_that_cannot_be_written_is_one_line(
    load: Callable[..., Any], pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "file"))
    with pytest.raises(AlignError, match=r"token cache .*: cannot be written: .*set ALIGN_CACHE"):
        load("preference", pairs, SKIP)


NO_ROOM = OSError(errno.ENOSPC, "No space left on device")


class Full:
    """An Arrow file on a disk that has no room for what ``method`` writes."""

    def __init__(self, file: Any, method: str) -> None:
        self._file, self._method = file, method

    def __getattr__(self, name: str) -> Any:
        if name == self._method:
            raise NO_ROOM
        return getattr(self._file, name)


@pytest.mark.parametrize("method", ["write_batch", "close"])
@pytest.mark.parametrize("name", ["rows.arrow", "train.arrow"])
def test_a_full_disk_is_a_matter_of_the_cache(
    method: str,
    name: str,
    load: Callable[..., Any],
    pairs: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = pyarrow.ipc.new_stream

    def full(path: str, *schema: Any) -> Any:
        file = original(path, *schema)
        return Full(file, method) if path.endswith(name) else file

    monkeypatch.setattr(pyarrow.ipc, "new_stream", full)
    with pytest.raises(AlignError, match=r"^token cache .*: cannot be written: No space left .*;"):
        load("preference", pairs, SKIP)
    assert not list(cache.iterdir())


@pytest.mark.parametrize(
    "where", ["align.data.loader.load_examples", "align.data.tokens.tokenise.encode_some"]
)
def test_what_cannot_be_read_or_made_is_no_matter_of_the_cache(
    where: str, load: Callable[..., Any], pairs: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(where, failing)
    with pytest.raises(OSError, match="Input/output error"):
        load("preference", pairs, SKIP)
    assert not list(cache.iterdir())


# ---------------------------------------------------------------- at scale


def tokens_of(group: TokenGroup) -> Any:
    answers = [(c.input_ids.tolist(), c.loss_mask.tolist()) for c in group.continuations]
    return group.id, group.margin, group.prefix_ids.tolist(), answers


@pytest.mark.parametrize("processes", [1, 2])
def test_streamed_rows_are_those_of_the_whole_in_memory(
    processes: int,
    load: Callable[..., Any],
    tmp_path: Path,
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ragged files of several weights, read at once, split, cut down and tokenised in one piece."""
    sources = write_ragged(tmp_path)
    loaded = load_examples(sources, kind="preference", on_bad_row="skip", seed=3)
    sides = split_by_prompt(loaded.examples, test_fraction=0.2, seed=3)
    picked = [pick(side, limit, 3) for side, limit in zip(sides, (300, 40), strict=True)]
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    want = [encode_examples(tokenizer, p, max_tokens=64, on_bad_row="skip") for p in picked]
    monkeypatch.setattr(tokenise, "CHUNK", 7)
    monkeypatch.setattr(tokenise, "_processes", lambda rows: processes)
    given = [{"path": s.path, "weight": s.weight} for s in sources]
    limits = ("data.max_train_rows=300", "data.max_test_rows=40")
    *got, manifest = load("preference", given, SKIP, "data.max_tokens=64", "seed=3", *limits)
    for split, (groups, _, _) in zip(got, want, strict=True):
        assert [tokens_of(g) for g in split.groups] == [tokens_of(g) for g in groups]
    late = manifest["dropped_when_tokenised"]
    assert [late["train"], late["test"]] == [dropped for _, _, dropped in want]
    assert late["train"]["longer than data.max_tokens"] > 0
    reports = json.loads(json.dumps([asdict(r) for r in loaded.reports]))
    assert manifest["data"]["train"] == reports
    assert sum(sum(r["dropped"].values()) for r in reports) > 50
    assert manifest["train_rows"] == len(set(want[0][1]))


@pytest.mark.parametrize("kind", ["pairs", "ratings", "bad"])
def test_few_rows_are_alive_at_once(
    kind: str, load: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 2,000 rows no more than two chunks, as rows, examples or token groups."""
    alive, most, made = 0, 0, 0

    def watched(make: Callable[..., Any]) -> Callable[..., Any]:
        def watching(*args: Any, **options: Any) -> Any:
            nonlocal alive, most, made
            found = make(*args, **options)
            for each in found if isinstance(found, tuple) else (found,):
                alive, made = alive + 1, made + 1
                most = max(most, alive)
                weakref.finalize(each, gone)
            return found

        return watching

    def gone() -> None:
        nonlocal alive
        alive -= 1

    for room, name in (
        (sources, "Row"), (fields, "BadRow"), (examples, "read_row"), (examples, "pairs_of"),
        (records, "restored"), (chat, "encode_example"),
    ):  # fmt: skip
        monkeypatch.setattr(room, name, watched(getattr(room, name)))
    for room in (tokenise, records, examples):
        monkeypatch.setattr(room, "CHUNK", 50)
    rows = {
        "pairs": [{"prompt": f"cat {n}", "chosen": "sun", "rejected": "sea"} for n in range(2000)],
        "ratings": [
            {"prompt": f"cat {n // 4}", "response": "sun" * (n % 4 + 1), "score": n}
            for n in range(2000)
        ],
        "bad": [{"prompt": f"cat {n}", "chosen": "sun", "rejected": "sun"} for n in range(2000)],
    }[kind]
    good = {"prompt": "cat", "chosen": "sun", "rejected": "sea"}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [good, *rows]))
    load("preference", path, SKIP, "data.test_fraction=0.5")
    assert made > 2000
    assert most <= 2 * 50 + 10


# ---------------------------------------------------------------- held out


def test_a_held_out_file_that_is_trained_on_is_refused(
    load: Callable[..., Any], write_rows: Callable[..., Path], preferences: list[Row]
) -> None:
    """The file itself, and the same rows in another file and another order."""
    rows = write_rows("pairs.jsonl", preferences)
    with pytest.raises(AlignError, match=r"pairs.jsonl \[train\] is training data too"):
        load("preference", rows, f"data.test={rows}", "data.test_fraction=0")
    turned = write_rows("turned.jsonl", preferences[::-1][:5])
    with pytest.raises(AlignError, match=r"turned.jsonl: all 5 rows are training data too, word"):
        load("preference", rows, f"data.test={turned}", "data.test_fraction=0")


def test_held_out_rows_that_are_trained_on_are_counted_and_said(
    load: Callable[..., Any],
    write_rows: Callable[..., Path],
    preferences: list[Row],
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = write_rows("pairs.jsonl", preferences[2:])
    mixed = write_rows("mixed.jsonl", preferences[:4])
    for _ in range(2):  # made, and from the cache
        *_, manifest = load("preference", rows, f"data.test={mixed}", "data.test_fraction=0")
        assert manifest["test_rows_trained_on"] == 2
        assert "2 held-out rows are training rows too" in capsys.readouterr().out


def test_a_folder_of_splits_is_said_and_its_split_is_read(
    load: Callable[..., Any],
    tmp_path: Path,
    preferences: list[Row],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, rows in (("train", preferences[4:]), ("test", preferences[:4])):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    train, test, _ = load(
        "preference",
        folder,
        f"data.test={{path: {folder}, split: test}}",
        "data.test_fraction=0",
    )
    assert (len(train.groups), len(test.groups)) == (len(preferences) - 4, 4)
    said = capsys.readouterr().out
    assert "split train is read (train.jsonl); not read: split test (test.jsonl)" in said


def test_no_held_out_row_is_no_training_row() -> None:
    """A test source whose weight is below 1 may keep none."""
    read = {"train": [SFTExample(id="a:1", text="a")], "test": []}
    assert loader._shared([DataSource(path="test.jsonl")], read) == 0
