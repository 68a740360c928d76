"""Make data/kjv_web/ from a table of verses: python data/make_kjv_web.py VERSES.tsv.gz

The table has a header and the tab-separated columns verse, kjv, web (more are ignored). The same
table gives the same rows, always (the bytes of the .gz depend on the zlib that packed them).
data/README.md says what is what.
"""

from __future__ import annotations

import csv
import gzip
import json
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from sacrebleu import sentence_chrf

OUT = Path(__file__).parent / "kjv_web"
SEED = 20240601
TEST_BOOKS = ("Ecclesiastes", "Amos", "Romans", "Galatians")
DEV_BOOKS = ("Hosea", "Micah", "Philippians", "Colossians")
INSTRUCTION = "Rewrite in modern English:\n"
NUM_SFT, NUM_PROMPTS, NUM_DEV, NUM_TEST, NUM_BASE = 3000, 2000, 200, 400, 18000


@dataclass(frozen=True)
class Verse:
    id: str
    kjv: str
    web: str

    @property
    def book(self) -> str:
        return self.id.rpartition(" ")[0]

    @property
    def prompt(self) -> str:
        return f"{INSTRUCTION}{self.kjv}\n"


def main(table: str) -> None:
    held_out_books = TEST_BOOKS + DEV_BOOKS
    verses = [v for v in read_verses(Path(table)) if is_aligned(v)]
    held_out = [v for v in verses if v.book in held_out_books]
    seen = {normalised(text) for v in held_out for text in (v.kjv, v.web)}
    train = [
        v
        for v in verses
        if v.book not in held_out_books and not {normalised(v.kjv), normalised(v.web)} & seen
    ]
    test = pick([v for v in verses if v.book in TEST_BOOKS and is_short(v)], NUM_TEST)
    dev = pick([v for v in verses if v.book in DEV_BOOKS and is_short(v)], NUM_DEV)
    sft_and_prompts = shuffled([v for v in train if is_short(v)])[: NUM_SFT + NUM_PROMPTS]
    taken = {normalised(v.kjv) for v in sft_and_prompts}
    rest = [v for v in train if normalised(v.kjv) not in taken and fits_base(v)]

    OUT.mkdir(exist_ok=True)
    write("sft.jsonl", [sft_row(v) for v in sft_and_prompts[:NUM_SFT]])
    write("prompts.jsonl", [prompt_row(v) for v in sft_and_prompts[NUM_SFT:]])
    write("dev.jsonl", [prompt_row(v) for v in dev])
    write("test.jsonl", [prompt_row(v) for v in test])
    write("base.jsonl.gz", [{"text": f"{v.kjv}\n{v.web}"} for v in pick(rest, NUM_BASE)])


def read_verses(table: Path) -> list[Verse]:
    """All verses that have both texts; of several with the same King James text, the first."""
    with gzip.open(table, "rt", encoding="utf-8", newline="") as stream:
        rows = csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
        verses = [Verse(r["verse"], r["kjv"].strip(), r["web"].strip()) for r in rows]
    first = {normalised(v.kjv): v for v in reversed(verses) if v.kjv and v.web}
    return [v for v in verses if first.get(normalised(v.kjv)) is v]


def normalised(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def is_aligned(verse: Verse) -> bool:
    """Whether both texts say the same: versions number and divide some verses differently."""
    ratio = len(verse.web.split()) / len(verse.kjv.split())
    if not 0.6 <= ratio <= 1.7:
        return False
    return sentence_chrf(verse.kjv, [verse.web]).score >= 25


def is_short(verse: Verse) -> bool:
    return 6 <= len(verse.kjv.split()) <= 32


def fits_base(verse: Verse) -> bool:
    return max(len(verse.kjv.split()), len(verse.web.split())) <= 60


def shuffled(verses: list[Verse]) -> list[Verse]:
    return random.Random(SEED).sample(verses, len(verses))


def pick(verses: list[Verse], count: int) -> list[Verse]:
    """``count`` verses at random, in the order of the table."""
    chosen = sorted(random.Random(SEED).sample(range(len(verses)), min(count, len(verses))))
    return [verses[i] for i in chosen]


def sft_row(verse: Verse) -> dict[str, object]:
    return {"id": verse.id, "prompt": verse.prompt, "completion": verse.web}


def prompt_row(verse: Verse) -> dict[str, object]:
    return {
        "id": verse.id,
        "prompt": verse.prompt,
        "references": [verse.web],
        "source_text": verse.kjv,
    }


def write(name: str, rows: list[dict[str, object]]) -> None:
    raw = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if name.endswith(".gz"):
        raw = gzip.compress(raw, mtime=0)
    (OUT / name).write_bytes(raw)
    print(f"{OUT / name}: {len(rows)} rows, {len(raw):,} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python data/make_kjv_web.py VERSES.tsv.gz")
    main(sys.argv[1])
