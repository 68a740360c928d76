"""The shipped verses: counts as data/README.md says, no held-out verse among the trained ones."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
import sacrebleu

from align.config.sections import DataSource
from align.data.examples import load_examples

DATA = Path(__file__).parents[2] / "data"
KJV_WEB = DATA / "kjv_web"
TEST_BOOKS = {"Ecclesiastes", "Amos", "Romans", "Galatians"}
DEV_BOOKS = {"Hosea", "Micah", "Philippians", "Colossians"}
COUNTS = {"base.jsonl.gz": 18000, "sft": 3000, "prompts": 2000, "dev": 200, "test": 400}


def rows(name: str) -> list[dict]:
    lines = (KJV_WEB / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def books(name: str) -> set[str]:
    return {row["id"].rpartition(" ")[0] for row in rows(name)}


def normalised(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def verses(name: str) -> set[str]:
    """Both texts of each row."""
    if name == "base":
        lines = gzip.decompress((KJV_WEB / "base.jsonl.gz").read_bytes()).decode().splitlines()
        return {normalised(t) for line in lines for t in json.loads(line)["text"].split("\n")}
    instruction = "Rewrite in modern English:\n"
    kjv = {normalised(row["prompt"].removeprefix(instruction)) for row in rows(name)}
    web = {normalised((row.get("references") or [row.get("completion")])[0]) for row in rows(name)}
    return kjv | web


@pytest.mark.parametrize("trained", ["sft", "prompts", "base"])
@pytest.mark.parametrize("held_out", ["dev", "test"])
def test_no_held_out_verse_is_trained_on(trained: str, held_out: str) -> None:
    assert len(verses(trained)) > 2000
    assert verses(trained) & verses(held_out) == set()


def test_books_are_split() -> None:
    assert books("test") == TEST_BOOKS
    assert books("dev") == DEV_BOOKS
    for name in ("sft", "prompts"):
        assert len(books(name)) > 40
        assert not books(name) & (TEST_BOOKS | DEV_BOOKS)


def test_no_verse_is_in_two_files() -> None:
    names = ("sft", "prompts", "dev", "test")
    ids = [row["id"] for name in names for row in rows(name)]
    assert len(ids) == len(set(ids)) == 3000 + 2000 + 200 + 400
    prompts = [row["prompt"] for name in names for row in rows(name)]
    assert len(prompts) == len(set(prompts))


def test_base_holds_no_verse_of_the_tasks() -> None:
    lines = gzip.decompress((KJV_WEB / "base.jsonl.gz").read_bytes()).decode().splitlines()
    base = {normalised(json.loads(line)["text"].split("\n")[0]) for line in lines}
    tasks = {normalised(r["prompt"].split("\n")[1]) for n in ("sft", "prompts") for r in rows(n)}
    assert base & tasks == set()


def test_prompts_are_the_instruction_and_the_verse() -> None:
    for row in rows("test"):
        assert row["prompt"] == f"Rewrite in modern English:\n{row['source_text']}\n"
        assert 6 <= len(row["source_text"].split()) <= 32
        assert len(row["references"]) == 1


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("base.jsonl.gz", "sft"),
        ("sft.jsonl", "sft"),
        ("prompts.jsonl", "prompt"),
        ("dev.jsonl", "prompt"),
        ("test.jsonl", "prompt"),
    ],
)
def test_every_file_loads_whole(name: str, kind: str) -> None:
    (report,) = load_examples([DataSource(path=str(KJV_WEB / name))], kind=kind).reports
    assert report.rows_kept == COUNTS[name if name in COUNTS else name.removesuffix(".jsonl")]


@pytest.mark.parametrize("name", ["test", "dev"])
def test_the_readme_states_what_copying_scores(name: str) -> None:
    copies = [row["source_text"] for row in rows(name)]
    references = [[row["references"][0] for row in rows(name)]]
    bleu = sacrebleu.corpus_bleu(copies, references).score
    chrf = sacrebleu.corpus_chrf(copies, references).score
    readme = (DATA / "README.md").read_text(encoding="utf-8")
    assert f"| {name} | {bleu:.1f} | {chrf:.1f} |" in readme
