"""Examples on disk: what is read is what was appended, and little of it is in memory at once."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.data.formats.rankings import Rated
from align.data.loader import held_out, load_examples, split_by_prompt
from align.data.readers.spool import Spool
from align.data.subset import Subset, pick, picked
from align.types import DataSource, PreferencePair, PromptExample, SFTExample
from tests.data.ragged import write_ragged

# halves of surrogate pairs too: a system turn is not checked for them
WORDS = st.text(st.characters(codec=None), max_size=5)
TEXTS = WORDS | st.lists(
    st.builds(lambda role, said: {"role": role, "content": said}, WORDS, WORDS), min_size=1
).map(tuple)
RECORDS = st.one_of(
    st.builds(PreferencePair, id=WORDS, prompt=TEXTS, chosen=TEXTS, rejected=TEXTS, source=WORDS),
    st.builds(PreferencePair, id=WORDS, prompt=TEXTS, chosen=TEXTS, rejected=TEXTS,
              margin=st.none() | st.floats(allow_nan=False)),
    st.builds(SFTExample, id=WORDS, text=WORDS),
    st.builds(SFTExample, id=WORDS, prompt=TEXTS, completion=TEXTS),
    st.builds(PromptExample, id=WORDS, prompt=TEXTS, references=st.lists(WORDS).map(tuple)),
    st.builds(Rated, id=WORDS, prompt=TEXTS, response=TEXTS, score=st.floats(allow_nan=False)),
)  # fmt: skip


@given(records=st.lists(RECORDS, max_size=8))
def test_records_come_back_as_they_were(
    records: list[Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    with Spool(tmp_path_factory.getbasetemp()) as spool:
        for number, record in enumerate(records):
            spool.append(record)
            assert spool[number // 2] == records[number // 2]  # read between two that are added
        assert len(spool) == len(records)
        assert [spool[i] for i in range(len(spool))] == records


def test_a_system_without_pread_reads_and_appends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("os.pread")
    records = [SFTExample(id=f"a:{n}", text="x" * n) for n in range(5)]
    with Spool(tmp_path) as spool:
        for number, record in enumerate(records):
            spool.append(record)
            assert spool[number // 2] == records[number // 2]
        assert [spool[i] for i in range(len(spool))] == records


def test_nothing_is_left_in_the_folder(tmp_path: Path) -> None:
    with Spool(tmp_path / "new") as spool:
        spool.append(SFTExample(id="a:1", text="x"))
        spool.flush()
        assert list((tmp_path / "new").iterdir()) == []


_shared: Spool


def _half(start: int) -> list[str]:
    return [_shared[i].id for i in range(start, len(_shared), 2)]


def test_forked_processes_read_side_by_side(tmp_path: Path) -> None:
    with Spool(tmp_path) as spool:
        for number in range(2000):
            spool.append(SFTExample(id=str(number), text="x" * (number % 50)))
        spool.flush()
        global _shared
        _shared = spool
        with multiprocessing.get_context("fork").Pool(2) as pool:
            even, odd = pool.map(_half, (0, 1))
        assert [int(i) for i in even] == list(range(0, 2000, 2))
        assert [int(i) for i in odd] == list(range(1, 2000, 2))
        assert spool[1999].id == "1999"


# ---------------------------------------------------------------- the loader


@pytest.mark.parametrize("kind", ["preference", "prompt"])
def test_a_data_set_on_disk_is_the_one_in_memory(kind: Any, tmp_path: Path) -> None:
    sources = write_ragged(tmp_path)
    options: dict[str, Any] = {"kind": kind, "on_bad_row": "skip", "seed": 3}
    want = load_examples(sources, **options)
    with Spool(tmp_path / "spool") as spool:
        got = load_examples(sources, **options, spool=spool)
        assert got.reports == want.reports
        assert tuple(got.examples) == want.examples
        assert got.examples[5:90:7] == list(want.examples[5:90:7])
        train, test = split_by_prompt(want.examples, test_fraction=0.3, seed=1)
        is_test = held_out(got.examples, test_fraction=0.3, seed=1)
        for side, numbers in ((train, ~is_test), (test, is_test)):
            rows = np.flatnonzero(numbers)
            assert tuple(Subset(got.examples, rows)) == side
            fewer = Subset(got.examples, rows[picked(len(rows), 20, 4)])
            assert tuple(fewer) == pick(side, 20, 4)
            assert fewer[3:9] == list(pick(side, 20, 4)[3:9])


def test_weights_copy_and_leave_out_whole_prompts_of_ratings(tmp_path: Path) -> None:
    """Three ratings of one prompt are one unit of three pairs; the row beside it is another."""
    rated = [f'{{"prompt": "q", "response": "r{n}", "score": {n}}}' for n in range(3)]
    path = tmp_path / "d.jsonl"
    path.write_text(
        "\n".join([rated[0], '{"prompt": "p", "chosen": "a", "rejected": "b"}', *rated[1:]])
    )
    with Spool(tmp_path) as spool:
        loaded = load_examples(
            [DataSource(path=str(path), weight=1.5)], kind="preference", seed=0, spool=spool
        )
        ids = [e.id.removeprefix(f"{path}:") for e in loaded.examples]
        margins = [e.margin for e in loaded.examples]
    assert ids[:4] == ["2", "3>1", "4>1", "4>3"]
    assert margins[:4] == [None, 1, 2, 1]
    assert ids[4:] in (["2#2"], ["3>1#2", "4>1#2", "4>3#2"])
    (report,) = loaded.reports
    assert (report.rows_read, report.rows_kept, report.dropped) == (4, 4, {})
