"""The Arrow files of token groups: what is written is what is read, and nothing else is taken."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from align.data.tokens import cache as token_cache
from align.data.tokens import tokenise
from align.data.tokens.cache import Damaged, new_entry, tokenizer_hash, write_arrow
from align.data.tokens.chat import encode_examples
from align.data.tokens.groups import SCHEMA, PromptExamples, TokenGroups, open_entry, to_batches
from align.data.tokens.packing import longest_of, longest_sequence
from align.data.tokens.tokenise import Tally, batches_of
from align.types import AlignError, PreferencePair, PromptExample, TokenGroup, TokenSequence

IDS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5)


@st.composite
def groups_of_all_kinds(draw: Any) -> list[TokenGroup]:
    groups = []
    for number in range(draw(st.integers(0, 7))):
        prefix = np.array(draw(IDS) if draw(st.booleans()) else [], dtype=np.int32)
        fewest = 0 if len(prefix) else 1
        answers = []
        for _ in range(draw(st.integers(fewest, 3))):
            ids = np.array(draw(IDS), dtype=np.int32)
            counts = draw(st.sampled_from(["all", "some"]))
            mask = np.ones(len(ids), dtype=bool)
            mask[: len(ids) // 2] = counts == "all"
            answers.append(TokenSequence(ids, mask))
        margin = draw(st.one_of(st.none(), st.floats(-5, 5)))
        groups.append(TokenGroup(prefix, tuple(answers), id=f"füle:{number}", margin=margin))
    return groups


def write_entry(entry: Path, batches: Iterable[Any], **facts: Any) -> None:
    with new_entry(entry, facts) as folder:
        facts["groups"] = {"train": write_arrow(folder / "train.arrow", SCHEMA, batches)}


def file_of(folder: Path, groups: Sequence[TokenGroup], per_batch: int = 3) -> TokenGroups:
    """In several Arrow batches, though there are few groups."""
    entry = folder / f"entry{len(list(folder.iterdir()))}"
    parts = [groups[i : i + per_batch] for i in range(0, len(groups), per_batch)]
    write_entry(entry, (b for part in parts for b in to_batches(part, [None] * len(part))))
    return open_entry(entry, ["train"])[1]["train"]


def assert_same(got: TokenGroup, want: TokenGroup) -> None:
    assert (got.id, got.margin) == (want.id, want.margin)
    assert got.prefix_ids.dtype == np.int32
    assert got.prefix_ids.tolist() == want.prefix_ids.tolist()
    assert len(got.continuations) == len(want.continuations)
    for mine, theirs in zip(got.continuations, want.continuations, strict=True):
        assert mine.input_ids.dtype == np.int32
        assert mine.input_ids.tolist() == theirs.input_ids.tolist()
        assert mine.loss_mask.dtype == bool
        assert mine.loss_mask.tolist() == theirs.loss_mask.tolist()
    assert got.num_counted == want.num_counted


@given(groups=groups_of_all_kinds())
def test_groups_come_back_as_they_were(
    groups: list[TokenGroup], tmp_path_factory: pytest.TempPathFactory
) -> None:
    read = file_of(tmp_path_factory.mktemp("groups"), groups)
    assert len(read) == len(groups)
    for got, want in zip(read, groups, strict=True):
        assert_same(got, want)
    assert read.num_continuations().tolist() == [len(g.continuations) for g in groups]
    assert longest_of(read) == max(map(longest_sequence, groups), default=0)
    for got, want in zip(read[1:6:2], groups[1:6:2], strict=True):
        assert_same(got, want)
    with pytest.raises(IndexError):
        read[len(groups)]


def pair(number: int, *answers: int) -> TokenGroup:
    sequences = [np.full(n, number, dtype=np.int32) for n in answers]
    counted = tuple(TokenSequence(ids, np.ones(len(ids), dtype=bool)) for ids in sequences)
    return TokenGroup(np.array([1, 2], np.int32), counted, id=str(number))


def test_arrays_are_views_of_the_file(tmp_path: Path) -> None:
    read = file_of(tmp_path, [pair(7, 3, 4)])
    first, again = read[0].continuations[0].input_ids, read[0].continuations[0].input_ids
    assert np.shares_memory(first, again)
    assert not first.flags.writeable


def test_the_hash_is_of_the_tokens_however_they_lie_in_the_file(tmp_path: Path) -> None:
    import hashlib

    def digest(groups: Sequence[TokenGroup], per_batch: int = 3) -> str:
        made = hashlib.sha256()
        file_of(tmp_path, groups, per_batch).update(made)
        return made.hexdigest()

    groups = [pair(number, 2, number) for number in range(1, 9)]
    assert digest(groups) == digest(groups, per_batch=2)
    assert digest(groups) != digest(groups[:-1])
    assert digest([pair(1, 2, 3)]) != digest([pair(1, 3, 2)])  # the same tokens, cut elsewhere


def test_prompts_come_back_as_they_were(tmp_path: Path) -> None:
    turns = ({"role": "user", "content": "hü"}, {"role": "assistant", "content": "ho"})
    prompts = [
        PromptExample(id="a:1", prompt="red", references=("x", "y"), source_text="s"),
        PromptExample(id="a:2", prompt=turns),
    ]
    groups = [TokenGroup(np.array([i], np.int32), (), id=p.id) for i, p in enumerate(prompts)]
    write_entry(tmp_path / "entry", to_batches(groups, prompts))
    read = PromptExamples(open_entry(tmp_path / "entry", ["train"])[1]["train"])
    assert list(read) == prompts


# ---------------------------------------------------------------- an entry is whole or not there


@pytest.mark.parametrize("damage", ["cut", "gone", "facts", "other", "bit", "no sums"])
def test_a_damaged_entry_is_not_read(damage: str, tmp_path: Path) -> None:
    file_of(tmp_path, [pair(n, 3, 4) for n in range(5)])
    file, facts = tmp_path / "entry0" / "train.arrow", tmp_path / "entry0" / "facts.json"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-20])
    elif damage == "gone":
        file.unlink()
    elif damage == "facts":
        facts.write_text("{")
    elif damage == "bit":  # of a token: the file is as long and as Arrow wants it
        content = bytearray(file.read_bytes())
        place = content.index(np.array([3, 3, 3], np.int32).tobytes())
        content[place] ^= 4
        file.write_bytes(content)
        assert TokenGroups(file)[3].continuations[0].input_ids.tolist() == [7, 3, 3]
    else:
        was = json.loads(facts.read_text())
        change = {"groups": {"train": 4}} if damage == "other" else {"sha256": {}}
        facts.write_text(json.dumps({**was, **change}))
    with pytest.raises(Damaged):
        open_entry(tmp_path / "entry0", ["train"])


ONE = [pair(1, 2, 3)]


def test_nothing_is_left_of_a_run_that_failed(tmp_path: Path) -> None:
    def failing() -> Iterator[Any]:
        yield from to_batches(ONE, [None])
        raise AlignError("a bad row")

    with pytest.raises(AlignError, match="a bad row"):
        write_entry(tmp_path / "entry", failing())
    assert list(tmp_path.iterdir()) == []


def test_of_two_runs_that_race_the_first_stays(tmp_path: Path) -> None:
    for name in ("the first", "the second"):
        write_entry(tmp_path / "entry", to_batches(ONE, [None]), by=name)
    assert open_entry(tmp_path / "entry", ["train"])[0]["by"] == "the first"
    assert [p.name for p in tmp_path.iterdir()] == ["entry"]


def test_runs_do_not_remove_one_anothers_folders_and_old_ones_go(tmp_path: Path) -> None:
    old, young, busy = (tmp_path / f"{name}.partial" for name in ("old", "entry.7", "busy"))
    for folder in (old, young, busy):
        folder.mkdir()
        (folder / "train.arrow").write_text("")
    for path in (old / "train.arrow", old, busy):
        os.utime(path, (0, time.time() - 25 * 3600))
    with new_entry(tmp_path / "entry", {"by": "outer"}):
        # the same entry, by a process of the same number
        write_entry(tmp_path / "entry", to_batches(ONE, [None]), by="inner")
    assert open_entry(tmp_path / "entry", ["train"])[0]["by"] == "inner"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "busy.partial",
        "entry",
        "entry.7.partial",
    ]


def test_others_may_read_an_entry(tmp_path: Path) -> None:
    file_of(tmp_path, [pair(1, 2, 3)])
    (tmp_path / "made").mkdir()
    assert (tmp_path / "entry0").stat().st_mode == (tmp_path / "made").stat().st_mode


# ---------------------------------------------------------------- tokenising


def pairs(count: int, bad: Sequence[int] = ()) -> list[PreferencePair]:
    return [
        PreferencePair(
            id=f"f:{i}", prompt="cat: ", chosen="sun " * (1 + i % 5 + 50 * (i in bad)), rejected="x"
        )
        for i in range(count)
    ]


OPTIONS: dict[str, Any] = {"max_tokens": 40, "on_bad_row": "skip", "loss_on": "auto"}


@pytest.mark.parametrize("processes", [1, 2])
def test_chunks_and_processes_change_nothing(
    processes: int, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    monkeypatch.setattr("align.data.tokens.tokenise.CHUNK", 10)
    rows = pairs(45, bad=(3, 20, 21, 22))
    want, owners, dropped = encode_examples(tokenizer, rows, max_tokens=40, on_bad_row="skip")
    tally = Tally()
    made = batches_of(tokenizer, rows, tally, num_processes=processes, **OPTIONS)
    write_entry(tmp_path / "entry", made)
    read = open_entry(tmp_path / "entry", ["train"])[1]["train"]
    assert len(read) == len(want) == 41
    for got, group in zip(read, want, strict=True):
        assert_same(got, group)
    assert dict(tally.dropped) == dropped == {"longer than data.max_tokens": 4}
    assert (tally.rows, tally.groups) == (len(set(owners)), 41)
    assert tally.tokens == sum(g.num_tokens for g in want)


@pytest.mark.parametrize("processes", [1, 2])
def test_the_first_bad_row_stops_and_a_chunk_of_bad_rows_does_not(
    processes: int, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    monkeypatch.setattr("align.data.tokens.tokenise.CHUNK", 2)

    def run(bad: Sequence[int], **options: Any) -> Tally:
        tally = Tally()
        rows = batches_of(
            tokenizer, pairs(8, bad), tally, num_processes=processes, **OPTIONS | options
        )
        list(rows)
        return tally

    with pytest.raises(AlignError, match=r"f:5: prompt has .* or set data.on_bad_row=skip"):
        run([7, 5], on_bad_row="stop")
    assert run([2, 3]).groups == 6
    with pytest.raises(AlignError, match=r"no usable row among 8; the first: f:0: prompt has"):
        run(range(8))


@pytest.mark.parametrize("processes", [1, 2])
def test_two_runs_of_one_process_keep_their_own_rows(
    processes: int, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads take turns as these do; what is in the wrong entry would stay there."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    monkeypatch.setattr("align.data.tokens.tokenise.CHUNK", 3)

    def run(name: str) -> Iterator[Any]:
        rows = [replace(pair, id=f"{name}:{n}") for n, pair in enumerate(pairs(9))]
        return batches_of(tokenizer, rows, Tally(), num_processes=processes, **OPTIONS)

    one, other = run("one"), run("other")
    made = [[b.column("id").to_pylist() for b in both] for both in zip(one, other, strict=True)]
    for side, name in enumerate(("one", "other")):
        assert [id for ids in made for id in ids[side]] == [f"{name}:{n}" for n in range(9)]


def _same(start: int) -> int:
    return start


def test_processes_do_not_run_ahead_of_what_is_written() -> None:
    started: list[int] = []
    probe = (started.append(n) or n for n in range(40))
    done = tokenise._over(_same, probe, 2)
    for number in range(40):
        assert next(done) == number
        assert len(started) <= number + 5
    assert next(done, None) is None


def _killed_at_3(start: int) -> int:
    if start == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return start


@pytest.fixture
def _no_waiting() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError("waited for ever")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("_no_waiting")
def test_a_process_that_is_killed_ends_the_run_in_one_line() -> None:
    with pytest.raises(AlignError, match=r"^data: one of the .* killed, .*memory.*; free") as got:
        list(tokenise._over(_killed_at_3, range(40), 2))
    assert "\n" not in str(got.value)
    assert multiprocessing.active_children() == []


@pytest.mark.usefixtures("_no_waiting")
def test_a_process_that_cannot_be_started_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    fork, calls = os.fork, []

    def failing() -> int:
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return fork()

    monkeypatch.setattr(os, "fork", failing)
    with pytest.raises(AlignError, match=r"cannot be started: Cannot allocate memory; free"):
        list(tokenise._over(_same, range(40), 2))
    for child in multiprocessing.active_children():  # the first: it would wait for work for ever
        child.join(20)
        assert not child.is_alive()


ORPHANS = """
import os, sys, time
from align.data.tokens import tokenise
def wait(start):
    sys.stdout.write(f"{os.getpid()}\\n"); sys.stdout.flush()
    time.sleep(600)
list(tokenise._over(wait, range(2), 2))
"""


def test_a_run_that_is_killed_leaves_no_process() -> None:
    with subprocess.Popen([sys.executable, "-c", ORPHANS], stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        workers = [int(run.stdout.readline()) for _ in range(2)]
        run.kill()
    stop = time.monotonic() + 20
    while any(_runs(pid) for pid in workers):
        assert time.monotonic() < stop
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_the_codes_hash_is_of_all_that_makes_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hashed(*more: Path) -> str:
        token_cache.code_hash.cache_clear()
        return token_cache.code_hash(*map(str, more))

    stage, other = tmp_path / "stage.py", tmp_path / "other.py"
    stage.write_text("1")
    other.write_text("2")
    assert hashed(stage) == hashed(stage)
    found = [hashed(), hashed(stage), hashed(other)]
    for library in ("transformers", "tokenizers", "jinja2"):
        with monkeypatch.context() as newer:
            newer.setattr(token_cache, "version", lambda n, of=library: "9" if n == of else "1")
            found.append(hashed(stage))
    monkeypatch.setattr(token_cache.types, "__file__", str(other))
    found.append(hashed(stage))
    assert len(set(found)) == len(found)
    token_cache.code_hash.cache_clear()


def test_the_tokenizers_hash_is_of_what_it_does(
    tiny: Path, tiny_chat: Path, architecture: Callable[[str], Path]
) -> None:
    plain = AutoTokenizer.from_pretrained(tiny)
    same = AutoTokenizer.from_pretrained(architecture("llama"))
    assert tokenizer_hash(plain) == tokenizer_hash(same)  # wherever it lies
    assert tokenizer_hash(plain) != tokenizer_hash(AutoTokenizer.from_pretrained(tiny_chat))
    same.chat_template = "{{ messages }}"
    assert tokenizer_hash(plain) != tokenizer_hash(same)
    plain.add_tokens(["moonsun"])
    assert tokenizer_hash(plain) != tokenizer_hash(AutoTokenizer.from_pretrained(tiny))
