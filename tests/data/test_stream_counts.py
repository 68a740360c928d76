"""Streamed rows one by one: what is used of them, what is counted, and what ends the run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from align.config.sections import DataSource
from align.data.formats.columns import Example
from align.data.sources import BadRow, Row
from align.data.stream_counts import PATIENCE, Counts, SourceCounts, examples_of, require_some
from align.types import AlignError

GOOD = {"prompt": "p", "chosen": "c", "rejected": "r"}
BAD = {"prompt": "p", "chosen": "", "rejected": "r"}


def read(
    rows: Sequence[Any],
    counts: SourceCounts,
    *,
    weight: float = 1.0,
    on_bad_row: Any = "skip",
    start: int = 1,
) -> list[Example]:
    """Lines ``start`` and on of a file."""
    source = DataSource(path="f.jsonl", weight=weight)
    found: list[Example] = []
    for number, row in enumerate(rows, start):
        row = row if isinstance(row, BadRow) else Row(row, f"f.jsonl:{number}")
        found += examples_of(row, source, counts, kind="preference", on_bad_row=on_bad_row, seed=0)
    return found


def test_rows_are_counted_by_what_became_of_them() -> None:
    counts = SourceCounts("f.jsonl")
    broken = BadRow("f.jsonl:3", "row", "malformed JSON", "mend the line")
    found = read([GOOD, BAD, broken, BAD, GOOD], counts)
    assert [example.id for example in found] == ["f.jsonl:1", "f.jsonl:5"]
    report = counts.report()
    assert report["rows_read"] == 5
    assert report["rows_kept"] == 2
    assert report["dropped"] == {"chosen: empty": 2, "row: malformed JSON": 1}
    assert report["first_dropped"][1] == "f.jsonl:3: row: malformed JSON; mend the line"


def test_counting_goes_on_from_a_report() -> None:
    whole, first = Counts([SourceCounts("f.jsonl")]), Counts([SourceCounts("f.jsonl")])
    whole.dropped.update({"long": 2})
    first.dropped.update({"long": 2})
    read([GOOD, BAD, GOOD], whole.sources[0])
    read([GOOD], first.sources[0])
    second = Counts.of(json.loads(json.dumps(first.report())))
    read([BAD, GOOD], second.sources[0], start=2)
    assert second.report() == whole.report()
    assert first.report()["sources"][0]["rows_read"] == 1  # what was handed on is a copy


def test_a_whole_weight_is_copies_and_a_fraction_a_share() -> None:
    counts = SourceCounts("f.jsonl")
    rows = [{**GOOD, "prompt": f"p{n}"} for n in range(400)]
    found = [example.id for example in read(rows, counts, weight=2.25)]
    assert found[:2] == ["f.jsonl:1", "f.jsonl:1#2"]
    assert 60 < sum(name.endswith("#3") for name in found) < 140
    assert counts.report()["rows_kept"] == 400
    half = SourceCounts("f.jsonl")
    kept = [example.id for example in read(rows, half, weight=0.5)]
    assert 150 < len(kept) < 250
    assert kept == [example.id for example in read(rows, SourceCounts("f.jsonl"), weight=0.5)]
    assert half.report()["left_out_by_weight"] == 400 - len(kept)
    assert half.report()["rows_kept"] == len(kept)


def test_stopping_takes_a_row_that_can_be_used() -> None:
    told = r"^f.jsonl:1: chosen: empty.*; or set data.on_bad_row=skip$"
    counts = SourceCounts("f.jsonl")
    assert read([BAD, BAD], counts, on_bad_row="stop") == []
    with pytest.raises(AlignError, match=told):
        read([GOOD], counts, on_bad_row="stop")
    with pytest.raises(AlignError, match=r"^f.jsonl:2: chosen: empty"):
        read([GOOD, BAD], SourceCounts("f.jsonl"), on_bad_row="stop")


def test_a_source_without_one_is_not_read_to_its_end() -> None:
    counts = SourceCounts("f.jsonl")
    wrong = {"question": "p", "good": "c", "bad": "r"}
    columns = "data.columns.prompt=question data.columns.chosen=good data.columns.rejected=bad"
    with pytest.raises(AlignError, match=columns):
        read([wrong] * PATIENCE * 2, counts, on_bad_row="stop")
    assert counts.num_read == PATIENCE
    skipping = SourceCounts("f.jsonl")
    assert len(read([wrong] * PATIENCE * 2 + [GOOD], skipping)) == 1


def test_a_source_that_ends_without_a_row_is_refused() -> None:
    empty = SourceCounts("f.jsonl")
    source = DataSource(path="f.jsonl", weight=1e-9)
    with pytest.raises(AlignError, match=r"f.jsonl: no row in it"):
        require_some(empty, source, "preference")
    bad = SourceCounts("f.jsonl")
    read([BAD], bad)
    with pytest.raises(AlignError, match=r"none of 1 rows can be used; the first: .*chosen: empty"):
        require_some(bad, source, "preference")
    light = SourceCounts("f.jsonl")
    read([GOOD], light, weight=1e-9)
    with pytest.raises(AlignError, match=r"a weight of 1e-09 leaves none of its 1 rows"):
        require_some(light, source, "preference")
    read([GOOD], light)
    require_some(light, source, "preference")


def test_ratings_cannot_be_streamed() -> None:
    row = {"prompt": "p", "response": "r", "score": 1.0}
    with pytest.raises(AlignError, match=r"f.jsonl:1: one rated response .*align data convert"):
        read([row], SourceCounts("f.jsonl"))


def test_a_ranking_gives_all_its_pairs() -> None:
    counts = SourceCounts("f.jsonl")
    found = read([{"prompt": "p", "responses": ["a", "b", "c"]}], counts)
    assert [e.id for e in found] == [f"f.jsonl:1[{p}]" for p in ("0>1", "0>2", "1>2")]
    assert counts.num_kept == 1
