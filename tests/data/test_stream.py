"""A stream's windows and what a run asks of them: the same groups however it came there."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from align.config.sections import DataSource
from align.data.examples import load_examples, split_by_prompt
from align.data.stream import RECENT, TokenStream, at_hand, check_groups
from align.data.stream_windows import WindowReader
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
    mark = reader.beginning()
    for _ in range(count):
        window = reader.read(mark)
        yield window
        mark = window.next


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
        mark = json.loads(json.dumps(window.mark))
        again = make_reader(**options).read(mark)
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


# ---------------------------------------------------------------- the groups of a run


@pytest.fixture
def make_stream(make_reader: MakeReader) -> Callable[..., TokenStream]:
    def make(num_groups: int, *, behind: int = 4, **options: Any) -> TokenStream:
        return TokenStream(make_reader(**options), num_groups, behind=behind)

    return make


def test_a_stream_is_its_windows(
    make_stream: Callable[..., TokenStream], make_reader: MakeReader
) -> None:
    whole = [g for w in windows_of(make_reader(), 60) for g in w.groups]
    stream = make_stream(50)
    assert len(stream) == 50
    assert contents(list(stream)) == contents(whole[:50])
    assert stream.epoch == 2  # 23 rows a pass
    assert contents(stream[-3:]) == contents(whole[47:50])
    # far back and forth again
    assert contents([stream[0], stream[49], stream[7]]) == contents([whole[i] for i in (0, 49, 7)])
    # in the middle, where the next window is being read
    stream = make_stream(400)
    stream[220]
    assert contents([stream[3], stream[220]]) == contents([whole[3], whole[220]])
    for index in (400, -401):
        with pytest.raises(IndexError):
            stream[index]


def test_going_on_from_a_mark_gives_the_same_groups(
    make_stream: Callable[..., TokenStream],
) -> None:
    whole = make_stream(400)
    every = [whole[i] for i in range(400)]
    for step in (0, 1, 30, 90):
        stopped = make_stream(400)
        for i in range(4 * step):
            stopped[i]
        mark = json.loads(json.dumps(stopped.mark()))
        resumed = make_stream(400)
        resumed.go_to(mark)
        assert mark["start"] <= max(4 * step - 1, 0)
        rest = [resumed[i] for i in range(4 * step, 400)]
        assert contents(rest) == contents(every[4 * step :])
        assert resumed.epoch == whole.epoch


def test_few_windows_lie_in_memory_and_each_is_read_once(
    make_stream: Callable[..., TokenStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    original = WindowReader.read

    def spying(self: WindowReader, mark: Any, **options: Any) -> Any:
        read.append(mark["number"])
        return original(self, mark, **options)

    monkeypatch.setattr(WindowReader, "read", spying)
    stream = make_stream(1000, size=20)
    most = 0
    for i in range(1000):
        stream[i]
        stream[max(i - 3, 0)]  # of the same minibatch
        most = max(most, len(stream.windows()))
        assert len(at_hand(stream)) <= RECENT + 2 * 20
    assert most > 1
    assert read == list(range(len(read)))
    assert len(read) == 87  # 43 passes of two windows are 989 groups


def test_every_window_is_visited_when_it_is_read(make_stream: Callable[..., TokenStream]) -> None:
    stream = make_stream(40)
    seen: list[int] = []
    check_groups(stream, lambda groups: seen.append(len(groups)))
    assert seen == [5]
    for i in range(40):
        stream[i]
    assert seen == [5, 5, 5, 5, 3, 5, 5, 5, 5]
    few: list[int] = []
    check_groups(stream[:7], lambda groups: few.append(len(groups)))
    assert few == [7]


def test_a_bad_row_ends_the_run_when_its_window_is_reached(
    make_stream: Callable[..., TokenStream], source: DataSource
) -> None:
    with Path(source.path).open("a") as file:
        file.write("{\n")
    stream = make_stream(40)
    for i in range(20):
        stream[i]
    with pytest.raises(AlignError, match=rf"rows.jsonl:{NUM_ROWS + 1}: row: malformed JSON"):
        stream[20]
    # it does not become usable by asking again
    with pytest.raises(AlignError, match="malformed JSON"):
        stream[20]


def test_nothing_is_read_behind_the_last_group(make_stream: Callable[..., TokenStream]) -> None:
    stream = make_stream(10)
    assert len([stream[i] for i in range(10)]) == 10
    assert all(thread.name != "align-stream" for thread in threading.enumerate())
    assert [w.stop for w in stream.windows()] == [5, 10]
