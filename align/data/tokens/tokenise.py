"""Examples -> Arrow batches of token groups, by several processes where there are many rows."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from threading import Thread
from typing import Any, TypeAlias, TypeVar

import pyarrow as pa

from align.data.records import CHUNK
from align.data.tokens.chat import Encoded, Example, encode_some, require_usable
from align.data.tokens.groups import to_batches
from align.data.tokens.text_ids import Tokenizer
from align.types import AlignError, PromptExample

T = TypeVar("T")

MANY = 5_000
"""Rows from which on starting processes pays."""
CURE = "free memory, or use fewer processors: taskset -c 0 align ..."


@dataclass
class Tally:
    """Counts of the rows by what became of them: filled while `batches_of` is gone through."""

    rows: int = 0
    groups: int = 0
    tokens: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    first_dropped: str = ""


Chunk: TypeAlias = tuple[list[pa.RecordBatch], int, Encoded]
"""Arrow batches of some rows, their tokens, and which rows they are of."""


def batches_of(
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    tally: Tally,
    *,
    num_processes: int | None = None,
    **options: Any,
) -> Iterator[pa.RecordBatch]:
    """Groups of all examples in order.

    Args:
        num_processes: None = as many as there are processors, for many rows.
        options: Of `encode_some`.

    Raises:
        AlignError: The first bad row under ``on_bad_row=stop``, whichever process meets it; no
            usable row at all; or a process that cannot be started, or was killed.
    """
    encode = partial(_chunk, tokenizer, examples, options)
    starts = range(0, len(examples), CHUNK)
    processes = num_processes or _processes(len(examples))
    for batches, tokens, found in _over(encode, starts, processes):
        tally.rows += len(set(found.owners))
        tally.groups += len(found.owners)
        tally.tokens += tokens
        tally.dropped.update(found.dropped)
        tally.first_dropped = tally.first_dropped or found.first_dropped
        yield from batches
    require_usable(len(examples), tally.groups, tally.first_dropped)


def _processes(rows: int) -> int:
    # a forked process sees the rows without a copy; elsewhere they would have to be sent
    if rows < MANY or sys.platform != "linux":
        return 1
    return len(os.sched_getaffinity(0))


def _over(encode: Callable[[int], T], starts: Iterable[int], processes: int) -> Iterator[T]:
    """Yield what ``encode`` makes of each start, in their order."""
    if processes == 1:
        yield from map(encode, starts)
        return
    others = multiprocessing.active_children()
    fork = multiprocessing.get_context("fork")
    # a forked process has its arguments in its copy of this one's memory: nothing is sent to it,
    # and examples on disk it reads itself
    pool = ProcessPoolExecutor(processes, fork, initializer=_begin_worker, initargs=(encode,))
    # a few at a time: what is done and not yet written lies in memory
    running: deque[Future[T]] = deque()
    try:
        for start in starts:
            running.append(_submit(pool, start, others))
            if len(running) > 2 * processes:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    except BrokenProcessPool as error:
        raise AlignError(
            "data: one of the processes that tokenise was killed, most likely because memory ran "
            f"out; {CURE}"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, start: int, others: Sequence[Any]) -> Future[Any]:
    try:
        return pool.submit(_in_worker, start)
    except OSError as error:
        # those that were forked before it failed would wait for work, and Python's end for them
        for child in multiprocessing.active_children():
            if child not in others:
                child.kill()
        raise AlignError(
            f"data: processes that tokenise cannot be started: {error.strerror or error}; {CURE}"
        ) from error


_encode: Callable[[int], Any]
"""Set in forked processes alone, each of which belongs to one call of `batches_of`."""


def _begin_worker(encode: Callable[[int], Any]) -> None:
    """Ctrl-C is the parent's matter, and a parent that was killed leaves nobody behind."""
    global _encode
    _encode = encode
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _in_worker(start: int) -> Any:
    return _encode(start)


def _chunk(
    tokenizer: Tokenizer, examples: Sequence[Example], options: Mapping[str, Any], start: int
) -> Chunk:
    rows = examples[start : start + CHUNK]
    found = encode_some(tokenizer, rows, **options)
    prompts = [e if isinstance(e, PromptExample) else None for e in (rows[i] for i in found.owners)]
    tokens = sum(group.num_tokens for group in found.groups)
    batches = list(to_batches(found.groups, prompts))
    return batches, tokens, Encoded([], found.owners, found.dropped, found.first_dropped)
