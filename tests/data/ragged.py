"""A data set with everything in it that a loader has to bear: tests compare two ways to read it."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pyarrow
from pyarrow import parquet

from align.config.sections import DataSource

WORDS = ("red", "green", "blue", "cat", "dog", "sun", "moon", "sea", "good", "bad", "one", "two")


def lines(count: int, rng: random.Random) -> Iterator[str]:
    """JSON lines: good pairs, repeats, contradictions, rankings, ratings, and bad rows."""

    def words(most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))

    before = {"prompt": "cat", "chosen": "sun", "rejected": "moon"}
    for _ in range(count):
        prompt = f"{words(2)} {words(rng.choice([1, 20]))}"
        pair = {"prompt": prompt, "chosen": f"{words(9)} one", "rejected": f"{words(9)} two"}
        ranking = {"prompt": prompt, "responses": [f"{words(3)} {end}" for end in ("red", "sea")]}
        rating = {"prompt": rng.choice(WORDS), "response": words(6), "score": rng.choice([0, 1.5])}
        against = {**before, "chosen": before["rejected"], "rejected": before["chosen"]}
        turns = {"prompt": [{"role": "user", "content": "red"}], "chosen": "sun", "rejected": "sea"}
        row = rng.choice([
            pair, pair, {**pair, "margin": rng.random()}, {**pair, "subset": "dog"}, turns,
            before, against, ranking, rating, rating,
            {**pair, "chosen": ""}, {**pair, "rejected": None}, [1], "", '{"prompt"',
            {**pair, "rejected": pair["chosen"]}, {**pair, "chosen": "sun " * 200},
        ])  # fmt: skip
        before = pair if row is pair else before
        yield row if isinstance(row, str) else json.dumps(row)


def write_ragged(folder: Path) -> tuple[DataSource, ...]:
    """Files of several formats, of several weights."""
    rng = random.Random(5)
    plain, zipped, late = folder / "a.jsonl", folder / "b.jsonl.gz", folder / "c.json"
    plain.write_text("\n".join(lines(150, rng)))
    zipped.write_bytes(gzip.compress("\n".join(lines(80, rng)).encode()))
    late.write_text("\ufeff \n" + "\n".join(lines(60, rng)), encoding="utf-8")
    array, cells, table = folder / "d.json", folder / "e.csv", folder / "f.parquet"
    good = [{"prompt": f"cat {n % 9}", "chosen": f"sun {n}", "rejected": "sea"} for n in range(40)]
    array.write_text(json.dumps([*good[:20], {"prompt": "x"}, 7]))
    rows = "".join(f"cat {n % 4},sun{n},{'' if n % 5 else 'sea'}\n" for n in range(30))
    cells.write_text(f"prompt,chosen,rejected\n{rows}")
    parquet.write_table(pyarrow.Table.from_pylist(good), table)
    weights = {plain: 2.5, zipped: 0.4, late: 1.0, array: 3.0, cells: 1.0, table: 0.7}
    return tuple(DataSource(path=str(path), weight=weight) for path, weight in weights.items())
