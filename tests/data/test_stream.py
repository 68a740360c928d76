"""A stream's windows and what a run asks of them: the same groups however it came there."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.config.sections import DataSource
from align.data.batches import EpochBatches
from align.data.examples import load_examples, split_by_prompt
from align.data.order import epoch_order
from align.data.stream import RECENT, TokenStream, WindowReader
from align.data.tokens.chat import encode_examples
from align.types import AlignError, TokenGroup

MakeReader = Callable[..., WindowReader]
NUM_ROWS = 23


def rows_of(name: str, count: int) -> list[dict[str, str]]:
    return [{"prompt": f"{name}{n} ", "chosen": f"yes {n}", "rejected": "no"} for n in range(count)]


@pytest.fixture
def source(write_rows: Callable[..., Path]) -> DataSource:
    return DataSource(path=str(write_rows("rows.jsonl", rows_of("p", NUM_ROWS))))


@pytest.fixture
def make_reader(source: DataSource, plain: Any) -> MakeReader:
    """``make_reader(source, ..., size=5)``; nothing held out unless it is said."""

    def make(*sources: DataSource, **changed: Any) -> WindowReader:
        options = {
            "kind": "preference",
            "size": 5,
            "seed": 3,
            "shuffled": True,
            "test_fraction": 0.0,
            "max_tokens": 64,
            "on_bad_row": "stop",
            "loss_on": "auto",
        }
        return WindowReader(sources or (source,), plain, **{**options, **changed})

    return make


def windows_of(reader: WindowReader, count: int) -> Iterator[Any]:
    for _ in range(count):
        yield reader.read()


def lines(groups: Sequence[TokenGroup]) -> list[int]:
    """Line of the file, and of a second copy too."""
    return [int(group.id.partition("#")[0].rpartition(":")[2]) for group in groups]


def contents(groups: Sequence[TokenGroup]) -> list[Any]:
    return [
        (g.id, g.margin, g.prefix_ids.tolist(), [c.input_ids.tolist() for c in g.continuations])
        for g in groups
    ]


# ---------------------------------------------------------------- windows


def test_windows_are_the_rows_in_order_and_end_with_a_pass(make_reader: MakeReader) -> None:
    found = list(windows_of(make_reader(), 6))
    assert [sorted(lines(w.groups)) for w in found] == [
        [1, 2, 3, 4, 5],
        [6, 7, 8, 9, 10],
        [11, 12, 13, 14, 15],
        [16, 17, 18, 19, 20],
        [21, 22, 23],
        [1, 2, 3, 4, 5],
    ]
    assert [(w.start, w.stop, w.passes) for w in found[3:]] == [
        (15, 20, 0),
        (20, 23, 0),
        (23, 28, 1),
    ]
    # shuffled, and another time otherwise
    assert lines(found[0].groups) != sorted(lines(found[0].groups))
    assert lines(found[0].groups) != lines(found[5].groups)


def test_a_window_that_ends_where_the_pass_does_is_not_followed_by_an_empty_one(
    make_reader: MakeReader,
) -> None:
    found = list(windows_of(make_reader(size=NUM_ROWS), 3))
    assert [(w.start, w.stop, w.passes) for w in found] == [(0, 23, 0), (23, 46, 1), (46, 69, 2)]


def test_tokens_and_split_are_those_of_the_loader(
    make_reader: MakeReader, source: DataSource, plain: Any
) -> None:
    examples = load_examples((source,), kind="preference").examples
    train, test = split_by_prompt(examples, test_fraction=0.3, seed=3)
    assert test
    want, _, _ = encode_examples(plain, train, max_tokens=64)
    want_test, _, _ = encode_examples(plain, test, max_tokens=64)
    reader = make_reader(test_fraction=0.3, size=100, shuffled=False)
    first, second = windows_of(reader, 2)
    assert contents(first.groups) == contents(want) == contents(second.groups)
    assert contents(first.held_out) == contents(want_test)
    assert second.held_out == []
    assert first.counts.held_out == len(test)


def test_held_out_prompts_are_never_trained_on(make_reader: MakeReader) -> None:
    found = list(windows_of(make_reader(test_fraction=0.3), 8))
    measured = set(lines(found[0].held_out))
    trained = {line for w in found for line in lines(w.groups)}
    assert measured
    assert not measured & trained
    assert len(trained) + found[-1].counts.held_out == NUM_ROWS
    assert len(measured) < found[-1].counts.held_out  # later ones are left out, not measured


def test_any_window_is_read_from_its_mark_alone(make_reader: MakeReader) -> None:
    options = {"test_fraction": 0.2, "max_tokens": 14, "on_bad_row": "skip"}
    found = list(windows_of(make_reader(**options), 9))
    for window in reversed(found):
        reader = make_reader(**options)
        reader.load_state_dict(json.loads(json.dumps(window.mark)))
        again = reader.read()
        assert contents(again.groups) == contents(window.groups)
        assert again.next == window.next
        assert again.counts == window.counts


def test_what_is_too_long_is_dropped_and_counted_once(
    make_reader: MakeReader, write_rows: Callable[..., Path]
) -> None:
    long = {"prompt": "p ", "chosen": "x" * 500, "rejected": "no"}
    empty = {"prompt": "p ", "chosen": "", "rejected": "no"}
    rows = [*rows_of("p", 3), long, empty, *rows_of("q", 2), long]
    source = DataSource(path=str(write_rows("long.jsonl", rows)))
    found = list(windows_of(make_reader(source, on_bad_row="skip"), 4))
    assert [len(w.groups) for w in found] == [5, 5, 5, 5]
    assert [sum(w.counts.dropped.values()) for w in found] == [1, 2, 2, 2]
    assert found[0].counts.sources[0].bad.reasons == {"chosen: empty": 1}
    assert found[3].counts.rows == 5
    with pytest.raises(AlignError, match=r"long.jsonl:4: prompt has .*data.max_tokens=64"):
        list(windows_of(make_reader(source), 1))


def test_a_pass_without_a_row_to_train_on_ends_the_run(
    make_reader: MakeReader, source: DataSource
) -> None:
    with pytest.raises(
        AlignError, match=r"no training row is left of 23 .*, 0 of them held out; the"
    ):
        list(windows_of(make_reader(max_tokens=2, on_bad_row="skip"), 1))
    with pytest.raises(AlignError, match=r"no training row is left of 23 .*, 23 of them held out$"):
        list(windows_of(make_reader(test_fraction=1.0), 1))


def test_sources_mix_by_weight_and_follow_one_another_when_given(
    make_reader: MakeReader, write_rows: Callable[..., Path]
) -> None:
    a, b = (
        DataSource(path=str(write_rows(f"{name}.jsonl", rows_of(name, 12))), weight=weight)
        for name, weight in (("a", 2.0), ("b", 1.0))
    )
    mixed = next(windows_of(make_reader(a, b, size=12), 1))
    assert Counter(Path(g.id.partition(":")[0]).stem for g in mixed.groups) == {"a": 8, "b": 4}
    given = next(windows_of(make_reader(a, b, size=30, shuffled=False), 1))
    assert [Path(g.id.partition(":")[0]).stem for g in given.groups] == ["a"] * 24 + ["b"] * 6
    assert lines(given.groups)[:4] == [1, 1, 2, 2]


# ---------------------------------------------------------------- the minibatches of a run


@pytest.fixture
def make_stream(make_reader: MakeReader) -> Callable[..., TokenStream]:
    def make(num_rows: int, *, minibatch: int = 4, **options: Any) -> TokenStream:
        return TokenStream(make_reader(**options), size=minibatch, num_rows=num_rows)

    return make


@pytest.mark.parametrize("minibatch", [2, 4, 7, 150])
def test_a_stream_is_its_windows_cut_into_minibatches(
    minibatch: int, make_stream: Callable[..., TokenStream], make_reader: MakeReader
) -> None:
    whole = [g for w in windows_of(make_reader(), 70) for g in w.groups]
    stream = make_stream(280, minibatch=minibatch)
    for step in range(280 // minibatch):
        assert stream.state_dict()["step"] == step
        want = whole[step * minibatch : (step + 1) * minibatch]
        assert contents(next(stream)) == contents(want)
        assert stream.epoch == (step * minibatch + minibatch - 1) // NUM_ROWS
        newest = whole[: (step + 1) * minibatch][-RECENT:]
        assert contents(stream.sample(RECENT, 0)) == contents(newest)


def test_going_on_from_a_state_gives_the_same_groups(
    make_stream: Callable[..., TokenStream],
) -> None:
    whole = make_stream(400)
    every = [next(whole) for _ in range(100)]
    for step in (0, 1, 30, 90, 100):
        stopped = make_stream(400)
        for _ in range(step):
            next(stopped)
        state = json.loads(json.dumps(stopped.state_dict()))
        assert state["mark"]["start"] <= max(4 * step - 1, 0)
        resumed = make_stream(400)
        resumed.check(lambda groups: None)  # as a run does, which reads the first window
        resumed.load_state_dict(state)
        newest = [g for groups in every[:step] for g in groups][-RECENT:]
        assert contents(resumed.sample(RECENT, 0)) == contents(newest)
        rest = [next(resumed) for _ in range(step, 100)]
        assert list(map(contents, rest)) == list(map(contents, every[step:]))
        assert resumed.epoch == whole.epoch


def test_going_back_gives_the_same_groups(make_stream: Callable[..., TokenStream]) -> None:
    """While a thread reads the window behind the newest one."""
    stream = make_stream(400)
    first = [next(stream) for _ in range(3)]
    stream.load_state_dict({"step": 0, "mark": make_stream(4).state_dict()["mark"]})
    assert [contents(next(stream)) for _ in range(3)] == [contents(groups) for groups in first]


def test_few_windows_lie_in_memory_and_each_is_read_once(
    make_stream: Callable[..., TokenStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    original = WindowReader.read

    def spying(self: WindowReader, **options: Any) -> Any:
        read.append(self.state_dict()["number"])
        return original(self, **options)

    monkeypatch.setattr(WindowReader, "read", spying)
    stream = make_stream(1000, size=20)
    most = 0
    for _ in range(250):
        next(stream)
        most = max(most, len(stream.windows()))
        assert len(stream.at_hand()) <= RECENT + 2 * 20
    assert most > 1
    assert read == list(range(len(read)))
    assert len(read) == 87  # 43 passes of two windows are 989 groups


def test_every_window_is_checked_when_it_is_read(make_stream: Callable[..., TokenStream]) -> None:
    stream = make_stream(40)
    seen: list[int] = []
    stream.check(lambda groups: seen.append(len(groups)))
    assert seen == [5]
    for _ in range(10):
        next(stream)
    assert seen == [5, 5, 5, 5, 3, 5, 5, 5, 5]


def test_a_bad_row_ends_the_run_when_its_window_is_reached(
    make_stream: Callable[..., TokenStream], source: DataSource
) -> None:
    with Path(source.path).open("a") as file:
        file.write("{\n")
    stream = make_stream(40)
    for _ in range(5):
        next(stream)
    with pytest.raises(AlignError, match=rf"rows.jsonl:{NUM_ROWS + 1}: row: malformed JSON"):
        next(stream)
    # it does not become usable by asking again
    with pytest.raises(AlignError, match="malformed JSON"):
        next(stream)


def test_nothing_is_read_behind_the_last_group(make_stream: Callable[..., TokenStream]) -> None:
    stream = make_stream(10, minibatch=5)
    assert len([next(stream) for _ in range(2)]) == 2
    assert all(thread.name != "align-stream" for thread in threading.enumerate())
    assert [w.stop for w in stream.windows()] == [5, 10]


# ---------------------------------------------------------------- rows that are all there


def test_batches_of_an_epoch_go_on_at_any_step() -> None:
    groups = [TokenGroup(np.array([n], np.int32), (), id=str(n)) for n in range(10)]
    order = epoch_order("shuffled", np.arange(10), 3)
    batches = EpochBatches(groups, order, 4)
    seen: list[int] = []
    batches.check(lambda some: seen.append(len(some)))
    assert (batches.num_rows, seen, batches.at_hand()) == (10, [10], groups)
    found = [([g.id for g in next(batches)], batches.epoch, batches.state_dict()) for _ in range(7)]
    assert [len(ids) for ids, *_ in found] == [4, 4, 2, 4, 4, 2, 4]  # the last may be short
    for epoch in (found[:3], found[3:6]):
        assert sorted(name for ids, *_ in epoch for name in ids) == sorted(map(str, range(10)))
    assert found[0][0] != found[3][0]  # another order in every epoch
    assert [epoch for _, epoch, _ in found[:4]] == [1 / 3, 2 / 3, 1, 4 / 3]
    for step in (0, 2, 3, 6):
        again = EpochBatches(groups, order, 4)
        again.load_state_dict(found[step - 1][2] if step else {"step": 0})
        assert [g.id for g in next(again)] == found[step][0]
    assert len(batches.sample(3, 1)) == 3
