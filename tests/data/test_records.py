"""Examples on disk: what is read is what was appended, and little of it is in memory at once."""

from __future__ import annotations

import gc
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.config.sections import DataSource
from align.data.examples import held_out_places, load_examples, split_by_prompt
from align.data.formats.rankings import Rated
from align.data.records import Examples, Records, write_records
from align.data.subset import pick, picked
from align.types import PreferencePair, PromptExample, SFTExample
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
    folder = tmp_path_factory.mktemp("records")
    assert write_records(folder / "first", records) == len(records)
    write_records(folder / "second", records[::-1])
    written = Records(folder / "first", folder / "second")
    both = [*records, *records[::-1]]
    assert written.read(range(len(both))) == both
    backwards = range(len(both) - 1, -1, -2)  # in no order that the file has
    assert written.read(list(backwards)) == [both[i] for i in backwards]


def test_a_reading_takes_the_memory_of_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written a few at a time, and not mapped any more when it is over."""
    monkeypatch.setattr("align.data.records._BATCH_CHARS", 100)
    records = [SFTExample(id=f"a:{n}", text="x" * n) for n in range(50)]
    write_records(tmp_path / "rows.arrow", records)
    assert len(list(pa.ipc.open_stream(str(tmp_path / "rows.arrow")))) > 20
    assert Records(tmp_path / "rows.arrow").read([7, 30]) == [records[7], records[30]]
    gc.collect()
    maps = Path("/proc/self/maps")
    assert not maps.exists() or "rows.arrow" not in maps.read_text()


_shared: Examples


def _half(start: int) -> list[str]:
    return [example.id for example in _shared[start::2]]


def test_forked_processes_read_side_by_side(tmp_path: Path) -> None:
    rows = (SFTExample(id=str(number), text="x" * (number % 50)) for number in range(2000))
    write_records(tmp_path / "rows.arrow", rows)
    global _shared
    every = np.arange(2000)
    _shared = Examples(Records(tmp_path / "rows.arrow"), every, np.ones_like(every))
    with multiprocessing.get_context("fork").Pool(2) as pool:
        even, odd = pool.map(_half, (0, 1))
    assert [int(i) for i in even] == list(range(0, 2000, 2))
    assert [int(i) for i in odd] == list(range(1, 2000, 2))
    assert _shared[-1].id == "1999"
    with pytest.raises(IndexError):
        _shared[2000]


# ---------------------------------------------------------------- the loader


@pytest.mark.parametrize("kind", ["preference", "prompt"])
def test_a_data_set_on_disk_is_the_one_in_memory(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = write_ragged(tmp_path)
    options: dict[str, Any] = {"kind": kind, "on_bad_row": "skip", "seed": 3}
    want = load_examples(sources, **options)
    monkeypatch.setattr("align.data.examples.CHUNK", 16)  # two prompts of ratings at a time
    got = load_examples(sources, **options, folder=tmp_path)
    assert got.reports == want.reports
    assert tuple(got.examples) == want.examples
    assert got.examples[5:90:7] == list(want.examples[5:90:7])
    train, test = split_by_prompt(want.examples, test_fraction=0.3, seed=3)
    is_test = held_out_places(got.places, 0.3)
    assert np.array_equal(want.places, got.places)
    assert isinstance(got.examples, Examples)
    for side, numbers in ((train, ~is_test), (test, is_test)):
        rows = np.flatnonzero(numbers)
        assert tuple(got.examples.select(rows)) == side
        fewer = got.examples.select(rows[picked(len(rows), 20, 4)])
        assert tuple(fewer) == pick(side, 20, 4)
        assert fewer[3:9] == list(pick(side, 20, 4)[3:9])
    assert held_out_places(got.places, 1.0).all()
    assert not held_out_places(got.places, 0.0).any()


def test_weights_copy_and_leave_out_whole_prompts_of_ratings(tmp_path: Path) -> None:
    """Three ratings of one prompt are one unit of three pairs; the row beside it is another."""
    rated = [f'{{"prompt": "q", "response": "r{n}", "score": {n}}}' for n in range(3)]
    path = tmp_path / "d.jsonl"
    path.write_text(
        "\n".join([rated[0], '{"prompt": "p", "chosen": "a", "rejected": "b"}', *rated[1:]])
    )
    loaded = load_examples(
        [DataSource(path=str(path), weight=1.5)], kind="preference", seed=0, folder=tmp_path
    )
    ids = [e.id.removeprefix(f"{path}:") for e in loaded.examples]
    margins = [e.margin for e in loaded.examples]
    assert ids[:4] == ["2", "3>1", "4>1", "4>3"]
    assert margins[:4] == [None, 1, 2, 1]
    assert ids[4:] in (["2#2"], ["3>1#2", "4>1#2", "4>3#2"])
    (report,) = loaded.reports
    assert (report.rows_read, report.rows_kept, report.dropped) == (4, 4, {})
